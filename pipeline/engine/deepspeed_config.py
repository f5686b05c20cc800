"""The DeepSpeed configuration: read by name or path, checked, and merged with the recipe.

The recipe owns what is learned, a DeepSpeed configuration owns how it fits the machines. `merge` joins the two, in one
place, and refuses a knob that both set.
"""

import difflib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
import torch

from data_prep.errors import UserError, first_line
from pipeline.config import Recipe
from pipeline.engine.operators import import_deepspeed

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
MOST_MICRO_BATCH = 1 << 16
_DTYPES = ("fp32", "bf16", "fp16")
_SECTIONS = {"bf16", "fp16", "data_types", "zero_optimization", "activation_checkpointing", "aio", *MONITORS}
_SUPPORTED = (
    *_SECTIONS,
    *("train_micro_batch_size_per_gpu", "communication_data_type", "steps_per_print", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
)
# Keys of the sections; those of monitors are DeepSpeed's and the monitors' own business.
_KEYS = {
    "bf16": ("enabled", "immediate_grad_update"),
    "fp16": ("enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
    "data_types": ("grad_accum_dtype",),
    "activation_checkpointing": (
        *("partition_activations", "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints"),
        *("synchronize_checkpoint_boundary", "profile"),
    ),
    "aio": ("block_size", "queue_depth", "thread_count", "single_submit", "overlap_events", "intra_op_parallelism"),
}
_OFFLOAD_KEYS = ("device", "nvme_path", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu")
_NUMBERS = {  # key of zero_optimization -> smallest value; the largest is 2^31
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "sub_group_size"), 10_000),
    **dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0),
}
_SUPPORTED_ZERO = (
    *("stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "sub_group_size"),
    *("allgather_partitions", "allgather_bucket_size", "offload_optimizer", "offload_param"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
)
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
        if path.stat().st_size > 1 << 20:
            raise UserError(f"{path} holds {path.stat().st_size:,} bytes: that is no DeepSpeed configuration")
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the key {min(twice)!r} stands there twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def check(config: dict[str, Any]) -> None:
    """Refuse a configuration that DeepSpeed would not start with, ignore in part, or save in a way nobody here reads.

    The keys are those that this project is tested with; their values are checked by DeepSpeed's own models.

    Raises:
        UserError: a key is unknown or not supported, or a value is not what it should be.
    """
    _check_keys(config, (*_SUPPORTED, *_OWNED_BY_RECIPE), "")
    for name in _SECTIONS & config.keys():
        if not isinstance(config[name], dict):
            raise UserError(f"the DeepSpeed configuration's {name} is {config[name]!r}; expected an object")
    zero = config.get("zero_optimization", {})
    _check_keys(zero, _SUPPORTED_ZERO, "zero_optimization.")
    if type(zero.get("stage", 0)) is not int or not 0 <= zero.get("stage", 0) <= 3:
        raise UserError(f"zero_optimization.stage is {zero['stage']!r}; expected 0, 1, 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(name, {}), dict):
            raise UserError(f"zero_optimization.{name} is {zero[name]!r}; expected an object")
        _check_keys(zero.get(name, {}), _OFFLOAD_KEYS, f"zero_optimization.{name}.")
    for name, smallest in _NUMBERS.items():
        value = zero.get(name, smallest)
        if type(value) not in (int, float) or not smallest <= value <= 1 << 31:
            raise UserError(
                f"zero_optimization.{name} is {value!r}; expected a number from {smallest:,} to {1 << 31:,}"
            )
    for section, keys in _KEYS.items():
        _check_keys(config.get(section, {}), keys, f"{section}.")
    _check_fit(config, zero)
    for name in ("bf16", "fp16"):
        if not isinstance(config.get(name, {}).get("enabled", False), bool):
            raise UserError(f"{name}.enabled is {config[name]['enabled']!r}; expected true or false")
    if all(config.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        raise UserError("bf16 and fp16 are both enabled; expected one of them at most")
    micro = config.get("train_micro_batch_size_per_gpu")
    if type(micro) is not int or not 0 < micro <= MOST_MICRO_BATCH:
        raise UserError(
            f"train_micro_batch_size_per_gpu is {micro!r}; the DeepSpeed configuration must give it, a number from 1 "
            f"to {MOST_MICRO_BATCH:,}"
        )
    _check_by_deepspeed(config)


def _check_fit(config: dict[str, Any], zero: dict[str, Any]) -> None:
    """Refuse what DeepSpeed takes and does not do, or does wrongly."""
    accumulate = config.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if accumulate not in ("fp32", "bf16", "fp16"):
        raise UserError(f'data_types.grad_accum_dtype is {accumulate!r}; expected "fp32", "bf16" or "fp16"')
    if "offload_param" in zero and offload(config, "param")["device"] != "none" and zero_stage(config) != 3:
        raise UserError("zero_optimization.offload_param works at ZeRO stage 3 alone: take it out, or use stage 3")
    for name in ("steps_per_print", "communication_data_type"):
        kind, expected = (int, "a number above 0") if name == "steps_per_print" else (str, '"fp32", "bf16" or "fp16"')
        value = config.get(name, 1 if kind is int else "fp32")
        if type(value) is not kind or (kind is int and value < 1) or (kind is str and value not in _DTYPES):
            raise UserError(f"{name} is {value!r}; expected {expected}")
    for name in ("zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer", "wall_clock_breakdown"):
        if not isinstance(config.get(name, True), bool):
            raise UserError(f"{name} is {config[name]!r}; expected true or false")
    for name, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if config.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise UserError(f"{name} is enabled, and the package {package} is not installed: pip install {package}")


def _check_keys(config: dict[str, Any], known: Iterable[str], prefix: str) -> None:
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise UserError(f"the DeepSpeed configuration's key {prefix}{name} is not supported here: {hint}")


def _check_by_deepspeed(config: dict[str, Any]) -> None:
    own = {name: value for name, value in config.items() if name not in _OWNED_BY_RECIPE}
    micro = own["train_micro_batch_size_per_gpu"]
    deepspeed = import_deepspeed()
    try:
        deepspeed.DeepSpeedConfig({**json.loads(json.dumps(own)), "train_batch_size": micro * _ranks_of_this_process()})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"the DeepSpeed configuration is not valid: {error.title}, {where}: {first['msg']} (given: "
            f"{first['input']!r})"
        ) from None
    except Exception as error:  # its checks raise whatever came to hand: assertions, key errors, type errors
        reason = first_line(error)
        raise UserError(f"DeepSpeed does not take this configuration: {reason}") from None
    from deepspeed.accelerator import get_accelerator

    if config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise UserError("fp16.enabled: DeepSpeed has no fp16 on this processor; use bf16, or fp32 (--ds-config cpu)")


def _ranks_of_this_process() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


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
    largest = min(largest, MOST_MICRO_BATCH)
    if zero_stage(ds_config) == 0 and "data_types" in ds_config and compute_dtype(ds_config) != torch.float32:
        raise UserError(
            "DeepSpeed cannot set data_types for bf16 or fp16 at ZeRO stage 0: leave it out, or use stage 1"
        )
    if zero_stage(ds_config) == 0 and compute_dtype(ds_config) == torch.float16:
        raise UserError(
            "fp16 at ZeRO stage 0: DeepSpeed does not scale the loss there, but takes the scale off the gradient, and "
            "the weights hardly move. Use stage 1, or bf16"
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
