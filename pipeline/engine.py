"""Everything that touches DeepSpeed's runtime: its configuration, the process group, the student's engine.

The recipe owns what is learned, a DeepSpeed configuration owns how it fits the machines. `merge` joins the two, in one
place, and refuses a knob that both set.
"""

import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline.config import Optimizer, Recipe
from pipeline.operators import cpu_adam, import_deepspeed, load_async_io

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


def init_distributed(*, timeout_seconds: int = 1800) -> None:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe; alone if they are not set.

    Raises:
        UserError: another process listens on MASTER_PORT.
    """
    deepspeed = import_deepspeed()
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    if not torch.cuda.is_available():
        # Without this DeepSpeed compiles a shared-memory op for a minute at the first start; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = ranks_on_this_machine()
        if "OMP_NUM_THREADS" not in os.environ or local_ranks > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} is taken, perhaps by another job on this machine: give this one a port "
            "of its own, such as --master_port 29501"
        ) from error


def ranks_on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def learning_rate_factor(step: int, options: Optimizer) -> float:
    """Share of the peak learning rate at a step, counted from 0: linear warm-up, then decay to 0 at the last step."""
    if step < options.warmup_steps:
        return (step + 1) / (options.warmup_steps + 1)
    left = max(0.0, (options.steps - step) / max(1, options.steps - options.warmup_steps))
    return left if options.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, norms and biases do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trainable if p.ndim > 1], weight_decay=weight_decay),
        dict(params=[p for p in trainable if p.ndim <= 1], weight_decay=0.0),
    ]
    return [group for group in groups if group["params"]]


def start_student(model: torch.nn.Module, options: Optimizer, config: dict[str, Any]):
    """The student's DeepSpeed engine: ZeRO as `config` says, AdamW, and the recipe's learning rate.

    Args:
        model: the student; parameters that need no gradient stay outside the optimizer.
        options: the recipe's optimizer.
        config: of `merge`; a section `activation_checkpointing` makes layers compute their activations again in the
            backward pass instead of keeping them.

    Returns:
        deepspeed.DeepSpeedEngine
    """
    if offload(config, "param")["device"] == "nvme":
        load_async_io()
    if "activation_checkpointing" in config:
        model.backbone.gradient_checkpointing_enable()

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options))

    engine, _, _, _ = import_deepspeed().initialize(
        model=model,
        optimizer=_adamw(parameter_groups(model, options.weight_decay), options, config),
        lr_scheduler=schedule,
        config={key: value for key, value in config.items() if key not in MONITORS},
        dist_init_required=False,
    )
    return engine


def take_step(student, *, finite: bool) -> bool:
    """The engine's step, which leaves the weights alone where the loss or the gradient was not finite.

    At stages 1 and 2, and for fp16, DeepSpeed finds out by the gradient's norm; elsewhere it would put NaN into the
    weights, and `finite` decides.

    Args:
        student: the engine, after the backward pass of a micro-batch.
        finite: whether the losses of this step were, on all ranks; the ranks must agree.

    Returns:
        False if the step was skipped.
    """
    skipped = student.skipped_steps
    if not finite and student.zero_optimization_stage() in (0, 3):
        optimizer_step = student.optimizer.step
        student.optimizer.step = lambda *_, **__: _discard_gradients(student)
        try:
            student.step()
        finally:
            student.optimizer.step = optimizer_step
        return False
    student.step()
    return student.skipped_steps == skipped


def _discard_gradients(student) -> None:
    if student.zero_optimization_stage() == 3:
        student.optimizer.overflow = True
        student.optimizer._overflow_clean_up(prev_scale=None)
    else:
        student.zero_grad()


def _adamw(groups: list[dict[str, Any]], options: Optimizer, config: dict[str, Any]) -> torch.optim.Optimizer:
    arguments = dict(lr=options.peak_lr, betas=options.betas, eps=options.eps)
    offloads = offload(config, "optimizer")["device"] != "none"
    if offloads and config.get("zero_force_ds_cpu_optimizer", True):
        return cpu_adam()(groups, adamw_mode=True, **arguments)
    # torch's own AdamW needs no compiler; its fused form is as fast on a GPU as DeepSpeed's compiled one.
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available() and not offloads, **arguments)


def start_monitor(config: dict[str, Any], output: Path, summary: str):
    """DeepSpeed's monitor: TensorBoard under `output`/tensorboard, and W&B, Comet or CSV where `config` asks for it.

    `summary` is shown in TensorBoard as a text.
    """
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    chosen = {name: config[name] for name in MONITORS if name in config}
    os.environ.setdefault("WANDB_DIR", str(output))  # not the folder that somebody happens to stand in
    chosen.setdefault("tensorboard", dict(enabled=True, output_path=str(output), job_name="tensorboard"))
    monitor = MonitorMaster(get_monitor_config(chosen))
    if writer := getattr(monitor.tb_monitor, "summary_writer", None):
        writer.add_text("recipe", summary)
    return monitor


def local_devices() -> int:
    """Ranks that the launcher starts on this machine when it is not told: one a GPU, or one on the CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 1
