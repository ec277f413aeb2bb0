{{/*
The alerts as YAML, of this release alone: one Prometheus may watch several. The monitors put `namespace` on all that they
scrape; here each metric is asked for with it, and each alert has it as a label. No alert waits for what nothing scrapes.
*/}}
{{- define "lockstep.alerts" -}}
{{- $namespace := .Release.Namespace -}}
{{- $matcher := printf "${1}{namespace=%q}" $namespace -}}
{{- $rays := and .Values.monitoring.podMonitor.enabled .Values.ray.enabled -}}
{{- $groups := list -}}
{{- range (.Files.Get "alerts.yml" | fromYaml).groups -}}
{{- $rules := list -}}
{{- range .rules -}}
{{- if or $rays (ne .alert "RayUnseen") -}}
{{- $expression := regexReplaceAll "\\b(up|(?:ray_)?lockstep_[a-z_]+)\\b" .expr $matcher | replace "}{" "," -}}
{{- $rules = append $rules (merge (dict "expr" $expression "labels" (set .labels "namespace" $namespace)) .) -}}
{{- end -}}
{{- end -}}
{{- $groups = append $groups (dict "name" .name "rules" $rules) -}}
{{- end -}}
{{- toYaml (dict "groups" $groups) -}}
{{- end -}}
