"""A model in a folder on this machine, as ``save_pretrained`` and the hub's own client leave it."""

from __future__ import annotations

from pathlib import Path

from kaito_core.models.architecture import Refused
from kaito_core.models.description import described, folder_licence, wanted
from kaito_core.models.files import Model, needed, refusal
from kaito_core.models.safetensors_header import BadHeader
from kaito_core.problems import Problem, UserError


def read_folder(folder: Path, *, field: str = "") -> Model:
    """The model in ``folder``; of its weights only the headers are read. Raises `UserError` with the reason."""
    label = str(folder)
    try:
        names = {p.name for p in folder.iterdir()}
        needed(names)
        licence = folder_licence(folder, names)
        return described(folder, wanted(folder, names), label, name=folder.name, licence=licence, field=field)
    except Refused as e:
        raise refusal(label, e, field) from None
    except BadHeader as e:
        raise UserError(
            Problem(f"{label}: the weights cannot be read: {e}", "copy or fetch the model again", field)
        ) from None
    except FileNotFoundError as e:
        missing = Path(e.filename or folder)
        what = "there is no such folder" if missing == folder else f"{missing.name} is a link that leads nowhere"
        raise UserError(Problem(f"{label}: {what}", "give the path of a folder with a model", field)) from None
    except NotADirectoryError:
        raise UserError(Problem(f"{label}: this is a file", "give the folder that it is in", field)) from None
    except (OSError, ValueError) as e:
        words = getattr(e, "strerror", None) or str(e)
        raise UserError(Problem(f"{label}: it cannot be read: {words}", "see to its permissions", field)) from None
