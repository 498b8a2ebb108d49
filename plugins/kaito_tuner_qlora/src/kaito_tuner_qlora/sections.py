"""The six sections of KAITO's ``training_config``, field by field: what we understand, with our default and its reason.

The names are those of KAITO, transformers, peft and TRL, so that ConfigMaps written for KAITO are read unchanged. A section
allows more fields than it lists: `kaito_tuner_qlora.config` decides which of those are passed on, ignored or refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kaito_core.planning.config_files import is_template

Dtype = Literal["bfloat16", "float16", "float32"]

RANK_STABILISED_ALPHA = 16
"""Alpha with which alpha/sqrt(r) is 4 for r 16 and learning is as strong at other ranks (arXiv 2312.03732)."""


def _without_torch(value: Any) -> Any:
    """``torch.bfloat16`` and ``bf16`` are how people write it too."""
    if not isinstance(value, str):
        return value
    short = value.removeprefix("torch.").lower()
    return {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}.get(
        short, short
    )


def _template(text: str) -> str:
    """Planning has put the text of a file of the ConfigMap in the place of its name: no other file is read."""
    if text and not is_template(text):
        raise ValueError("neither a template nor a file of the ConfigMap: write the template itself")
    return text


def _no(value: Any) -> Any:
    """YAML reads a bare ``no`` as false."""
    return "no" if value is False else value


DtypeField = Annotated[Dtype, BeforeValidator(_without_torch)]
Often = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A section keeps what it does not know, as it is."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ModelConfig(Section):
    """How the base model is loaded. Which model it is, the preset says."""

    torch_dtype: DtypeField | None = Field(
        None,
        description="Precision to compute in. Default: the precision of the published weights. The machine has the last "
        "word: float16 on GPUs without bfloat16, float32 on CPUs.",
    )
    attn_implementation: Literal["auto", "kaito_packed", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        "auto",
        description="Attention kernel. Default auto: flash_attention_2 where it is installed, else PyTorch's own kernel "
        "called once per packed example, which needs no mask.",
    )
    chat_template: Annotated[str, AfterValidator(_template)] | None = Field(
        None,
        description="A Jinja chat template, or the name of a file of the same ConfigMap with one, in place of the preset's own.",
    )
    local_files_only: bool = Field(
        True, description="Always true: the weights were fetched before the training starts."
    )
    device_map: Any = Field(
        "auto", description="Accepted for KAITO's sake; every process uses the one device it is given."
    )


class QuantizationConfig(Section):
    """How the frozen base model is compressed (transformers.BitsAndBytesConfig). Exactly one width for qlora, none for lora."""

    quant_method: Literal["bitsandbytes"] = Field(
        "bitsandbytes", description="The only method that can be trained over here."
    )
    load_in_4bit: bool = Field(False, description="4-bit weights: about 0.52 byte per weight. Default for qlora: true.")
    load_in_8bit: bool = Field(False, description="8-bit weights (LLM.int8): about 1 byte per weight.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="nf4 fits normally distributed weights better than fp4 (arXiv 2305.14314, section 3)."
    )
    bnb_4bit_compute_dtype: DtypeField | None = Field(
        None,
        description="Precision of the multiplications. Default, and on machines that lack the asked one: as torch_dtype.",
    )
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Quantises the scales too: 0.37 bit less per weight (arXiv 2305.14314, section 3)."
    )


class LoraConfig(Section):
    """The adapter (peft.LoraConfig). Fields of peft that are not listed are passed on to it."""

    r: int = Field(
        16, ge=1, le=1024, description="Rank. 16 is enough for most instruction tuning; more costs little memory."
    )
    lora_alpha: int = Field(
        64,
        gt=0,
        description="Scale of the adapter: alpha/r, or alpha/sqrt(r) with use_rslora. Default: 16 times the square root of r, "
        "which is 64 for r 16 and makes 4; with use_rslora 16, which is as strong.",
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout before the adapter. 0: short trainings do not need it."
    )
    target_modules: list[str] = Field(
        default_factory=list,
        description="Linear modules that get an adapter. Default: all of the preset's, since attention alone trains worse "
        "(arXiv 2305.14314, section 4). `all-linear` means the same.",
    )
    use_rslora: bool = Field(
        False,
        description="Scale by 1/sqrt(r) instead of 1/r (arXiv 2312.03732). Default: as in KAITO and peft, so that numbers that "
        "were written for them mean the same here.",
    )
    use_dora: bool = Field(False, description="Weight-decomposed LoRA: about a quarter slower; rarely worth it.")
    bias: Literal["none"] = Field("none", description="Biases are not trained: serving engines do not load them.")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True, description="B starts at zero: the model starts as it was."
    )

    @model_validator(mode="after")
    def _alpha_of_the_rank(self) -> Self:
        """A rank that is written alone keeps the strength that rank-stabilised scaling gives it: it neither blows up nor fades."""
        if "lora_alpha" not in self.model_fields_set:
            alpha = RANK_STABILISED_ALPHA if self.use_rslora else RANK_STABILISED_ALPHA * math.sqrt(self.r)
            self.lora_alpha = max(1, round(alpha))
        return self

    @property
    def scale(self) -> float:
        """What the product of the adapter's two matrices is multiplied with (peft's ``scaling``)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class TrainingArguments(Section):
    """The training (transformers.TrainingArguments and, after TRL, what concerns packing and masking).

    Fields of transformers.TrainingArguments that are not listed are passed on to it."""

    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data, as in KAITO and transformers.")
    max_steps: int = Field(-1, description="Optimizer steps; when positive it overrides num_train_epochs.")
    learning_rate: float = Field(
        2e-4,
        gt=0,
        lt=1,
        description="Peak. LoRA wants about ten times the rate of full fine-tuning (arXiv 2305.14314, B.2).",
    )
    lr_scheduler_type: str = Field("cosine", description="Down to zero after the warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises from zero.")
    warmup_steps: int = Field(0, ge=0, description="The same in steps; when positive it overrides warmup_ratio.")
    weight_decay: float = Field(0.0, ge=0, description="Low-rank adapters hardly overfit through large weights.")
    optim: str = Field(
        "paged_adamw_8bit", description="8-bit Adam states that move to RAM when the GPU is full. On CPUs: adamw_torch."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0: never.")
    per_device_train_batch_size: int = Field(
        4,
        ge=1,
        description="Rows of max_length tokens per optimizer step and device. How many of them are computed at "
        "once is up to the memory of the machine: the plan divides them and out-of-memory divides them further.",
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Multiplies the rows per optimizer step, as everywhere."
    )
    max_length: int = Field(
        2048, ge=16, description="Tokens per row; longer examples are cut. At most the model's context."
    )
    packing: bool = Field(
        True, description="Several examples share a row without seeing each other: no time goes into padding."
    )
    assistant_only_loss: bool = Field(
        True, description="Learn the answers, not the questions. Plain text without roles is always learned whole."
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Keeps one activation per layer and computes the rest again, where all of them would take more than "
        "256 MiB. false: never.",
    )
    logging_steps: Often | None = Field(
        None, description="Steps between log lines; below 1 a share. Default: about 50 lines."
    )
    eval_strategy: Annotated[Literal["steps", "epoch", "no"], BeforeValidator(_no)] = Field(
        "steps", description="When the held-out loss is measured; always at the end."
    )
    eval_steps: Often | None = Field(
        None, description="Steps between evaluations; below 1 a share. Default: ten of them."
    )
    per_device_eval_batch_size: int = Field(4, ge=1, description="Rows per forward pass of the evaluation.")
    save_strategy: Annotated[Literal["steps", "epoch", "best", "no"], BeforeValidator(_no)] = Field(
        "steps",
        description="Checkpoints for going on after an interruption are always written; `no` (KAITO's template) "
        "means that none is kept once the training has ended.",
    )
    save_steps: Often | None = Field(
        None, description="Steps between checkpoints. Default: every ten minutes of training."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints that are kept.")
    load_best_model_at_end: bool = Field(
        True, description="The adapter of the best evaluation is the result, if there was one."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better one. Default: never."
    )
    neftune_noise_alpha: float | None = Field(
        None, ge=0, description="Noise on the embeddings while training (arXiv 2310.05914)."
    )
    seed: int = Field(42, ge=0, description="Of the adapter's start and of the order of the data.")
    output_dir: str = Field(
        "/mnt/results",
        description="KAITO's name for the results volume; must be below /mnt. The run itself decides where "
        "it is really mounted.",
    )


class DataCollator(Section):
    """KAITO's collator section; a causal model has nothing to collate."""

    mlm: bool = Field(
        False, description="Masked-language modelling; has no meaning for a causal model and changes nothing."
    )


class DatasetConfig(Section):
    """What is done with the rows of the data."""

    shuffle_dataset: bool = Field(True, description="Shuffle before the split.")
    shuffle_seed: int = Field(42, ge=0, description="Of that shuffle: the same data always gives the same split.")
    train_test_split: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of the examples that is trained on; the rest is held out and measured. 1: all.",
    )
    messages_column: str | None = Field(
        None, description="Column with a list of {role, content}. Default: found by itself."
    )
    prompt_column: str | None = Field(None, description="Column with the question. Default: found by itself.")
    context_column: str | None = Field(
        None, description="Column with the question (KAITO's name), or beside `prompt_column` with what belongs to it."
    )
    system_column: str | None = Field(None, description="Column with the system message. Default: none.")
    response_column: str | None = Field(
        None, description="Column with the answer, or with plain text. Default: found by itself."
    )


class TrainingConfig(BaseModel):
    """KAITO's ``training_config``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)

    model: ModelConfig = Field(default_factory=ModelConfig, alias="ModelConfig")
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig, alias="QuantizationConfig")
    lora: LoraConfig = Field(default_factory=LoraConfig, alias="LoraConfig")
    training: TrainingArguments = Field(default_factory=TrainingArguments, alias="TrainingArguments")
    collator: DataCollator = Field(default_factory=DataCollator, alias="DataCollator")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig, alias="DatasetConfig")


SECTIONS: dict[str, type[Section]] = {
    "ModelConfig": ModelConfig,
    "QuantizationConfig": QuantizationConfig,
    "LoraConfig": LoraConfig,
    "TrainingArguments": TrainingArguments,
    "DataCollator": DataCollator,
    "DatasetConfig": DatasetConfig,
}
