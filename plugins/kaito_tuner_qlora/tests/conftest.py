"""A real model of the Phi-3 architecture, tiny and random, with a real tokenizer, and a job that tunes it on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kaito_core.data.prepared import write_examples
from kaito_core.data.tokens import Example
from kaito_core.plugins.types import Architecture, ChatFormat, Configuration, ModelSource, Preset
from kaito_core.workloads.job import DataInput, Folders, TuningJob

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 128, 2, 4, 2
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
ANIMALS = ["fox", "owl", "cat", "dog", "cow", "hen", "pig", "rat", "bee", "ant"]
SOUNDS = ["yips", "hoots", "meows", "barks", "moos", "clucks", "oinks", "squeaks", "buzzes", "marches"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: config.json, model.safetensors, tokenizer.json."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("weights")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(
        [f"What does the {a} say? The {a} {s}." for a, s in zip(ANIMALS, SOUNDS, strict=True)], trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=512, sliding_window=24, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def example(tokenizer: Any, question: str, answer: str) -> Example:
    """One exchange, of which the answer and its end are learned."""
    asked = tokenizer.encode(f"<|user|>\n{question}<|end|>\n<|assistant|>\n").ids
    told = tokenizer.encode(f"{answer}<|end|>").ids
    return Example([*asked, *told], [False] * len(asked) + [True] * len(told))


@pytest.fixture(scope="session")
def examples(weights: Path) -> list[Example]:
    """Forty exchanges of different lengths about what animals say."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    pairs = list(zip(ANIMALS, SOUNDS, strict=True))
    return [
        example(tokenizer, f"What does the {a} say{' today' * n}?", " ".join([f"The {a} {s}."] * (1 + n)))
        for n in range(4)
        for a, s in pairs
    ]


PRESET = Preset(
    name="tiny-phi",
    source=ModelSource(hub="example/tiny-phi", revision="0123456789abcdef"),
    licence="MIT",
    architecture=Architecture(
        "Phi3ForCausalLM", 130_000, LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HIDDEN // HEADS, 512, 512,
        {"qkv_proj": (HIDDEN, HIDDEN * 2), "o_proj": (HIDDEN, HIDDEN), "gate_up_proj": (HIDDEN, 2 * INTERMEDIATE),
         "down_proj": (INTERMEDIATE, HIDDEN)},
        sliding_window=24,
    ),
    chat=ChatFormat(TEMPLATE, ("<|end|>", "<|endoftext|>")),
    lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
)  # fmt: skip


def tiny_job(
    method: str = "qlora",
    micro_batch: int = 2,
    accumulation: int = 1,
    processes: int = 1,
    **sections: Mapping[str, Any],
) -> TuningJob:
    """A job on the CPU with rows of 128 tokens; ``sections`` override the test's own configuration."""
    from kaito_tuner_qlora import config

    base = {
        "TrainingArguments": {
            "max_length": 128,
            "learning_rate": 5e-3,
            "max_steps": 12,
            "optim": "adamw_torch",
            "eval_steps": 6,
        },
        "LoraConfig": {"r": 8},
    }
    user = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return TuningJob(
        name="animals",
        namespace="default",
        preset=PRESET,
        method=method,
        config=config.resolve(PRESET, method, user),
        configuration=Configuration("cpu", "float32", micro_batch, accumulation, 128, processes),
        data=DataInput(urls=("file:///nowhere",)),
        data_digest="sha256:1234",
    )


@pytest.fixture(scope="session")
def make_job() -> Callable[..., TuningJob]:
    return tiny_job


@dataclasses.dataclass
class Run:
    """A job's folders, and its stages as processes."""

    folders: Folders
    job: TuningJob

    def environment(self, key: str = "key") -> dict[str, str]:
        path = self.folders.results / "job.json"
        path.write_text(self.job.to_json())
        return {**os.environ, "KAITO_JOB": str(path), "KAITO_TRAIN_KEY": key, "KAITO_DATA": str(self.folders.data),
                "KAITO_WEIGHTS": str(self.folders.weights), "KAITO_RESULTS": str(self.folders.results),
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}  # fmt: skip

    def start(self, stage: str = "train", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kaito_tuner_qlora", stage], env={**self.environment(), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        from kaito_core.progress import FILE_NAME, read

        return [e for _, e in read(self.folders.results / FILE_NAME) if not kinds or e["event"] in kinds]


@pytest.fixture
def make_run(tmp_path: Path, weights: Path, examples: list[Example]) -> Any:
    """``make_run(job)``: a run with prepared data, 32 examples to train and 8 held out."""

    def make(job: TuningJob, name: str = "results") -> Run:
        results = tmp_path / name
        write_examples(results / "prepared/train.arrow", examples[:32], {})
        write_examples(results / "prepared/eval.arrow", examples[32:], {})
        return Run(Folders(tmp_path, weights, results), job)

    return make
