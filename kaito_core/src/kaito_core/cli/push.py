"""``kaito push NAME [--to IMAGE]``: finish a push that failed, or push a finished adapter somewhere."""

from __future__ import annotations

import click

from kaito_core.local.state import RunFolder
from kaito_core.problems import UserError
from kaito_core.workloads.job import TuningJob


@click.command(
    "push", help="Push the adapter of a finished run, or finish a push that failed. Uses your docker log-ins."
)
@click.argument("name")
@click.option("--to", "image", help="Where to push; the workspace's own output image when left out.")
def command(name: str, image: str | None) -> None:
    from dataclasses import replace

    from kaito_core.oci_reference import Reference
    from kaito_core.stages.push import build, send

    folder = RunFolder.existing(name)
    with folder.lock():
        job = TuningJob.from_json(folder.job.read_bytes())
        target = image or job.output_image
        if not target:
            raise UserError(
                f"the workspace {name!r} has no output image", "say where to push: kaito push NAME --to IMAGE"
            )
        try:
            Reference.parse(target)
        except ValueError as e:
            raise UserError(f"{target!r} is not an image reference: {e}", field="--to") from None
        layout, tag, digest = build(replace(job, output_image=target), folder.results)
        send(layout, tag, target)
        state = folder.read()
        stage = state.stages.get("push") if state else None
        if state and stage and target == job.output_image:
            stage.status, stage.message = "done", ""
            stage.result = {"image": target, "digest": digest, "layout": str(layout)}
            folder.write(state)
    click.echo(f"pushed {target}@{digest}")
