"""The base model, loaded and quantised, and the adapter on it.

peft's ``prepare_model_for_kbit_training`` is not used: it casts embeddings, output head and norms to fp32, which doubles the
unquantised part and makes the hidden states fp32 too (bitsandbytes issue 1569 has it need more memory than 16-bit LoRA).
Only what is trained, the adapter, is fp32 here. Code from a model repository is never run, weights are safetensors only.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from kaito_core.problems import Failure, UserError
from kaito_tuner_qlora import attention, loss, sections
from kaito_tuner_qlora.batches import Batch, Example, batch
from kaito_tuner_qlora.lora import fuse

try:
    _libc = ctypes.CDLL("libc.so.6")
    _libc.malloc_trim  # noqa: B018 (an attribute of glibc only)
except (OSError, AttributeError):
    _libc = None


def device_of(device: str) -> torch.device:
    """The device of this process: the GPU of its local rank, or the CPU."""
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Failure("the plan wants a GPU and PyTorch sees none",
                      "check the driver and that PyTorch was built for it: python -m torch.utils.collect_env")  # fmt: skip
    device_id = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device_id)
    return device_id


def quantization(config: sections.QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration, computing in ``dtype``; None when nothing is quantised."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    fields = config.model_dump(exclude={"quant_method"})
    return BitsAndBytesConfig(**{**fields, "bnb_4bit_compute_dtype": dtype})


def load_base(folder: Path, config: sections.TrainingConfig, device: torch.device, dtype_name: str) -> Any:
    """The model in ``folder``, frozen, in evaluation mode.

    Raises `Failure` with the library's own words when the files are not a whole model of an architecture that transformers
    knows; weights that are missing or of another shape are never filled in at random."""
    dtype = getattr(torch, dtype_name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=_attention(config.model.attn_implementation, device),
            quantization_config=quantization(config.quantization, dtype),
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as e:
        raise Failure(f"the model does not fit into the memory of the GPU: {_first_line(e)}",
                      "use qlora (4 bit), or a GPU with more memory: `kaito plan` shows which") from e  # fmt: skip
    except Exception as e:  # whatever a library says about files that it cannot read
        raise Failure(f"the model in {folder} cannot be loaded: {_first_line(e)}",
                      "fetch it again, and check that the preset's architecture is one that transformers "
                      f"{transformers.__version__} knows") from e  # fmt: skip
    wrong = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if wrong:
        raise Failure(f"the weights in {folder} do not belong to its config.json: {len(wrong)} are missing or of another shape, "
                      f"such as {wrong[0]}", "fetch the model again")  # fmt: skip
    model.requires_grad_(False)
    model.config.use_cache = False
    _as_it_was_quantised(model)
    return model


def _as_it_was_quantised(model: Any) -> None:
    """Keep bitsandbytes from packing the weights anew on processors with AVX-512 bfloat16, as it does at the first forward pass
    without gradients: that path is for serving. It computes in bfloat16 whatever was asked for, and the losses before and after
    a training, and those of two machines, could no longer be compared."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _attention(asked: str, device: torch.device) -> str:
    if asked != "auto":
        return asked
    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else attention.NAME


def _first_line(e: BaseException) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)


def add_adapter(model: Any, config: sections.LoraConfig, base_name: str, seed: int) -> PeftModel:
    """A new adapter, fp32, on every targeted module. ``base_name`` is what adapter_config.json will call the base model."""
    torch.manual_seed(seed)  # the start of A is part of the result
    try:
        lora = LoraConfig(task_type="CAUSAL_LM", **config.model_dump())
        model.name_or_path = base_name
        adapted = get_peft_model(model, lora)
    except (TypeError, ValueError) as e:
        raise UserError(f"peft refuses the adapter: {_first_line(e)}", "change LoraConfig", field="LoraConfig") from e
    fuse(adapted)
    return adapted


def hidden_states(model: Any, b: Batch) -> torch.Tensor:
    """The last hidden states [1, T, h] of a batch, before the output head."""
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = getattr(lm, lm.base_model_prefix)
    device = lm.get_input_embeddings().weight.device
    # The loop over examples reads the bounds on the CPU; flash-attention's kernel wants them on the GPU.
    bounds = b.bounds if lm.config._attn_implementation == attention.NAME else b.bounds.to(device)
    out = decoder(
        input_ids=b.input_ids.to(device), position_ids=b.position_ids.to(device), use_cache=False,
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=b.longest, max_length_k=b.longest,
    )  # fmt: skip
    states: torch.Tensor = out.last_hidden_state
    return states


def batch_loss(model: Any, b: Batch) -> torch.Tensor:
    """The sum of the loss over the batch's trained tokens, in nats."""
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = hidden_states(model, b)
    if hidden.device.type == "cpu":
        free(hidden.device)
    return loss.summed_cross_entropy(hidden, lm.get_output_embeddings(), b.labels.to(hidden.device))


@torch.no_grad()
def check_packing(model: Any, examples: list[Example]) -> None:
    """Proves on two short examples that packing and chunked loss compute what the model itself computes.

    Some architectures scale or cap their logits after the head or attend in ways of their own; training those with the wrong
    loss would go unnoticed. Raises `Failure`."""
    lm = model.get_base_model() if isinstance(model, PeftModel) else model
    two = [Example(e.input_ids[:24], e.trained[:24] | True) for e in examples[:2]]
    training, ours = lm.training, lm.config._attn_implementation
    lm.eval()
    packed = float(batch_loss(model, batch(two)))
    lm.set_attn_implementation("sdpa")
    plain = 0.0
    for e in two:
        ids = torch.from_numpy(e.input_ids.astype("int64"))[None].to(lm.get_input_embeddings().weight.device)
        logits = lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
        plain += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    lm.set_attn_implementation(ours)
    lm.train(training)
    tokens = sum(e.loss_tokens for e in two)
    if abs(packed - plain) > max(0.02 * plain, 0.05 * tokens * (torch.finfo(lm.dtype).bits < 32), 1e-4 * tokens):
        raise Failure(f"packed rows give another loss ({packed / tokens:.4f}) than this model does by itself ({plain / tokens:.4f})",
                      "this architecture is not supported; please report it with the model's config.json")  # fmt: skip


def checkpoint_activations(model: Any) -> None:
    """Keeps only the layers' inputs and computes the rest again in the backward pass."""
    # Renamed in transformers 5.2x; the old name is gone in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def recompute(model: Any, on: bool) -> None:
    """Whether the next forward pass keeps only the layers' inputs, after `checkpoint_activations` has prepared for it."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


def free(device: torch.device) -> None:
    """Gives memory that is cached and no longer used back: to the GPU, or from glibc to the system.

    glibc keeps freed activations for reuse but often cannot reuse them (aligned blocks, before glibc 2.38), so that the peak
    of a training on the CPU would be that of two phases together; this costs milliseconds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif _libc is not None:
        _libc.malloc_trim(0)


def quiet() -> None:
    """Keeps the libraries' progress bars and notes to their own developers out of the log."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning)


def parameters(model: Any) -> Mapping[str, int]:
    """How many parameters there are and how many are trained."""
    trained, total = (
        model.get_nb_trainable_parameters() if isinstance(model, PeftModel) else (0, model.num_parameters())
    )
    return {"trained": int(trained), "total": int(total)}


def memory_peak(device: torch.device) -> int:
    """Most bytes that were in use at once: of the GPU by tensors, or of RAM by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory(e: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's own, or the CPU allocator's words."""
    text = str(e).lower()
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or (
        isinstance(e, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )
