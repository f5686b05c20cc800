"""DeepSpeed's runtime: the process group, the student's engine, its step, and the monitor."""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Optimizer
from pipeline.engine.deepspeed_config import MONITORS, offload
from pipeline.engine.operators import cpu_adam, initialize, load_async_io


def learning_rate_factor(step: int, options: Optimizer) -> float:
    """Share of the peak learning rate at a step, counted from 0: linear warm-up, then decay to 0 at the last step."""
    if step < options.warmup_steps:
        return (step + 1) / (options.warmup_steps + 1)
    left = max(0.0, (options.steps - step) / max(1, options.steps - options.warmup_steps))
    return left if options.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, norms and biases do not."""
    matrices, vectors = trained_names(model)
    parameters = dict(model.named_parameters())
    groups = [
        dict(params=[parameters[name] for name in matrices], weight_decay=weight_decay),
        dict(params=[parameters[name] for name in vectors], weight_decay=0.0),
    ]
    return [group for group in groups if group["params"]]


def trained_names(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names of the trainable matrices, and of the trainable norms and biases; also where ZeRO-3 holds pieces only."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    axes = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
    return [name for name in trained if axes[name] > 1], [name for name in trained if axes[name] <= 1]


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
        model.checkpoint_activations()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    engine = initialize(
        model=model,
        optimizer=_adamw(parameter_groups(model, options.weight_decay), options, config),
        config={key: value for key, value in config.items() if key not in MONITORS},
        dist_init_required=False,
    )
    set_buffers(model, buffers)
    if hasattr(engine.optimizer, "fp32_groups"):
        # Mixed precision without ZeRO: DeepSpeed makes Adam's state by a step with a gradient of zero, which decays the
        # weights once and leaves the count of steps, and so the correction of Adam's bias, one ahead.
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def set_buffers(model: torch.nn.Module, buffers: dict[str, Tensor]) -> None:
    """Give buffers back the values and types that they had: DeepSpeed rounds them with the weights.

    Rotary frequencies, which are such buffers, must be the same in training and in the exported model.
    """
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[leaf] = value.to(module._buffers[leaf].device)


def set_learning_rate(student, rate: float) -> None:
    """For the next step of the engine."""
    for group in student.optimizer.param_groups:
        group["lr"] = rate


def spoil_unless_finite(loss: Tensor, losses: Tensor) -> Tensor:
    """The loss, or NaN where any of a step's losses on this rank was not finite; nothing waits for the device.

    The gradient of NaN is NaN, on all ranks once they have summed it, and then `take_step` leaves the weights alone.

    Args:
        loss: of the step's last micro-batch, a scalar.
        losses: all losses of the step so far, any shape.
    """
    return loss * (1.0 + 0.0 * losses.detach().sum()).to(loss.dtype)


def take_step(student) -> bool:
    """The engine's step, which leaves the weights alone where the gradient, summed over the ranks, is not finite.

    DeepSpeed finds out by the gradient's norm and counts a skipped step; without ZeRO in fp32 it would put NaN into the
    weights, so that here the same is done for it.

    Args:
        student: the engine, after the backward pass of a micro-batch.

    Returns:
        False if the step was skipped.
    """
    skipped = student.skipped_steps
    plain = student.optimizer is student.basic_optimizer
    if not plain or not student.is_gradient_accumulation_boundary() or _gradient_is_finite(student):
        student.step()
        return student.skipped_steps == skipped
    optimizer_step = student.optimizer.step
    student.optimizer.step = lambda *_, **__: student.zero_grad()
    try:
        student.step()
    finally:
        student.optimizer.step = optimizer_step
    student.skipped_steps += 1
    return False


def _gradient_is_finite(student) -> bool:
    """Of whole gradients, which are the same on all ranks; their norm is kept where DeepSpeed keeps it elsewhere."""
    gradients = [p.grad for p in student.module.parameters() if p.grad is not None]
    student._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
    return bool(student._global_grad_norm.isfinite())


def _adamw(groups: list[dict[str, Any]], options: Optimizer, config: dict[str, Any]) -> torch.optim.Optimizer:
    arguments = dict(lr=options.peak_lr, betas=options.betas, eps=options.eps)
    offloads = offload(config, "optimizer")["device"] != "none"
    if offloads and config.get("zero_force_ds_cpu_optimizer", True):
        return cpu_adam()(groups, adamw_mode=True, **arguments)
    # torch's own AdamW needs no compiler; its fused form is as fast on a GPU as DeepSpeed's compiled one.
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available() and not offloads, **arguments)
