{{- define "kaito.name" -}}
{{ .Release.Name }}-controller
{{- end }}

{{- define "kaito.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kaito.labels" -}}
{{ include "kaito.selector" . }}
app.kubernetes.io/component: controller
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The reference of an image: (list . "controller"). */}}
{{- define "kaito.image" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
{{- $image := $root.Values.image }}
{{- if get $image $name }}
{{- get $image $name }}
{{- else }}
{{- $registry := required (printf "image.registry is not set: where the image kaito-%s is. Build and push it with images/build.py, then: --set image.registry=HOST/PATH" $name) $image.registry }}
{{- printf "%s/kaito-%s:%s" $registry $name ($image.tag | default $root.Chart.AppVersion) }}
{{- end }}
{{- end }}
