"""Writes src/kaito_tuner_qlora/data/known_fields.json: the fields of the libraries that our configuration passes through.

The control side checks a ConfigMap without torch; so the names are kept as data, and this script, run with the `train`
extra installed, makes them again. TRL is not a dependency: the fields that its SFTConfig adds are listed by hand here
(trl 1.x), because KAITO's ConfigMaps may hold them.

    python scripts/known_fields.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import peft
import transformers
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

SFT_ONLY = """
    activation_offloading assistant_only_loss chat_template_path completion_only_loss dataset_kwargs dataset_num_proc
    dataset_text_field eos_token eval_packing loss_type max_length max_seq_length model_init_kwargs pad_to_multiple_of
    pad_token packing packing_strategy padding_free shuffle_dataset truncation_mode
""".split()  # noqa: SIM905 (a list of forty quoted words reads worse)

known = {
    "versions": {"transformers": transformers.__version__, "peft": peft.__version__},
    "TrainingArguments": sorted(f.name for f in dataclasses.fields(transformers.TrainingArguments)),
    "SFTConfig": SFT_ONLY,
    "LoraConfig": sorted(f.name for f in dataclasses.fields(peft.LoraConfig)),
    "QuantizationConfig": sorted(set(inspect.signature(transformers.BitsAndBytesConfig).parameters) - {"kwargs"}),
    "optim": sorted(o.value for o in OptimizerNames),
    "lr_scheduler_type": sorted(s.value for s in SchedulerType),
}
path = Path(__file__).parents[1] / "src/kaito_tuner_qlora/data/known_fields.json"
path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
print(f"{path}: {sum(len(v) for v in known.values())} names")
