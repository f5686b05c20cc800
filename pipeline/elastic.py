"""A checkpoint for another number of ranks, or another ZeRO stage: through whole tensors, one file for each.

DeepSpeed's own offline tool writes a checkpoint out as one folder a parameter (`fp32.pt`, `exp_avg.pt`,
`exp_avg_sq.pt`, `step.pt`: its universal format). That is done once, by rank 0, and kept beside the checkpoint. Each
rank then puts its share of every tensor into the engine through DeepSpeed's per-parameter interface. DeepSpeed's own
reader of that format is not used: it cannot change between stage 3 and the others, and at stage 3 gives all parameter
groups the settings of the first, so that norms and biases would start to decay.
"""

import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.errors import UserError
from pipeline.operators import import_deepspeed

UNIVERSAL = "universal"
MOMENTS = ("exp_avg", "exp_avg_sq")


def load_elsewhere(engine, checkpoint: Path, *, zero_stage: int, weights: dict[str, torch.Tensor]) -> None:
    """Give an engine of any number of ranks and any ZeRO stage the state of a checkpoint.

    Args:
        engine: the student's engine, fresh.
        checkpoint: folder of a whole checkpoint.
        zero_stage: of the run that wrote it.
        weights: all its weights in fp32, see `checkpoint.read_weights`.

    Raises:
        UserError: this engine's state cannot be set: fp16 or bf16 without ZeRO.
    """
    if engine.zero_optimization_stage() == 0 and engine.optimizer is not engine.basic_optimizer:
        raise UserError(
            f"{checkpoint} was written by another number of ranks or at another ZeRO stage, and mixed precision "
            "without ZeRO cannot take it over. Go on with --ds-config zero1 instead."
        )
    _create_optimizer_state(engine)
    sources = _optimizer_states(engine, checkpoint, zero_stage)
    for name, parameter in engine.module.named_parameters():
        _set_weight(engine, parameter, weights[name])
    steps = {_set_moments(engine, parameter, *state) for parameter, state in sources}
    _set_optimizer_step(engine, max(steps))
    _set_schedule(engine, checkpoint)


def convert(checkpoint: Path) -> Path:
    """Write a checkpoint of stage 1, 2 or 3 out in DeepSpeed's universal format; the folder. Done once, and atomic."""
    target = checkpoint / UNIVERSAL
    if target.is_dir():
        return target
    scratch = Path(tempfile.mkdtemp(dir=checkpoint, prefix=f".{UNIVERSAL}-"))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(scratch / UNIVERSAL)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"DeepSpeed could not convert {checkpoint}:\n{result.stderr[-2000:]}")
        (scratch / UNIVERSAL).rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _optimizer_states(engine, checkpoint: Path, zero_stage: int) -> Iterator[tuple]:
    """(parameter, (first moment, second moment, step)) of each trained parameter."""
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if zero_stage == 0:
        model_states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        order = [p for p in trained if _dimensions(p[1]) > 1] + [p for p in trained if _dimensions(p[1]) <= 1]
        states = model_states["optimizer"]["state"]
        for number, (_, parameter) in enumerate(order):
            yield parameter, (*(states[number][key] for key in MOMENTS), float(states[number]["step"]))
        return
    if dist.get_rank() == 0:
        convert(checkpoint)
    dist.barrier()
    folder = checkpoint / UNIVERSAL / "zero"
    for name, parameter in trained:
        moments = (_read_moment(folder / name / f"{key}.pt", parameter) for key in MOMENTS)
        yield parameter, (*moments, _read_step(folder, name))


def _read_moment(path: Path, parameter: torch.nn.Parameter) -> torch.Tensor:
    """One moment, flat: of stages 1 and 2 the tensor in its shape, of stage 3 flat and perhaps padded."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    tensor = content["param"] if isinstance(content, dict) else content
    return tensor.flatten()[: getattr(parameter, "ds_numel", parameter.numel())]


def _read_step(folder: Path, name: str) -> float:
    """Adam's step: beside each parameter at stages 1 and 2, in the common state at stage 3."""
    if (folder / name / "step.pt").is_file():
        return float(torch.load(folder / name / "step.pt", map_location="cpu", weights_only=True))
    return _common_step(folder)


@functools.lru_cache(maxsize=1)
def _common_step(folder: Path) -> float:
    common = torch.load(folder / "optimizer_state.pt", map_location="cpu", weights_only=False)
    return float(common["optimizer_state_dict"]["state"][0]["step"])


def _dimensions(parameter: torch.nn.Parameter) -> int:
    """Of the whole tensor; at stage 3 a parameter is a flat piece that remembers its shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _create_optimizer_state(engine) -> None:
    """Empty moments, which Adam would make, and DeepSpeed tie to the parameters, only at the first step."""
    zero = engine.optimizer
    flat = getattr(zero, "fp32_partitioned_groups_flat", getattr(zero, "single_partition_of_fp32_groups", []))
    for partition in flat:
        empty = {key: torch.zeros_like(partition) for key in MOMENTS}
        own = isinstance(engine.basic_optimizer, torch.optim.AdamW)
        engine.basic_optimizer.state[partition] = {"step": torch.tensor(0.0) if own else 0, **empty}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _set_weight(engine, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """The weight that the model computes with, and its fp32 master."""
    utils = import_deepspeed().utils
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            piece = _own_piece(parameter, value)
            parameter.ds_tensor.data.copy_(piece)
            if parameter.requires_grad:
                utils.safe_set_local_fp32_param(parameter, piece.float())
        else:
            parameter.data.copy_(value.reshape(parameter.shape))
            if parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
                utils.safe_set_full_fp32_param(parameter, value.to(parameter.device))


def _set_moments(engine, parameter, first: torch.Tensor, second: torch.Tensor, step: float) -> float:
    """Adam's moments of one parameter; returns its step."""
    utils = import_deepspeed().utils
    for key, value in zip(MOMENTS, (first, second), strict=True):
        if hasattr(parameter, "ds_id"):
            utils.safe_set_local_optimizer_state(parameter, _own_piece(parameter, value).float(), key)
        elif hasattr(parameter, "_hp_mapping"):
            utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        else:
            state = engine.optimizer.state[parameter]
            state[key] = value.reshape(parameter.shape).to(parameter.device, torch.float32).clone()
            state["step"] = torch.tensor(step)
    return step


def _own_piece(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's flat piece of a whole tensor, as ZeRO-3 cuts it: equal pieces, the last one padded with zeros."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(), dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    start = size * dist.get_rank()
    return padded[start : start + size].to(parameter.ds_tensor.device)


def _set_optimizer_step(engine, step: float) -> None:
    for state in engine.basic_optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = int(step)


def _set_schedule(engine, checkpoint: Path) -> None:
    """Learning rate and step counters, which do not depend on ranks or stage."""
    file = next(path for path in sorted(checkpoint.glob("*mp_rank_00_model_states.pt")))
    states = torch.load(file, map_location="cpu", weights_only=False)
    engine.lr_scheduler.load_state_dict(states["lr_scheduler"])
    for group, rate in zip(engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    engine.global_steps, engine.skipped_steps = states["global_steps"], states["skipped_steps"]
    engine.global_samples = states["global_samples"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
