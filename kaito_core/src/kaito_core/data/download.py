"""One file from one URL: streamed, resumed, checked, and never from where it should not come.

What a server can do wrong is expected: it drops the connection, is busy, sends too little, sends a web page in place of the
file, or redirects somewhere else. Each has its answer here; what cannot be mended is said in the server's own words.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit, urlunsplit

from kaito_core import __version__
from kaito_core.addresses import Resolve, guarded_transport, least_zone, resolve
from kaito_core.data.cache import BlobCache, Entry, Partial, digest_file
from kaito_core.data.sources import HUB, Source, hub_endpoint, redacted
from kaito_core.problems import Failure, Problem, UserError

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 6
"""Tries in a row that bring nothing new before we give up: about a minute with the back-off below."""
REDIRECTS = 10
LONGEST_WAIT = 60.0
TRIED_AGAIN = {408, 425, 429, *range(500, 600)} - {501, 505}

OnProgress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes so far and the bytes in all, if the server said how many."""


@dataclass(frozen=True)
class Policy:
    """What a download may do."""

    allow_private: bool
    max_bytes: int
    """Bytes that may still be downloaded."""
    token: str = field(default="", repr=False)
    """For the Hugging Face hub, and for nobody else."""
    on_progress: OnProgress | None = None
    resolver: Resolve = resolve

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", hub_token(self.token))


def hub_token(text: str | None, where: str = "") -> str:
    """The user's token as it can be sent: without the line break at its end that a file gives it; empty for none.

    Raises `UserError`, with the field ``where``, for anything that no token has: its words do not have the token in them, as those
    of the HTTP client would."""
    token = (text or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(
            "the hub's token has characters in it that no token has",
            "set HF_TOKEN again, to one line without spaces",
            field=where,
        )
    return token


class _Again(Exception):
    """The attempt failed in a way that may pass."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def download(source: Source, cache: BlobCache, policy: Policy, *, field: str = "") -> Entry:
    """Bring the content of ``source.url`` into ``cache``; nothing is transferred when the server says that it is unchanged.

    Raises `UserError` (not found, gated, too large, a web page, a forbidden address) and `Failure` (server or disk); what
    was downloaded stays and is gone on with next time.
    """
    with cache.partial(source.url) as partial:
        fruitless, best = 0, partial.size
        while True:
            try:
                return _attempt(source, cache, partial, policy, field)
            except _Again as e:
                fruitless = 1 if partial.size > best else fruitless + 1
                best = max(best, partial.size)
                if fruitless >= ATTEMPTS:
                    kept = (
                        f"; {partial.size} bytes are kept, and the same command goes on from there"
                        if partial.size
                        else ""
                    )
                    raise Failure(Problem(f"{source.shown}: {e} (tried {ATTEMPTS} times)",
                                          f"try again later, or look at the server{kept}", field)) from e  # fmt: skip
                time.sleep(min(LONGEST_WAIT, e.wait if e.wait is not None else 2.0 ** (fruitless - 1)))
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise _no_space(source, field) from e
                raise


def _attempt(source: Source, cache: BlobCache, partial: Partial, policy: Policy, field: str) -> Entry:
    import httpx

    known = cache.entry(source.url)
    # Compressed transfer would make lengths, ranges and digests speak of something else than the file.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"kaito/{__version__}"}
    if known and known.etag:
        headers["If-None-Match"] = known.etag
    elif known and known.last_modified:
        headers["If-Modified-Since"] = known.last_modified
    if partial.size and partial.validator:
        headers |= {"Range": f"bytes={partial.size}-", "If-Range": partial.validator}
    try:
        return _follow(source, headers, known, cache, partial, policy, field)
    except httpx.TransportError as e:
        if "CERTIFICATE_VERIFY_FAILED" in str(e):
            raise UserError(Problem(f"{source.shown}: the server's certificate is not trusted here: {e}",
                                    "name the authority's certificate with SSL_CERT_FILE", field)) from e  # fmt: skip
        raise _Again(str(e) or type(e).__name__) from e


def _follow(
    source: Source, headers: Mapping[str, str], known: Entry | None, cache: BlobCache, partial: Partial, policy: Policy,
    field: str,
) -> Entry:  # fmt: skip
    """Send the request, go where the server redirects, and take what it finally sends."""
    import httpx

    url, linked, only_hub = source.url, "", True
    for _ in range(REDIRECTS + 1):
        only_hub = only_hub and _is_hub(url)
        authorised = (
            {**headers, "Authorization": f"Bearer {policy.token}"} if policy.token and only_hub else dict(headers)
        )
        transport = guarded_transport(least_zone(allow_private=policy.allow_private), policy.resolver)
        with httpx.Client(transport=transport, timeout=httpx.Timeout(60, connect=15)) as client:
            try:
                response = client.send(client.build_request("GET", url, headers=authorised), stream=True)
            except UserError as e:
                raise _at(e, source, field) from None
            except (httpx.InvalidURL, UnicodeError) as e:
                raise UserError(Problem(f"{source.shown}: not a URL that can be asked for: {e}", field=field)) from e
            with closing(response):
                linked = linked or (_hex_digest(response.headers.get("x-linked-etag", "")) if _is_hub(url) else "")
                if linked and cache.has(linked):  # the hub names the content: it is here, under whichever URL it came
                    partial.discard()
                    entry = Entry(linked, cache.path(linked).stat().st_size)
                    cache.remember(source.url, entry)
                    return entry
                if response.status_code == 304 and known:
                    partial.discard()
                    return known
                if response.has_redirect_location:
                    url = _redirected(url, response.headers["location"], source, field)
                    continue
                return _take(response, linked, source, cache, partial, policy, field)
    raise UserError(
        Problem(f"{source.shown}: redirected more than {REDIRECTS} times", "use the URL of the file itself", field)
    )


def _take(
    response: httpx.Response,
    linked: str,
    source: Source,
    cache: BlobCache,
    partial: Partial,
    policy: Policy,
    field: str,
) -> Entry:
    """Write the body behind what is already here, check the whole, and make it a blob."""
    etag, modified = response.headers.get("etag", ""), response.headers.get("last-modified", "")
    length = _number(response.headers.get("content-length", ""))
    if response.status_code == 206:
        start, total = _content_range(response.headers.get("content-range", ""))
        if start != partial.size:
            partial.discard()
            raise _Again("the server sent another part than the one asked for")
    elif response.status_code == 200:
        partial.restart(etag if etag and not etag.startswith("W/") else modified)
        start, total = 0, length
    elif response.status_code == 416:
        partial.discard()
        raise _Again("the server no longer has the part asked for", wait=0)
    else:
        raise _refused(response, source, field)
    if total is not None and total > policy.max_bytes:
        raise _too_large(source, policy, field)
    if (total or 0) - start > shutil.disk_usage(partial.path.parent).free:
        raise _no_space(source, field)
    page = "text/html" in response.headers.get("content-type", "").lower()
    with partial.path.open("ab") as f:
        for chunk in response.iter_raw():
            if not start and (
                page or re.match(rb"\s*(<!doctype html|<html)", chunk[:200].removeprefix(b"\xef\xbb\xbf"), re.I)
            ):
                partial.discard()
                raise _web_page(chunk, source, field)
            f.write(chunk)
            start += len(chunk)
            if start > policy.max_bytes:
                raise _too_large(source, policy, field)
            if policy.on_progress:
                policy.on_progress(source.name, start, total)
    if total is not None and start != total:
        if start > total:
            partial.discard()
        raise _Again(f"the server promised {total} bytes and sent {start}")
    if not start:
        partial.discard()
        raise UserError(Problem(f"{source.shown}: the server sent an empty file", "check the URL", field))
    digest = digest_file(partial.path)
    promised = _promised(response.headers, linked, whole=response.status_code == 200)
    for algorithm, expected in promised.items():
        found = digest if algorithm == "sha256" else digest_file(partial.path, algorithm)
        if found != expected:
            partial.discard()
            raise _Again(
                f"the file arrived damaged: the server gives its {algorithm} as {expected}, what came has {found}"
            )
    cache.adopt(partial, digest)
    entry = Entry(digest, start, etag, modified)
    cache.remember(source.url, entry)
    return entry


def _is_hub(url: str) -> bool:
    """Whether the URL is the hub's own, so that the hub's token may go there: never in the clear, but to ``$HF_ENDPOINT``."""
    origin = urlunsplit((*urlsplit(url.lower())[:2], "", "", ""))
    return origin in (HUB, urlunsplit((*urlsplit(hub_endpoint().lower())[:2], "", "", "")))


def _redirected(url: str, location: str, source: Source, field: str) -> str:
    target = urlsplit(urljoin(url, location))
    if target.scheme not in ("http", "https") or (urlsplit(url).scheme == "https" and target.scheme == "http"):
        raise UserError(Problem(f"{source.shown}: the server redirects to {redacted(target.geturl())}, which is not safe",
                                "use the URL of the file itself", field))  # fmt: skip
    return urlunsplit((target.scheme, target.netloc.rpartition("@")[2], target.path, target.query, ""))


def _refused(response: httpx.Response, source: Source, field: str) -> Exception:
    """The error for an answer that is not the file, in the server's words."""
    status = f"{response.status_code} {response.reason_phrase}".strip()
    words = _words(response)
    said = f"{source.shown}: the server says {status}" + (f": {words}" if words else "")
    if response.status_code in TRIED_AGAIN:
        return _Again(f"the server says {status}" + (f": {words}" if words else ""), _retry_after(response))
    if response.status_code in (401, 403):
        hub = _is_hub(source.url)
        remedy = (
            "the data is private or gated: accept its terms on the hub, and set HF_TOKEN to a token that may read it"
            if hub else "the URL needs credentials, or its signature has expired: make a new one"
        )  # fmt: skip
        return UserError(Problem(said, remedy, field))
    if response.status_code in (404, 410):
        return UserError(Problem(said, "check the URL; it must name the file itself", field))
    return UserError(Problem(said, "check the URL with `curl -I`", field))


def _words(response: httpx.Response) -> str:
    """What a server says about its refusal: the hub's header, else the readable part of the body; one safe line."""
    words = response.headers.get("x-error-message", "")
    if not words:
        body = b""
        try:
            for chunk in response.iter_bytes(4096):
                body += chunk
                if len(body) >= 8192:
                    break
        except Exception:
            body = b""
        text = body.decode("utf-8", "replace")
        found = re.search(r'"(?:message|error|detail)"\s*:\s*"([^"]+)"|<(?:Message|title)>([^<]+)<', text, re.I)
        words = next((g for g in found.groups() if g), "") if found else re.sub(r"<[^>]*>", " ", text)
    return _one_line(words)


def _one_line(text: str) -> str:
    """Printable and short: a server's words go to a terminal."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:300]


def _web_page(chunk: bytes, source: Source, field: str) -> UserError:
    title = re.search(rb"<title[^>]*>(.*?)</title>", chunk, re.I | re.S)
    about = f": “{_one_line(title.group(1).decode('utf-8', 'replace'))}”" if title else ""
    remedy = "use the URL of the file itself; a login page means that the data is not public"
    if "/blob/" in source.url:
        remedy = "use the file's own URL: on Hugging Face write /resolve/ for /blob/, on GitHub /raw/ for /blob/"
    return UserError(Problem(f"{source.shown}: the server sent a web page, not data{about}", remedy, field))


def _too_large(source: Source, policy: Policy, field: str) -> UserError:
    return UserError(Problem(f"{source.shown}: the download is larger than what may still be downloaded "
                             f"({policy.max_bytes} bytes)",
                             "use less data, or allow more with KAITO_MAX_DOWNLOAD_BYTES", field))  # fmt: skip


def _no_space(source: Source, field: str) -> Failure:
    return Failure(Problem(f"no disk space for {source.shown}",
                           "free some space and run the same command again: what was downloaded is kept", field))  # fmt: skip


def _at(error: UserError, source: Source, field: str) -> UserError:
    return UserError([Problem(f"{source.shown}: {p.message}", p.remedy, field) for p in error.problems])


def _promised(headers: Mapping[str, str], linked: str, *, whole: bool) -> dict[str, str]:
    """Digests of the whole file that the server gives, in hex: the hub's, ``Repr-Digest`` (RFC 9530), ``Digest``
    (RFC 3230), ``Content-MD5`` (RFC 1864; of what was sent, so only without a range)."""
    found = {"sha256": linked} if linked else {}
    given = f"{headers.get('repr-digest', '')},{headers.get('digest', '')}"
    for encoded in re.findall(r"sha-256=:?([A-Za-z0-9+/]{43}=)", given, re.I):
        found.setdefault("sha256", base64.b64decode(encoded).hex())
    md5 = headers.get("content-md5", "").strip()
    if whole and re.fullmatch(r"[A-Za-z0-9+/]{22}==", md5):
        found["md5"] = base64.b64decode(md5).hex()
    return found


def _hex_digest(etag: str) -> str:
    bare = etag.removeprefix("W/").strip('"').lower()
    return bare if re.fullmatch(r"[0-9a-f]{64}", bare) else ""


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _content_range(text: str) -> tuple[int, int | None]:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text.strip())
    return (int(found[1]), _number(found[2])) if found else (-1, None)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait as the server asks for them, as a number or a date; None when it does not."""
    text = response.headers.get("retry-after", "")
    if not text or text.isdigit():
        return _number(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def max_download_bytes() -> int:
    """``$KAITO_MAX_DOWNLOAD_BYTES``, else 50 GiB."""
    text = os.environ.get("KAITO_MAX_DOWNLOAD_BYTES", "").strip()
    if text and _number(text) is None:
        raise UserError(f"KAITO_MAX_DOWNLOAD_BYTES is {text!r}", "give a number of bytes")
    return int(text) if text else 50 << 30
