{{/* What every pod of ours is held to: Kubernetes' restricted Pod Security Standard. */}}
{{- define "lockstep.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.user }}
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
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
priorityClassName: {{ . }}
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
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - key: {{ $.Values.storage.credentials.key }}
        path: credentials
{{- end }}
{{- with .Values.storage.ca.existingConfigMap }}
- name: storage-ca
  configMap:
    name: {{ . }}
    items:
      - key: {{ $.Values.storage.ca.key }}
        path: ca.crt
{{- end }}
{{- end -}}

{{/* The database, for serving and for migrating. libpq reads PGPASSWORD by itself, so no URL holds a password. */}}
{{- define "lockstep.databaseEnv" -}}
- name: LOCKSTEP_DATABASE_URL
  value: {{ .Values.database.url | default "sqlite:////var/lib/lockstep/lockstep.db" | quote }}
{{- with include "lockstep.databaseSecret" . }}
- name: PGPASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.database.existingSecret | empty | ternary "password" $.Values.database.passwordKey }}
{{- end }}
{{- end -}}
