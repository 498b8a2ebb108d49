"""Where data comes from and where results go."""

from __future__ import annotations

from pydantic import Field

from kaito_core.api.base import Name, Resource, Text, Volume


class DataSource(Resource):
    """Exactly one of `urls`, `volumeSource` and `image`."""

    name: Name = Field("", description="A name for the data; an adapter's name in requests.")
    urls: tuple[Text, ...] = Field(
        (),
        max_length=1000,
        description=(
            "Files to download: `https://`, `http://`, `hf://datasets/org/name/file`; "
            "on this machine also `file://` and plain paths."
        ),
        json_schema_extra={"note": "`hf://`, `file://` and paths are ours; not for adapters"},
    )
    volume_source: Volume | None = Field(
        None, description="A Kubernetes volume that holds the files, as in a pod's `volumes` without the name."
    )
    image: Text = Field("", description="An OCI image that holds the files below `/data`.")
    image_pull_secrets: tuple[Name, ...] = Field(
        (), max_length=64, description="Secrets of type `kubernetes.io/dockerconfigjson` to pull `image` with."
    )


class DataDestination(Resource):
    """Exactly one of `volumeSource` and `image`."""

    volume_source: Volume | None = Field(None, description="A Kubernetes volume that the adapter is copied to.")
    image: Text = Field("", description="The OCI image that the adapter is pushed as: `registry/repository:tag`.")
    image_push_secret: Name = Field(
        "",
        description=(
            "The Secret of type `kubernetes.io/dockerconfigjson` to push `image` with. On this machine the "
            "credentials of `docker login` are used when no Secret of that name is in the file."
        ),
        json_schema_extra={"note": "required with `image`"},
    )


class Checkpoints(Resource):
    """Where checkpoints outlive the pod that wrote them."""

    volume_source: Volume = Field(description="A Kubernetes volume that is still there when the pod's node is gone.")
