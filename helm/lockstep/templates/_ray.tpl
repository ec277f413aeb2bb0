{{/* What the autoscaler may add, as the control plane reads it: JSON. */}}
{{- define "lockstep.addableNodes" -}}
{{- $nodes := list -}}
{{- range .Values.ray.workerGroups -}}
{{- if gt (int (.maxReplicas | default 0)) 0 -}}
{{- $resources := dict "CPU" (int .cpu) "memory" (include "lockstep.bytes" .memory | int64) -}}
{{- with .gpu }}{{ $_ := set $resources "GPU" (int .count) }}{{ end -}}
{{- $nodes = append $nodes (dict "max" (int .maxReplicas) "resources" $resources) -}}
{{- end -}}
{{- end -}}
{{- toJson $nodes -}}
{{- end -}}

{{/* The environment of head and workers. Workers inherit it, and it shows on the dashboard: no secret belongs here. */}}
{{- define "lockstep.rayEnv" -}}
- name: HOME
  value: /tmp
- name: PYTHONSAFEPATH
  value: "1"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: LOCKSTEP_CACHE
  value: /var/cache/lockstep/blocks
# Below the volume's size, which else would have the pod evicted.
- name: LOCKSTEP_CACHE_BYTES
  value: {{ mulf 0.8 (include "lockstep.bytes" .Values.ray.cache.size | float64) | int64 | toString | quote }}
- name: TORCHINDUCTOR_CACHE_DIR
  value: /var/cache/lockstep/torchinductor
{{- with .Values.ray.dashboard.prometheusHost }}
- name: RAY_PROMETHEUS_HOST
  value: {{ . | quote }}
{{- end }}
{{- with .Values.ray.dashboard.prometheusName }}
- name: RAY_PROMETHEUS_NAME
  value: {{ . | quote }}
{{- end }}
{{- with .Values.ray.dashboard.grafanaHost }}
- name: RAY_GRAFANA_HOST
  value: {{ . | quote }}
{{- end }}
{{- with .Values.ray.dashboard.grafanaIframeHost }}
- name: RAY_GRAFANA_IFRAME_HOST
  value: {{ . | quote }}
{{- end }}
{{ include "lockstep.storageEnv" . }}
{{- end -}}

{{- define "lockstep.headEnv" -}}
{{ include "lockstep.rayEnv" . }}
# Its own drain at SIGTERM, 30 s, would only refuse what comes while its drivers have ended already.
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
  value: "0"
{{- end -}}

{{- define "lockstep.rayMounts" -}}
- name: tmp
  mountPath: /tmp
- name: ray-logs
  mountPath: /tmp/ray
{{- include "lockstep.storageMounts" . }}
{{- end -}}

{{- define "lockstep.rayVolumes" -}}
- name: tmp
  emptyDir: {}
- name: ray-logs
  emptyDir: {}
{{- include "lockstep.storageVolumes" . }}
{{- end -}}

{{/* Only ranks read token shards and compile. */}}
{{- define "lockstep.cacheVolume" -}}
- name: cache
  {{- if .Values.ray.cache.storageClass }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ .Values.ray.cache.storageClass | quote }}
        resources:
          requests:
            storage: {{ .Values.ray.cache.size | quote }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.ray.cache.size | quote }}
  {{- end }}
{{- end -}}

{{/* The workers' image, and over it what a group says; another repository or tag has not the common digest. Called with (list context group). */}}
{{- define "lockstep.groupImage" -}}
{{- $image := deepCopy (index . 0).Values.images.worker -}}
{{- $own := (index . 1).image | default dict -}}
{{- if or $own.repository $own.tag }}{{ $_ := set $image "digest" "" }}{{ end -}}
{{- include "lockstep.image" (list (index . 0) (mergeOverwrite $image $own)) -}}
{{- end -}}

{{/* Requests equal limits: Ray counts with the limits, and a pod that gets less would be killed. Called with a group. */}}
{{- define "lockstep.rayResources" -}}
{{- $each := dict "cpu" .cpu "memory" .memory -}}
{{- with .gpu }}{{ $_ := set $each (.resource | default "nvidia.com/gpu") .count }}{{ end -}}
{{- toYaml (dict "requests" $each "limits" $each) -}}
{{- end -}}

{{/*
Called with (list context values-of-pod). app.kubernetes.io/name is KubeRay's own: its head Service selects by it. No version
of chart or program: KubeRay replaces all pods when anything in the cluster's spec is another, labels included.
*/}}
{{- define "lockstep.rayPodMetadata" -}}
{{- $root := index . 0 -}}
{{- $pod := index . 1 -}}
labels:
  app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
  app.kubernetes.io/component: ray
  app.kubernetes.io/part-of: lockstep
  {{- with $pod.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  # A machine's autoscaler shall not move a pod that holds hours of work.
  cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
  {{- with $pod.annotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/*
Ray's agent answers for what runs beside it: the raylet, and on the head the GCS. More patient than KubeRay's own probes, as
ranks may take all CPUs.
*/}}
{{- define "lockstep.rayProbes" -}}
readinessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 10
livenessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  initialDelaySeconds: 30
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 120
{{- end -}}

{{/*
Neither driver nor ranks see a pod's SIGTERM. Ray does see a drain: it tells the ranks, they write a checkpoint and let go,
and the node ends by itself once nothing runs on it. So: drain, and wait for that, while there is grace.
*/}}
{{- define "lockstep.drain" -}}
running() { grep -qsx raylet /proc/[0-9]*/comm; }
say() { echo "lockstep: $*" > /proc/1/fd/1; }
running || exit 0
say "draining, {{ .Values.ray.drainSeconds }} s at most"
timeout 30 ray drain-node --address="$RAY_ADDRESS" --reason=DRAIN_NODE_REASON_PREEMPTION \
  --reason-message="the pod $HOSTNAME is deleted" --deadline-remaining-seconds={{ .Values.ray.drainSeconds }} \
  || { say "Ray did not take the drain"; exit 0; }
while running; do sleep 1; done
say "drained"
{{- end -}}

{{/*
The head has the drivers: told to end, they let their ranks write a checkpoint first. Ray's own state must outlive that, and
the workers' drains, when all pods go at once.
*/}}
{{- define "lockstep.endDrivers" -}}
drivers=$(grep -lsz '^workers\.main$' /proc/[0-9]*/cmdline | cut -d/ -f3)
[ -n "$drivers" ] || exit 0
echo "lockstep: drivers told to end:" $drivers > /proc/1/fd/1
kill -TERM $drivers
for ((left = {{ .Values.ray.drainSeconds }}; left > 0; left--)); do
  kill -0 $drivers 2>/dev/null || exit 0
  sleep 1
done
{{- end -}}
