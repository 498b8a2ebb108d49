"""A model on the Hugging Face hub (or the mirror that ``$HF_ENDPOINT`` names): its small files, and the first bytes of its weights.

What was read is remembered by commit, which never changes, so that a model at a pinned revision is read once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from kaito_core import __version__
from kaito_core.addresses import guarded_transport, least_zone, private_addresses_allowed
from kaito_core.data.chat_format import stop_ids, unnamed
from kaito_core.data.download import (
    TRIED_AGAIN,
    _content_range,
    _is_hub,
    _number,
    _redirected,
    _retry_after,
    _words,
    hub_token,
)
from kaito_core.data.sources import Source, hub_endpoint
from kaito_core.models.architecture import Refused, class_of
from kaito_core.models.files import (
    CONFIG,
    INDEX,
    LARGEST_TEXT,
    TEXTS,
    TOKENIZER,
    Model,
    Raw,
    json_object,
    licence_of,
    model_of,
    needed,
    reduced_tokenizer,
    refusal,
    weight_files,
)
from kaito_core.models.safetensors_header import PREFIX, BadHeader, header_length
from kaito_core.plugins.types import ModelSource
from kaito_core.problems import Failure, Problem, UserError

FIRST = 128 << 10
"""Bytes that are asked for of a weight file at first: most headers are shorter, and one request is enough."""
AT_ONCE = 8
ATTEMPTS = 3
LONGEST_WAIT = 10.0
REDIRECTS = 5
ABOUT = 16 << 20
"""Bytes of the hub's description of a repository; it lists every file."""

COMMIT = re.compile(r"[0-9a-f]{40}\Z")


@dataclass(frozen=True)
class _Answer:
    """What a server sent, as far as it was read."""

    body: bytes
    total: int | None
    """Size of the whole file."""


class _Hub:
    """Requests for one model, with what every one of them needs."""

    def __init__(self, repo: str, token: str, field: str) -> None:
        self.repo, self.field = repo, field
        self._token = token
        self.label = repo

    def about(self, revision: str) -> dict[str, Any]:
        """The hub's description of the repository at a revision."""
        path = f"/api/models/{self.repo}/revision/{quote(revision, safe='')}"
        return json_object("the hub's answer", self._get(path, ABOUT).body.decode("utf-8", "replace"))

    def text(self, commit: str, name: str) -> str:
        """A small file. Raises `Refused` when it is too large or no text."""
        limit = LARGEST_TEXT[name]
        answer = self._get(f"/{self.repo}/resolve/{commit}/{quote(name)}", limit + 1)
        if len(answer.body) > limit:
            raise Refused(f"{name} is larger than {limit} bytes")
        try:
            return answer.body.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(f"{name} is not UTF-8") from None

    def header(self, commit: str, name: str) -> tuple[int, str]:
        """Size and header of a safetensors file. Raises `BadHeader`."""
        path = f"/{self.repo}/resolve/{commit}/{quote(name)}"
        first = self._get(path, FIRST, start=0)
        if first.total is None:
            raise Refused(f"the server does not say how large {name} is")
        try:
            end = PREFIX + header_length(first.body, first.total)
            body = first.body[:end]
            if len(body) < end:
                rest = self._get(path, end - len(body), start=len(body))
                if rest.total != first.total:
                    raise BadHeader("it changed while it was read")
                body += rest.body
            if len(body) < end:
                raise BadHeader(f"the server sent {len(body)} of the header's {end} bytes")
            return first.total, body[PREFIX:].decode("utf-8")
        except UnicodeDecodeError:
            raise BadHeader(f"{name}: the header is not UTF-8") from None
        except BadHeader as e:
            raise BadHeader(f"{name}: {e}") from None

    def _get(self, path: str, most: int, start: int | None = None) -> _Answer:
        """At most ``most`` bytes of a file, from ``start`` on where it is given. Tries again where that may help."""
        import httpx

        for attempt in range(1, ATTEMPTS + 1):
            wait: float | None = None
            try:
                answer = self._follow(hub_endpoint() + path, most, start)
                if isinstance(answer, _Answer):
                    return answer
                why, wait = answer
            except httpx.TransportError as e:
                why = str(e) or type(e).__name__
                if "CERTIFICATE_VERIFY_FAILED" in why:
                    raise self._unreachable(f"its certificate is not trusted here: {why}") from e
            if attempt < ATTEMPTS:
                time.sleep(min(LONGEST_WAIT, wait if wait is not None else 2.0 ** (attempt - 1)))
        raise self._unreachable(why)

    def _follow(self, url: str, most: int, start: int | None) -> _Answer | tuple[str, float | None]:
        """The answer behind all redirects; or why there is none now, and how long the server asks to wait."""
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
                        return f"it says {response.status_code}: {_words(response)}", _retry_after(response)
                    if response.status_code not in (200, 206):
                        raise self._refused(response)
                    return _read(response, most, start)
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


def _read(response: Any, most: int, start: int | None) -> _Answer | tuple[str, float | None]:
    """As many bytes of the body as were asked for; a server that does not know ranges is stopped in time."""
    skip, total = start or 0, _number(response.headers.get("content-length", ""))
    if response.status_code == 206:
        begins, total = _content_range(response.headers.get("content-range", ""))
        if start is None or begins != start:
            return "it sent another part than the one asked for", None
        skip = 0
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= skip + most:
            break
    return _Answer(bytes(body[skip : skip + most]), total)


def read_hub(repo: str, revision: str = "", *, cache: Path | None = None, token: str = "", field: str = "") -> Model:
    """The model ``org/name`` at a commit, branch or tag (``main`` when empty).

    ``token`` is the user's hub token. ``cache`` is a folder for what was read. Raises `UserError` (not found, gated, not a model
    that kaito can use: with the reason) and `Failure` (the hub does not answer)."""
    hub = _Hub(repo, hub_token(token, field), field)
    hub.label = f"{repo}@{revision}" if revision else repo
    try:
        if COMMIT.match(revision) and (known := _remembered(cache, repo, revision)):
            return _model(known, repo, revision, field)
        about = hub.about(revision or "main")
        commit = about.get("sha")
        if not isinstance(commit, str) or not COMMIT.match(commit):
            raise Refused("the hub does not say at which commit it is", "is HF_ENDPOINT a hub?")
        hub.label = _label(repo, commit)
        known = _remembered(cache, repo, commit)
        if known is None:
            known = _fetched(hub, about, commit)
            _remember(cache, repo, commit, known)
        return _model(known, repo, commit, field)
    except Refused as e:
        raise refusal(hub.label, e, field) from None
    except BadHeader as e:
        remedy = "its publisher has to mend it; choose another revision"
        raise UserError(Problem(f"{hub.label}: the weights cannot be read: {e}", remedy, field)) from None


def _fetched(hub: _Hub, about: Mapping[str, Any], commit: str) -> Raw:
    listed = about.get("siblings")
    names = {
        s["rfilename"]
        for s in (listed if isinstance(listed, list) else ())
        if isinstance(s, Mapping) and isinstance(s.get("rfilename"), str)
    }
    needed(names)
    texts = {CONFIG: hub.text(commit, CONFIG)}
    config = json_object(CONFIG, texts[CONFIG])
    class_of(config)  # nothing else is asked for of a model that is refused anyway
    texts |= {name: hub.text(commit, name) for name in TEXTS if name in names and name != CONFIG}
    files = weight_files(names, json_object(INDEX, texts[INDEX]) if INDEX in texts else None)
    generation, tokenizer = (
        json_object(n, texts[n]) if n in texts else {} for n in ("generation_config.json", "tokenizer_config.json")
    )
    if unnamed(tokenizer, stop_ids(generation, config)):
        texts[TOKENIZER] = reduced_tokenizer(hub.text(commit, TOKENIZER))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        headers = dict(zip(files, pool.map(lambda name: hub.header(commit, name), files), strict=True))
    card, tags = about.get("cardData"), about.get("tags")
    licence = licence_of(card if isinstance(card, Mapping) else {}, tags if isinstance(tags, list) else ())
    return Raw(texts, headers, licence, gated=about.get("gated") not in (None, False))


def _model(raw: Raw, repo: str, commit: str, field: str) -> Model:
    return model_of(raw, ModelSource(hub=repo, revision=commit), _label(repo, commit), name=repo, field=field)


def _label(repo: str, commit: str) -> str:
    return f"{repo}@{commit[:12]}"


def _place(cache: Path, repo: str, commit: str) -> Path:
    return cache / f"{repo.lower().replace('/', '--')}@{commit}.json"


def _remembered(cache: Path | None, repo: str, commit: str) -> Raw | None:
    """What was read of this commit before; None when nothing was, or when the file is damaged."""
    if cache is None:
        return None
    with suppress(OSError, ValueError, RecursionError):
        return Raw.from_json(_place(cache, repo, commit).read_text(encoding="utf-8"))
    return None


def _remember(cache: Path | None, repo: str, commit: str, raw: Raw) -> None:
    """A cache that cannot be written costs time and nothing else."""
    if cache is None:
        return
    place = _place(cache, repo, commit)
    with suppress(OSError, UnicodeEncodeError):
        cache.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f"{place.name}.{os.getpid()}")
        beside.write_text(raw.to_json(), encoding="utf-8")
        beside.replace(place)
