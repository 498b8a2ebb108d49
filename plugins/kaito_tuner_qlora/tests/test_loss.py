"""What packed, chunked training computes is what the model itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kaito_core.problems import Failure
from kaito_tuner_qlora import batches, config, loss
from kaito_tuner_qlora import model as models
from kaito_tuner_qlora.batches import Example


@pytest.fixture(scope="module")
def base(make_job: Any, weights: Path) -> torch.nn.Module:
    return models.load_base(weights, config.read(make_job().config), torch.device("cpu"), "float32")


@pytest.fixture(scope="module")
def data(examples: list) -> list[Example]:
    return [Example(np.array(e.input_ids, dtype=np.int32), np.array(e.trained)) for e in examples]


def plain_loss(base: torch.nn.Module, e: Example) -> float:
    """One example alone, with transformers' own attention, logits and cross entropy."""
    base.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = base(input_ids=torch.from_numpy(e.input_ids.astype("int64"))[None], use_cache=False).logits[0, :-1]
    base.set_attn_implementation("kaito_packed")
    labels = torch.from_numpy(e.input_ids[1:].astype("int64"))[torch.from_numpy(e.trained[1:])]
    return float(torch.nn.functional.cross_entropy(logits[torch.from_numpy(e.trained[1:])], labels, reduction="sum"))


def test_packed_examples_do_not_see_each_other(base: torch.nn.Module, data: list[Example]) -> None:
    """The hidden states of an example in a packed row are those of the example alone; so too beyond the sliding window."""
    assert max(len(e.input_ids) for e in data) > base.config.sliding_window
    packed = models.hidden_states(base, batches.batch(data[28:34]))[0]
    base.set_attn_implementation("sdpa")
    start = 0
    for e in data[28:34]:
        ids = torch.from_numpy(e.input_ids.astype("int64"))[None]
        alone = base.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-4, atol=1e-4)
        start += len(alone)
    base.set_attn_implementation("kaito_packed")
    assert start == len(packed)


def test_only_answers_carry_loss(base: torch.nn.Module, data: list[Example]) -> None:
    """The loss of a packed row is the sum of the examples' own, over their answers and the tokens that end them."""
    packed = float(models.batch_loss(base, batches.batch(data[:8])))
    assert packed == pytest.approx(sum(plain_loss(base, e) for e in data[:8]), rel=1e-4)
    labels = batches.batch(data[:1]).labels[0]
    assert (labels != loss.IGNORED).sum() == data[0].trained.sum()
    assert labels[labels != loss.IGNORED][-1] == 3  # <|end|>


def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    labels = torch.randint(0, 50, (1, 100))
    labels[0, ::3] = loss.IGNORED
    hidden = torch.randn(1, 100, 16, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(head(hidden)[0], labels[0], ignore_index=loss.IGNORED, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected / 7, hidden)
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 20 * 50 * 4})
    ours = loss.summed_cross_entropy(hidden, head, labels)
    (grad,) = torch.autograd.grad(ours / 7, hidden)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_an_architecture_with_other_logits_is_refused(base: torch.nn.Module, data: list[Example]) -> None:
    """A model that scales its logits after the head would silently be trained with the wrong loss."""
    models.check_packing(base, data[:2])
    handle = base.register_forward_hook(lambda module, arguments, out: setattr(out, "logits", out.logits / 3))
    try:
        with pytest.raises(Failure, match="another loss"):
            models.check_packing(base, data[:2])
    finally:
        handle.remove()


def test_weights_that_do_not_fit_are_never_made_up(make_job: Any, weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure, match="1 are missing"):
        models.load_base(tmp_path, config.read(make_job().config), torch.device("cpu"), "float32")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(Failure, match="cannot be loaded"):
        models.load_base(tmp_path, config.read(make_job().config), torch.device("cpu"), "float32")


def test_the_base_is_quantised_and_nothing_else_is_made_wider(base: torch.nn.Module) -> None:
    """Four bits for the linear modules of the layers; the rest keeps the precision it was loaded with."""
    kinds = {name: type(module).__name__ for name, module in base.named_modules()}
    assert kinds["model.layers.0.mlp.down_proj"] == "Linear4bit"
    assert kinds["lm_head"] == "Linear"
    assert not any(p.requires_grad for p in base.parameters())


def test_rows_are_read_and_cut(tmp_path: Path, examples: list) -> None:
    from kaito_core.data.prepared import write_examples

    write_examples(tmp_path / "x.arrow", examples, {})
    read = batches.read(tmp_path / "x.arrow", 128)
    assert [(e.input_ids.tolist(), e.trained.tolist()) for e in read] == [
        (list(e.input_ids), list(e.trained)) for e in examples
    ]
    asked = examples[0].trained.index(True)
    assert len(batches.read(tmp_path / "x.arrow", asked)) < len(examples)  # cut before anything is learned: left out
    short = batches.read(tmp_path / "x.arrow", asked + 1)
    assert short.lengths.max() == asked + 1
    assert all(n > 0 for n in short.loss_tokens)


def test_batches_keep_order_and_budget(data: list[Example]) -> None:
    groups = list(batches.batches(data, 200))
    assert [id(e) for g in groups for e in g] == [id(e) for e in data]
    assert all(len(g) == 1 or sum(len(e.input_ids) for e in g) <= 200 for g in groups)


def test_the_fused_adapter_computes_what_peft_computes(make_job: Any, weights: Path, data: list[Example]) -> None:
    """Loss and every gradient are those of peft's own layers, quantised or not, and with the adapter switched off."""
    for method in ("qlora", "lora"):
        job = make_job(method)
        settings = config.read(job.config)
        fused = models.add_adapter(
            models.load_base(weights, settings, torch.device("cpu"), "float32"), settings.lora, "x", 1
        )
        layers = [m for m in fused.modules() if "forward" in vars(m) and hasattr(m, "lora_A")]
        assert len(layers) == 8
        torch.manual_seed(0)
        for name, p in fused.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        found = []
        for _ in range(2):
            fused.zero_grad()
            total = models.batch_loss(fused, batches.batch(data[:4]))
            total.backward()
            with fused.disable_adapter(), torch.no_grad():
                bare = float(models.batch_loss(fused, batches.batch(data[:4])))
            grads = {n: p.grad.clone() for n, p in fused.named_parameters() if p.requires_grad}
            found.append((float(total.detach()), bare, grads))
            for layer in layers:
                vars(layer).pop("forward", None)  # peft's own from here on
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
        assert found[0][0] != pytest.approx(found[0][1], rel=1e-3)
        for name, grad in found[0][2].items():
            torch.testing.assert_close(grad, found[1][2][name], rtol=1e-3, atol=1e-4)
