"""A tiny model folder with a real tokenizer of Phi-3's build, and a real HTTP server that misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kaito_core.plugins.types import Architecture, ChatFormat, ModelSource, Preset

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Phi-3's form, with marks around what the assistant says."""
UNMARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
"""As the hub has it: no marks, and an end-of-text token behind the whole."""
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
CORPUS = [
    "What is a workspace? A workspace names a model and says what to do with it.",
    "Which GPU does the job need? The plan says which GPU fits and what it costs.",
    "How long does the training take? The answer depends on the data and on the machine.",
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL[:3] + bytes_, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, rstrip=t != "<|endoftext|>", special=True) for t in SPECIAL[3:]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("model")
    tokenizer.enable_truncation(4)  # a file may carry its author's settings; they must not apply
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def a_preset(
    template: str = MARKED, stop: tuple[str, ...] = ("<|end|>", "<|endoftext|>"), context: int = 4096
) -> Preset:
    shape = Architecture("Phi3ForCausalLM", 1000, 1, 8, 16, 1, 1, 8, 600, context, {"qkv_proj": (8, 24)})
    return Preset(
        "tiny-phi3", ModelSource(package="kaito_core"), "mit", shape, ChatFormat(template, stop), ("qkv_proj",)
    )


@pytest.fixture
def preset() -> Preset:
    return a_preset()


@pytest.fixture
def preset_with() -> Callable[..., Preset]:
    return a_preset


@pytest.fixture
def unmarked() -> str:
    return UNMARKED


@dataclass
class Server:
    """Files by path, and what goes wrong with them. ``requests`` has (path, headers) of everything asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Answers (status, body) to give first, one a request; the last one stays when ``always``."""
    always: bool = False
    drop_after: dict[str, list[int]] = field(default_factory=dict)
    """Body bytes after which the connection is cut, one a request."""
    ranges: bool = True
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def asked(self, path: str) -> list[dict[str, str]]:
        return [headers for asked, headers in self.requests if asked == path]


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            state.requests.append((path, {k.lower(): v for k, v in self.headers.items()}))
            if path in state.redirects:
                return self.answer(302, b"", {"Location": state.redirects[path], **state.headers.get(path, {})})
            if state.statuses.get(path):
                queue = state.statuses[path]
                status, words = queue[0] if state.always else queue.pop(0)
                return self.answer(status, words.encode(), state.headers.get(path, {}))
            if path not in state.files:
                return self.answer(404, b"no such thing here", {})
            body = state.files[path]
            etag = '"' + hashlib.md5(body).hexdigest() + '"'
            headers = {"ETag": etag, **state.headers.get(path, {})}
            if self.headers.get("If-None-Match") == etag:
                return self.answer(304, b"", headers)
            start, status = 0, 200
            if state.ranges and "Range" in self.headers and self.headers.get("If-Range", etag) == etag:
                start, status = int(self.headers["Range"][6:].rstrip("-")), 206
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(
                status, body[start:], headers, cut=state.drop_after[path].pop(0) if state.drop_after.get(path) else None
            )

        def answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are the point
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
