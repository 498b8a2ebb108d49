"""A small model's files, and a hub that speaks the Hugging Face hub's wire form over real HTTP."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from kaito_core.models import hub as reader

COMMIT = "0a67737cc96d2554230f90338b163bc6380a2a85"
REPO = "me/Tiny-Llama"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1, "F8_E4M3": 1}


def weights(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> bytes:
    """A safetensors file of these tensors, all zero."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = WIDTH[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def llama(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """The tensors that belong to `CONFIG`."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128, 64)}
    for n in range(layers):
        at = f"model.layers.{n}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (128, 64),
            f"{at}.self_attn.k_proj.weight": (64, 64),
            f"{at}.self_attn.v_proj.weight": (64, 64),
            f"{at}.self_attn.o_proj.weight": (64, 128),
            f"{at}.mlp.gate_proj.weight": (96, 64),
            f"{at}.mlp.up_proj.weight": (96, 64),
            f"{at}.mlp.down_proj.weight": (64, 96),
            f"{at}.input_layernorm.weight": (64,),
            f"{at}.post_attention_layernorm.weight": (64,),
        }
    return {**shapes, "model.norm.weight": (64,), "lm_head.weight": (128, 64)}


def model_files(**config: Any) -> dict[str, bytes]:
    """A complete model by file name; keywords change its config.json."""
    tokenizer_config = {
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
        "added_tokens_decoder": {"2": {"content": "</s>"}},
    }
    return {
        "config.json": json.dumps({**CONFIG, **config}).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config).encode(),
        "tokenizer.json": json.dumps({"added_tokens": [{"id": 2, "content": "</s>"}]}).encode(),
        "model.safetensors": weights(llama()),
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (folder / name).write_bytes(body)
    return folder


@dataclass
class Hub:
    """Models by name at one commit, and how the hub behaves."""

    url: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: str = ""
    """``auto`` or ``manual``: files are given out to `token` alone."""
    token: str = "hf_right"
    ranges: bool = True
    cdn: str = ""
    """Where weights are redirected to, as the hub does with large files."""
    busy: int = 0
    """Requests that are answered with 503 first."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def asked(self, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path has this in it."""
        return [headers for path, headers in self.requests if part in path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub(models={REPO: model_files()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            state.requests.append((path, {k.lower(): v for k, v in self.headers.items()}))
            if state.busy:
                state.busy -= 1
                return self.refuse(503, "", "Service Unavailable", {"Retry-After": "0"})
            if path.startswith("/cdn/"):
                _, _, org, name, file = path.split("/")
                return self.send(state.models[f"{org}/{name}"][file])
            about = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = about or file
            repo = found[1] if found else ""
            if found is None or repo not in state.models:
                code = 404 if self.headers.get("Authorization") else 401
                return self.refuse(code, "RepoNotFound", "Repository not found")
            if found[2] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {found[2]}")
            files = state.models[repo]
            if about:
                return self.json({
                    "id": repo, "sha": COMMIT, "gated": state.gated or False, "tags": ["license:apache-2.0"],
                    "cardData": {"license": "apache-2.0"}, "siblings": [{"rfilename": n} for n in files],
                })  # fmt: skip
            if state.gated and self.headers.get("Authorization") != f"Bearer {state.token}":
                code = 403 if self.headers.get("Authorization") else 401
                return self.refuse(code, "GatedRepo", f"Access to model {repo} is restricted")
            if found[3] not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            if state.cdn and found[3].endswith(".safetensors"):
                return self.answer(302, b"", {"Location": f"{state.cdn}/cdn/{repo}/{found[3]}"})
            return self.send(files[found[3]])

        def send(self, body: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if state.ranges else None
            if wanted is None:
                return self.answer(200, body, {})
            start, end = int(wanted[1]), min(int(wanted[2]), len(body) - 1)
            self.answer(206, body[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(body)}"})

        def json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str, words: str, more: dict[str, str] | None = None) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": words} if code else {}
            self.answer(status, json.dumps({"error": words}).encode(), {**headers, **(more or {})})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are the point
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setattr(reader, "LONGEST_WAIT", 0.01)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield state
    httpd.shutdown()
    httpd.server_close()
