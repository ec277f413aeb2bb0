{{/* What every pod of ours is held to: Kubernetes' restricted Pod Security Standard. */}}
{{- define "lockstep.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.user }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
fsGroup: {{ int64 . }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lockstep.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Where a pod may run; called with the `pod` values. */}}
{{- define "lockstep.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "lockstep.storageUrl" -}}
{{- .Values.storage.url | default (ternary "s3://lockstep" "" .Values.developmentStore.enabled) -}}
{{- end -}}

{{/* Where the bucket is and which file holds its keys, never the keys. */}}
{{- define "lockstep.storageEnv" -}}
- name: LOCKSTEP_STORAGE
  value: {{ include "lockstep.storageUrl" . | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.storage.region | quote }}
{{- if or .Values.storage.endpoint .Values.developmentStore.enabled }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ .Values.storage.endpoint | default (printf "http://%s-s3:9000" (include "lockstep.fullname" .)) | quote }}
{{- end }}
{{- if include "lockstep.storageSecret" . }}
- name: AWS_SHARED_CREDENTIALS_FILE
  value: /etc/lockstep/storage/credentials
- name: AWS_EC2_METADATA_DISABLED
  value: "true"
{{- end }}
{{- if .Values.storage.ca.existingConfigMap }}
- name: AWS_CA_BUNDLE
  value: /etc/lockstep/ca/ca.crt
{{- end }}
{{- end -}}

{{- define "lockstep.storageMounts" -}}
{{- if include "lockstep.storageSecret" . }}
- name: storage-credentials
  mountPath: /etc/lockstep/storage
  readOnly: true
{{- end }}
{{- if .Values.storage.ca.existingConfigMap }}
- name: storage-ca
  mountPath: /etc/lockstep/ca
  readOnly: true
{{- end }}
{{- end -}}

{{- define "lockstep.storageVolumes" -}}
{{- with include "lockstep.storageSecret" . }}
- name: storage-credentials
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    items:
      - key: {{ $.Values.storage.credentials.key | quote }}
        path: credentials
{{- end }}
{{- with .Values.storage.ca.existingConfigMap }}
- name: storage-ca
  configMap:
    name: {{ . | quote }}
    items:
      - key: {{ $.Values.storage.ca.key | quote }}
        path: ca.crt
{{- end }}
{{- end -}}

{{/* Without a URL: `true`, else nothing. */}}
{{- define "lockstep.sqlite" -}}
{{- if not (or .Values.database.url .Values.database.urlKey) }}true{{ end -}}
{{- end -}}

{{/*
The database, for serving and for migrating; called with (list context secret). A URL that is told here has no password, since
libpq reads PGPASSWORD by itself; one with a password is a file.
*/}}
{{- define "lockstep.databaseEnv" -}}
{{- $database := (index . 0).Values.database -}}
{{- if $database.urlKey }}
- name: LOCKSTEP_DATABASE_URL_PATH
  value: /etc/lockstep/database/url
{{- else }}
- name: LOCKSTEP_DATABASE_URL
  value: {{ $database.url | default "sqlite:////var/lib/lockstep/lockstep.db" | quote }}
{{- with index . 1 }}
- name: PGPASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $database.existingSecret | empty | ternary "password" $database.passwordKey | quote }}
{{- end }}
{{- end }}
{{- if $database.ca.existingConfigMap }}
- name: PGSSLMODE
  value: verify-full
- name: PGSSLROOTCERT
  value: /etc/lockstep/database-ca/ca.crt
{{- end }}
{{- end -}}

{{- define "lockstep.databaseMounts" -}}
{{- if .Values.database.urlKey }}
- name: database-url
  mountPath: /etc/lockstep/database
  readOnly: true
{{- end }}
{{- if .Values.database.ca.existingConfigMap }}
- name: database-ca
  mountPath: /etc/lockstep/database-ca
  readOnly: true
{{- end }}
{{- end -}}

{{- define "lockstep.databaseVolumes" -}}
{{- with .Values.database.urlKey }}
- name: database-url
  secret:
    secretName: {{ $.Values.database.existingSecret | quote }}
    defaultMode: 0440
    items:
      - key: {{ . | quote }}
        path: url
{{- end }}
{{- with .Values.database.ca.existingConfigMap }}
- name: database-ca
  configMap:
    name: {{ . | quote }}
    items:
      - key: {{ $.Values.database.ca.key | quote }}
        path: ca.crt
{{- end }}
{{- end -}}

{{/* All that the chart itself tells the control plane; what comes on top is controlPlane.extraEnv. */}}
{{- define "lockstep.controlPlaneEnv" -}}
- name: LOCKSTEP_HOST
  value: 0.0.0.0
- name: LOCKSTEP_PORT
  value: "8700"
- name: LOCKSTEP_METRICS_PORT
  value: "8701"
- name: LOCKSTEP_RAY_ADDRESS
  value: {{ .Values.ray.address | default (printf "http://%s-head-svc:8265" (include "lockstep.rayName" .)) | quote }}
- name: LOCKSTEP_RAY_TOKEN_PATH
  value: /etc/lockstep/ray-token/auth_token
- name: LOCKSTEP_BOOTSTRAP_KEY_PATH
  value: /etc/lockstep/api-key/api-key
- name: LOCKSTEP_WORKER_PYTHON
  value: {{ .Values.ray.python | quote }}
{{- if and .Values.ray.enabled .Values.ray.autoscaling.enabled }}
- name: LOCKSTEP_ADDABLE_NODES
  value: {{ include "lockstep.addableNodes" . | quote }}
{{- end }}
- name: LOCKSTEP_LOG_FORMAT
  value: {{ .Values.controlPlane.logFormat }}
- name: LOCKSTEP_TRUSTED_HOSTS
  value: {{ include "lockstep.trustedHosts" . | quote }}
{{- with .Values.ray.dashboard.url }}
- name: LOCKSTEP_RAY_DASHBOARD_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.ray.dashboard.grafanaIframeHost }}
- name: LOCKSTEP_GRAFANA_URL
  value: {{ . | quote }}
{{- end }}
- name: PYTHONSAFEPATH
  value: "1"
{{ include "lockstep.databaseEnv" (list . (include "lockstep.databaseSecret" .)) }}
{{ include "lockstep.storageEnv" . }}
{{- end -}}

{{/* A variable that is there twice is refused by some servers, and the second wins with others. Called with (list path variables own). */}}
{{- define "lockstep.refuseOwnNames" -}}
{{- $own := dict -}}
{{- range fromYamlArray (index . 2) }}{{ $_ := set $own .name true }}{{ end -}}
{{- $path := index . 0 -}}
{{- range index . 1 -}}
{{- if hasKey $own .name -}}
{{- fail (printf "%s has %s, which the chart sets itself. Remove it, and set the value that it is made from: README.md." $path .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
