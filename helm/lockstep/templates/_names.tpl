{{- define "lockstep.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end -}}

{{- define "lockstep.fullname" -}}
{{- $name := include "lockstep.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- end -}}

{{/* Under which names clients may ask for the API; an address is always taken, so kubelet's probes are. */}}
{{- define "lockstep.trustedHosts" -}}
{{- $name := include "lockstep.fullname" . -}}
{{- $service := printf "%s.%s" $name .Release.Namespace -}}
{{- $hosts := list "localhost" $name $service (printf "%s.svc" $service) (printf "%s.svc.cluster.local" $service) -}}
{{- if .Values.ingress.enabled }}{{ $hosts = append $hosts .Values.ingress.host }}{{ end -}}
{{- if .Values.httpRoute.enabled }}{{ $hosts = concat $hosts .Values.httpRoute.hostnames }}{{ end -}}
{{- concat $hosts .Values.controlPlane.trustedHosts | join "," -}}
{{- end -}}

{{- define "lockstep.rayName" -}}
{{- .Values.ray.name | default (include "lockstep.fullname" .) -}}
{{- end -}}

{{/* Called with (list context component). */}}
{{- define "lockstep.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "lockstep.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "lockstep.labels" -}}
{{- $root := index . 0 -}}
{{ include "lockstep.selectorLabels" . }}
{{ include "lockstep.commonLabels" $root }}
{{- end -}}

{{- define "lockstep.commonLabels" -}}
app.kubernetes.io/part-of: lockstep
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Called with (list context image). */}}
{{- define "lockstep.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $root.Values.images.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest -}}@{{ $image.digest }}
{{- else -}}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "lockstep.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "lockstep.controlPlaneAccount" -}}
{{- if .Values.controlPlane.serviceAccount.create -}}
{{- .Values.controlPlane.serviceAccount.name | default (include "lockstep.fullname" .) -}}
{{- else -}}
{{- .Values.controlPlane.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "lockstep.rayAccount" -}}
{{- if .Values.ray.serviceAccount.create -}}
{{- .Values.ray.serviceAccount.name | default (printf "%s-ray" (include "lockstep.fullname" .)) -}}
{{- else -}}
{{- .Values.ray.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* Names of Secrets: one that exists, or the one that secrets.yaml makes. */}}
{{- define "lockstep.apiKeySecret" -}}
{{- .Values.apiKey.existingSecret | default (printf "%s-api-key" (include "lockstep.fullname" .)) -}}
{{- end -}}

{{- define "lockstep.rayTokenSecret" -}}
{{- .Values.ray.token.existingSecret | default (printf "%s-ray-token" (include "lockstep.fullname" .)) -}}
{{- end -}}

{{- define "lockstep.storageSecret" -}}
{{- if .Values.storage.credentials.existingSecret -}}
{{- .Values.storage.credentials.existingSecret -}}
{{- else if or .Values.storage.credentials.accessKeyId .Values.developmentStore.enabled -}}
{{- include "lockstep.fullname" . }}-storage
{{- end -}}
{{- end -}}

{{- define "lockstep.databaseSecret" -}}
{{- if .Values.database.existingSecret -}}
{{- .Values.database.existingSecret -}}
{{- else if .Values.database.password -}}
{{- include "lockstep.fullname" . }}-database
{{- end -}}
{{- end -}}

{{- define "lockstep.redisSecret" -}}
{{- $redis := .Values.ray.gcsFaultTolerance -}}
{{- if $redis.existingSecret -}}
{{- $redis.existingSecret -}}
{{- else if $redis.password -}}
{{- include "lockstep.fullname" . }}-redis
{{- end -}}
{{- end -}}

{{/* What a generated Secret has now under a key, else a new random value; called with
(list context secret key length), or (list context secret key length prefix). */}}
{{- define "lockstep.kept" -}}
{{- $found := lookup "v1" "Secret" (index . 0).Release.Namespace (index . 1) -}}
{{- if and $found $found.data (hasKey $found.data (index . 2)) -}}
{{- index $found.data (index . 2) | b64dec -}}
{{- else -}}
{{- if eq (len .) 5 }}{{ index . 4 }}{{ end -}}
{{- randAlphaNum (int (index . 3)) -}}
{{- end -}}
{{- end -}}

{{/* A Kubernetes quantity of memory or disk as bytes. */}}
{{- define "lockstep.bytes" -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (float64 $number) (float64 (index $units (trimPrefix $number .))) | int64 -}}
{{- end -}}
