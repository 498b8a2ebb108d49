"""A model on the Hugging Face hub (or the mirror that ``$HF_ENDPOINT`` names): its small files, and the first bytes of its weights.

What a hub sends goes to a folder of its own and never through this process' memory; it is read there (`kaito_core.models.description`).
What came out is remembered by commit, which never changes, so that a model at a pinned revision is read once; that a model takes more
than a model may take is remembered for an hour."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, urlsplit

from kaito_core import __version__
from kaito_core.addresses import guarded_transport, least_zone, private_addresses_allowed
from kaito_core.data.download import (
    TRIED_AGAIN,
    _Again,
    _content_range,
    _is_hub,
    _number,
    _redirected,
    _retry_after,
    _words,
    hub_token,
)
from kaito_core.data.sources import Source, hub_endpoint
from kaito_core.models.architecture import Refused
from kaito_core.models.description import (
    LARGEST_HEADERS,
    TooMuch,
    about,
    check_class,
    described,
    model_from,
    model_json,
    wanted,
)
from kaito_core.models.files import CONFIG, INDEX, LARGEST_TEXT, TEXTS, TOKENIZER, Model, needed, refusal
from kaito_core.models.safetensors_header import PREFIX, BadHeader, header_length
from kaito_core.problems import Failure, Problem, UserError

FIRST = 128 << 10
"""Bytes that are asked for of a weight file at first: most headers are shorter, and one request is enough."""
AT_ONCE = 8
ATTEMPTS = 3
LONGEST_WAIT = 10.0
REDIRECTS = 5
ABOUT = 16 << 20
"""Bytes of the hub's description of a repository; it lists every file."""

REFUSED_SECONDS = 3600.0
"""For which it is remembered that reading a model takes too much."""

COMMIT = re.compile(r"[0-9a-f]{40}\Z")


class _Hub:
    """Requests for one model, with what every one of them needs."""

    def __init__(self, repo: str, token: str, field: str) -> None:
        self.repo, self.field = repo, field
        self._token = token
        self.label = repo

    def about(self, revision: str, folder: Path) -> Mapping[str, Any]:
        """The hub's description of the repository at a revision (`kaito_core.models.description.about`)."""
        file = folder / "about"
        self._get(f"/api/models/{self.repo}/revision/{quote(revision, safe='')}", file, ABOUT)
        return about(file)

    def save(self, commit: str, names: Iterable[str], folder: Path) -> None:
        """Small files. Raises `Refused` when one is too large."""
        for name in names:
            limit = LARGEST_TEXT[name]
            self._get(f"/{self.repo}/resolve/{commit}/{quote(name)}", folder / name, limit + 1)
            if (folder / name).stat().st_size > limit:
                raise Refused(f"{name} is larger than {limit} bytes")

    def headers(self, commit: str, names: Iterable[str], folder: Path) -> dict[str, int]:
        """The beginnings of safetensors files, with their headers; the sizes of the whole files. Raises `BadHeader`, and `TooMuch`
        when there is more of it than is read."""
        left, lock = LARGEST_HEADERS, threading.Lock()

        def header(name: str) -> tuple[str, int]:
            nonlocal left
            size = self._header(commit, name, folder / name)
            with lock:
                left -= (folder / name).stat().st_size
                if left < 0:
                    raise TooMuch(f"the headers of its weights are longer than {LARGEST_HEADERS >> 20} MiB together")
            return name, size

        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                return dict(pool.map(header, names))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _header(self, commit: str, name: str, file: Path) -> int:
        path = f"/{self.repo}/resolve/{commit}/{quote(name)}"
        total = self._get(path, file, FIRST, start=0)
        if total is None:
            raise Refused(f"the server does not say how large {name} is")
        try:
            with file.open("rb") as f:
                end = PREFIX + header_length(f.read(PREFIX), total)
            here = file.stat().st_size
            if here < end and self._get(path, file, end - here, start=here) != total:
                raise BadHeader("it changed while it was read")
            if file.stat().st_size < end:
                raise BadHeader(f"the server sent {file.stat().st_size} of the header's {end} bytes")
        except BadHeader as e:
            raise BadHeader(f"{name}: {e}") from None
        os.truncate(file, end)
        return total

    def _get(self, path: str, into: Path, most: int, start: int | None = None) -> int | None:
        """At most ``most`` bytes of a file, from ``start`` on where it is given, at the same place in the file ``into``; how large
        the whole is, where the server says it. Tries again where that may help."""
        import httpx

        for attempt in range(1, ATTEMPTS + 1):
            wait: float | None = None
            try:
                return self._follow(hub_endpoint() + path, into, most, start)
            except _Again as e:
                why, wait = str(e), e.wait
            except httpx.TransportError as e:
                why = str(e) or type(e).__name__
                if "CERTIFICATE_VERIFY_FAILED" in why:
                    raise self._unreachable(f"its certificate is not trusted here: {why}") from e
            if attempt < ATTEMPTS:
                time.sleep(min(LONGEST_WAIT, wait if wait is not None else 2.0 ** (attempt - 1)))
        raise self._unreachable(why)

    def _follow(self, url: str, into: Path, most: int, start: int | None) -> int | None:
        """The answer behind all redirects, as `_get` gives it. Raises `_Again` when there is none now."""
        import httpx

        headers = {"Accept-Encoding": "identity", "User-Agent": f"kaito/{__version__}"}
        if start is not None:
            headers["Range"] = f"bytes={start}-{start + most - 1}"
        only_hub = True
        for _ in range(REDIRECTS + 1):
            only_hub = only_hub and _is_hub(url)
            sent = {**headers, "Authorization": f"Bearer {self._token}"} if self._token and only_hub else headers
            # The operator's own mirror may be in a private network; where it redirects to may not.
            own = urlsplit(url)[:2] == urlsplit(hub_endpoint())[:2]
            least = least_zone(allow_private=own or private_addresses_allowed())
            with httpx.Client(transport=guarded_transport(least), timeout=httpx.Timeout(30, connect=10)) as client:
                try:
                    response = client.send(client.build_request("GET", url, headers=sent), stream=True)
                except (httpx.InvalidURL, UnicodeError) as e:
                    raise self._unreachable(f"{url!r} is no address: {e}") from e
                with closing(response):
                    if response.has_redirect_location:
                        place = Source(self.repo, self.label, url=url)
                        url = _redirected(url, response.headers["location"], place, self.field)
                        continue
                    if response.status_code in TRIED_AGAIN:
                        words = f"it says {response.status_code}: {_words(response)}"
                        raise _Again(words, _retry_after(response))
                    if response.status_code not in (200, 206):
                        raise self._refused(response)
                    return _read(response, into, most, start)
        raise self._unreachable(f"it redirects more than {REDIRECTS} times")

    def _refused(self, response: Any) -> Exception:
        """The hub's answer in its own words, and what to do."""
        code, status = response.headers.get("x-error-code", ""), response.status_code
        said = f" ({_words(response)})"
        where = f"{hub_endpoint()}/{self.repo}"
        own = self._token and status in (401, 403)
        if code == "GatedRepo":
            remedy = f"accept its terms at {where}, and set HF_TOKEN to a token that may read it"
            return UserError(Problem(f"{self.label}: the model is gated{said}", remedy, self.field))
        if code == "RevisionNotFound":
            return UserError(
                Problem(
                    f"{self.label}: the hub has no such revision{said}",
                    "name a branch or a commit that is there",
                    self.field,
                )
            )
        if code == "EntryNotFound":
            return UserError(Problem(f"{self.label}: a file is missing{said}", "choose another revision", self.field))
        if code == "RepoNotFound" or status in (401, 403, 404):
            remedy = "check the name" + (
                "; HF_TOKEN may have expired, or may not read it" if own else "; for a private model set HF_TOKEN"
            )
            remedy += f"; a folder on this machine is written ./{self.repo.partition('@')[0]}"
            return UserError(
                Problem(f"{self.label}: the hub has no such model, or it is private{said}", remedy, self.field)
            )
        return self._unreachable(f"it says {status}{said}")

    def _unreachable(self, why: str) -> Failure:
        remedy = f"check the way to {hub_endpoint()}, or use a model that is already here: a preset, or a folder"
        return Failure(Problem(f"{self.label}: the hub cannot be reached, or has failed: {why}", remedy, self.field))


def _read(response: Any, into: Path, most: int, start: int | None) -> int | None:
    """As many bytes of the body as were asked for; a server that does not know ranges is stopped in time."""
    skip, total = start or 0, _number(response.headers.get("content-length", ""))
    if response.status_code == 206:
        begins, total = _content_range(response.headers.get("content-range", ""))
        if start is None or begins != start:
            raise _Again("it sent another part than the one asked for")
        skip = 0
    with into.open("r+b" if start else "wb") as f:
        f.seek(start or 0)
        f.truncate()
        for chunk in response.iter_raw():
            part = chunk[skip : skip + most]
            skip -= min(skip, len(chunk))
            most -= f.write(part)
            if not most:
                break
    return total


def read_hub(repo: str, revision: str = "", *, cache: Path | None = None, token: str = "", field: str = "") -> Model:
    """The model ``org/name`` at a commit, branch or tag (``main`` when empty).

    ``token`` is the user's hub token. ``cache`` is a folder for what was read. Raises `UserError` (not found, gated, not a model
    that kaito can use: with the reason) and `Failure` (the hub does not answer)."""
    hub = _Hub(repo, hub_token(token, field), field)
    hub.label = f"{repo}@{revision}" if revision else repo
    commit = ""
    try:
        if COMMIT.match(revision) and (known := _remembered(cache, repo, revision)):
            return known
        with TemporaryDirectory(prefix="kaito-model-") as name:
            folder = Path(name)
            said = hub.about(revision or "main", folder)
            if not COMMIT.match(said["sha"]):
                raise Refused("the hub does not say at which commit it is", "is HF_ENDPOINT a hub?")
            commit = said["sha"]
            hub.label = _label(repo, commit)
            model = _remembered(cache, repo, commit)
            if model is None:
                model = _fetched(hub, said, commit, folder)
                _remember(cache, repo, commit, {"model": model_json(model)})
            return model
    except Refused as e:
        if isinstance(e, TooMuch) and commit and not isinstance(e, _Remembered):
            _remember(cache, repo, commit, {"too_much": [e.message, e.remedy]})
        raise refusal(hub.label, e, field) from None
    except BadHeader as e:
        remedy = "its publisher has to mend it; choose another revision"
        raise UserError(Problem(f"{hub.label}: the weights cannot be read: {e}", remedy, field)) from None


def small_texts(repo: str, commit: str, *, token: str = "") -> dict[str, str]:
    """A model's small files by name, as they are on the hub. Raises `UserError` and `Failure`."""
    hub = _Hub(repo, hub_token(token), "")
    hub.label = _label(repo, commit)
    try:
        with TemporaryDirectory(prefix="kaito-model-") as name:
            folder = Path(name)
            names = [n for n in TEXTS if n in hub.about(commit, folder)["names"] and n != INDEX]
            hub.save(commit, names, folder)
            return {n: (folder / n).read_bytes().decode("utf-8") for n in names}
    except Refused as e:
        raise refusal(hub.label, e, "") from None


def _fetched(hub: _Hub, said: Mapping[str, Any], commit: str, folder: Path) -> Model:
    names = set(said["names"])
    needed(names)
    hub.save(commit, [CONFIG], folder)
    check_class(folder)
    hub.save(commit, [n for n in TEXTS if n in names and n != CONFIG], folder)
    found = wanted(folder, names)
    if found.tokenizer:
        hub.save(commit, [TOKENIZER], folder)
    sizes = hub.headers(commit, found.weights, folder)
    return described(
        folder,
        found,
        hub.label,
        name=hub.repo,
        hub=(hub.repo, commit),
        sizes=sizes,
        licence=said["licence"],
        gated=said["gated"],
        field=hub.field,
    )


def _label(repo: str, commit: str) -> str:
    return f"{repo}@{commit[:12]}"


def _place(cache: Path, repo: str, commit: str) -> Path:
    return cache / f"{repo.lower().replace('/', '--')}@{commit}.json"


class _Remembered(TooMuch):
    """What was found out before."""


def _remembered(cache: Path | None, repo: str, commit: str) -> Model | None:
    """What was read of this commit before, by this version; None when nothing was, or when the file is damaged.

    Raises `TooMuch` when reading it took too much within the last hour."""
    if cache is None:
        return None
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        place = _place(cache, repo, commit)
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["kaito"] == __version__:
            if "model" in kept:
                return model_from(kept["model"])
            message, remedy = map(str, kept["too_much"])
            if time.time() - place.stat().st_mtime < REFUSED_SECONDS:
                raise _Remembered(message, remedy)
    return None


def _remember(cache: Path | None, repo: str, commit: str, what: dict[str, Any]) -> None:
    """A cache that cannot be written costs time and nothing else."""
    if cache is None:
        return
    place = _place(cache, repo, commit)
    with suppress(OSError, UnicodeEncodeError):
        cache.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f"{place.name}.{os.getpid()}")
        beside.write_text(json.dumps({"kaito": __version__, **what}), encoding="utf-8")
        beside.replace(place)
