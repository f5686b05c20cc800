"""The DeepSpeed configuration: read by name or path, checked, and merged with the recipe.

The recipe owns what is learned, a DeepSpeed configuration owns how it fits the machines. `merge` joins the two, in one
place, and refuses a knob that both set.
"""

import json
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline.config import Recipe

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_OWNED_BY_RECIPE = {
    "train_batch_size": "optimizer.global_batch_samples",
    "gradient_accumulation_steps": "optimizer.global_batch_samples, the micro-batch and the number of ranks",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "the recipe's [optimizer]",
    "scheduler": "optimizer.schedule, peak_lr and warmup_steps",
    "checkpoint": "the way a run resumes",
}


def shipped_ds_configs() -> list[str]:
    return sorted(path.stem for path in DS_CONFIGS.glob("*.json"))


def read_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration by its shipped name or its path; "auto" is zero1 on GPUs, else cpu."""
    if name_or_path == "auto":
        name_or_path = "zero1" if torch.cuda.is_available() else "cpu"
    for path in (Path(name_or_path), DS_CONFIGS / f"{name_or_path}.json"):
        if path.is_file():
            break
    else:
        known = ", ".join(shipped_ds_configs())
        raise UserError(f"there is no DeepSpeed configuration {name_or_path!r}: give a JSON file or one of {known}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config


def merge(recipe: Recipe, ds_config: dict[str, Any], *, world_size: int) -> dict[str, Any]:
    """The configuration that DeepSpeed runs on.

    The configuration's `train_micro_batch_size_per_gpu` is the most samples that fit at once; the micro-batch used is
    the largest divisor of a rank's share of the global batch that does not exceed it.

    Raises:
        UserError: a knob set in both, a missing micro-batch, a global batch that the ranks cannot share evenly.
    """
    if both := [f"{key} (the recipe has it as {mine})" for key, mine in _OWNED_BY_RECIPE.items() if key in ds_config]:
        raise UserError(
            "the DeepSpeed configuration sets what the recipe owns, take it out there:\n  " + "\n  ".join(both)
        )
    largest = ds_config.get("train_micro_batch_size_per_gpu")
    if not isinstance(largest, int) or largest < 1:
        raise UserError("the DeepSpeed configuration must give train_micro_batch_size_per_gpu, a positive number")
    if zero_stage(ds_config) == 0 and "data_types" in ds_config and compute_dtype(ds_config) != torch.float32:
        raise UserError(
            "DeepSpeed cannot set data_types for bf16 or fp16 at ZeRO stage 0: leave it out, or use stage 1"
        )
    if offload(ds_config, "optimizer")["device"] == "nvme":
        raise UserError(
            "zero_optimization.offload_optimizer.device = nvme is not supported: DeepSpeed's checkpoints of such a run "
            'lack the step of Adam and all small weights, so it could not resume. Use "cpu" (offload_param may be nvme)'
        )
    global_batch = recipe.optimizer.global_batch_samples
    if global_batch % world_size:
        raise UserError(
            f"optimizer.global_batch_samples = {global_batch} cannot be shared evenly by {world_size} ranks: "
            f"make it a multiple of {world_size}, or use another number of ranks"
        )
    rank_batch = global_batch // world_size
    micro = max(size for size in range(1, min(largest, rank_batch) + 1) if rank_batch % size == 0)
    return {
        **ds_config,
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rank_batch // micro,
        "gradient_clipping": recipe.optimizer.clip_norm,
        "steps_per_print": ds_config.get("steps_per_print", 1 << 62),
        "zero_allow_untested_optimizer": True,
    }


def offload(config: dict[str, Any], what: str) -> dict[str, Any]:
    """How the student's "optimizer" or "param" is offloaded: `device` (none, cpu or nvme), `nvme_path` and so on."""
    return {"device": "none", **(config.get("zero_optimization", {}).get(f"offload_{what}") or {})}


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def compute_dtype(config: dict[str, Any]) -> torch.dtype:
    """The type in which teacher and student compute: bfloat16, float16 or float32."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(key, {}).get("enabled"):
            return dtype
    return torch.float32
