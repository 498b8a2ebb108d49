"""A model's files from the Hugging Face hub: weights, configuration and tokenizer, and never code or pickles."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kaito_core.data.download import hub_token
from kaito_core.data.sources import hub_endpoint
from kaito_core.problems import Failure, Problem, UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKENIZER = ("config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "*.jinja")  # fmt: skip
MODEL = (
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""With the licence, which has to go wherever the weights go."""
NEVER = (
    "*.py",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.gguf",
    "original/*",
    "onnx/*",
)
"""Code, pickles, and other copies of the same weights."""
SECOND_COPY = "consolidated*.safetensors"
"""How Mistral's own code calls the weights. Most of its repositories hold them a second time, as ``model*.safetensors``."""


def fetch_model(
    repo: str, revision: str, into: Path, token: str | None = None, *, tokenizer_only: bool = False, field: str = ""
) -> Path:
    """The files of ``repo`` at ``revision`` in the folder ``into``, resumed where an earlier call ended; ``into`` itself.

    ``token`` is the user's hub token, None for none. Raises `UserError` (gated, not found, no safetensors) or `Failure`
    (the hub cannot be reached, the disk is full)."""
    import httpx
    from huggingface_hub import HfApi, errors

    name = f"{repo}@{revision[:12]}"
    api = HfApi(endpoint=hub_endpoint(), token=hub_token(token, field) or False)
    try:
        if tokenizer_only:
            _download(api, repo, revision, into, TOKENIZER, NEVER)
        else:
            _download(api, repo, revision, into, MODEL, (*NEVER, SECOND_COPY))
            if not any(into.glob("*.safetensors")):  # then it is no second copy
                _download(api, repo, revision, into, (SECOND_COPY,), NEVER)
    except errors.GatedRepoError as e:
        raise UserError(Problem(f"{name}: the model is gated: {_words(e)}",
                                f"accept its terms at {hub_endpoint()}/{repo}, and set HF_TOKEN to a token that may read it", field)
                        ) from e  # fmt: skip
    except errors.RevisionNotFoundError as e:
        raise UserError(
            Problem(f"{name}: the hub has no such revision: {_words(e)}", "name a commit that is there", field)
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(Problem(f"{name}: the hub has no such model, or it is private: {_words(e)}",
                                "check the name; for a private model set HF_TOKEN", field)) from e  # fmt: skip
    except (errors.HFValidationError, errors.DisabledRepoError) as e:
        raise UserError(Problem(f"{name}: {_words(e)}", "check the name", field)) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Failure(
                Problem(f"{name}: no disk space in {into}", "free some space and run the same command again", field)
            ) from e
        raise _unreachable(name, e, field) from e
    except (httpx.HTTPError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as e:
        raise _unreachable(name, e, field) from e
    needed = ["tokenizer.json"] if tokenizer_only else ["config.json", "tokenizer.json"]
    missing = [n for n in needed if not (into / n).is_file()]
    if not tokenizer_only and not any(into.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise UserError(Problem(f"{name}: the repository has no {' and no '.join(missing)}",
                                "kaito loads safetensors and fast tokenizers only: choose a revision that has them", field)
                        )  # fmt: skip
    return into


def _download(api: HfApi, repo: str, revision: str, into: Path, allowed: Sequence[str], ignored: Sequence[str]) -> None:
    api.snapshot_download(
        repo,
        revision=revision,
        local_dir=into,
        allow_patterns=list(allowed),
        ignore_patterns=list(ignored),
        max_workers=4,
    )


def _unreachable(name: str, error: Exception, field: str) -> Failure:
    return Failure(Problem(f"{name}: the hub cannot be reached, or has failed: {_words(error)}",
                           f"check the way to {hub_endpoint()}, or use a model that is already here (--model-folder)", field)
                   )  # fmt: skip


def _words(error: Exception) -> str:
    """The error in one line."""
    cause = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ else error
    text = " ".join("".join(c if c.isprintable() else " " for c in str(cause)).split())
    return text[:400] or type(error).__name__
