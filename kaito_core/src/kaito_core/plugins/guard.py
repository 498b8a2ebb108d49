"""Whose fault it is when a plugin's object breaks while the core uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kaito_core.plugins.types import ProvisioningError
from kaito_core.problems import Failure, KaitoError


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Within, anything but a `KaitoError` or a `ProvisioningError`, which are words for people, becomes a `Failure` that names
    ``what`` (``the tuner 'qlora'``)."""
    try:
        yield
    except (KaitoError, ProvisioningError):
        raise
    except Exception as e:
        words = f"{type(e).__name__}: {e}".splitlines()[0]
        raise Failure(
            f"{what} broke: {words}", "this is a fault of its plugin; `kaito plugins` shows whose it is"
        ) from e
