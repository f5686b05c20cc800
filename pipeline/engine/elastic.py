"""A checkpoint for another number of ranks, another ZeRO stage or another precision: through whole fp32 tensors.

`zero_files` puts whole tensors together out of the files of all ranks. Here each rank puts its share of every tensor
into its engine, through DeepSpeed's per-parameter interface where there is one. DeepSpeed's own way (its universal
format) is not used: it cannot change between stage 3 and the others, does not know bf16 with fp32 accumulation at stage
1, and at stage 3 gives all parameter groups the settings of the first, so that norms and biases would start to decay.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.engine.operators import import_deepspeed
from pipeline.engine.zero_files import MOMENTS, Trained

# Each kind of ZeRO optimizer keeps this rank's flat fp32 partitions, one a group, under another name.
_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def set_state(engine, weights: Mapping[str, Tensor], trained: Mapping[str, Trained]) -> None:
    """Give a fresh engine of any number of ranks, any ZeRO stage and any precision the state of a checkpoint.

    Args:
        engine: the student's engine, before its first step.
        weights: all weights in fp32, whole.
        trained: the trained ones with Adam's moments.
    """
    step = max((state.step for state in trained.values()), default=0.0)
    if step:
        _create_optimizer_state(engine)
    for name, parameter in engine.module.named_parameters():
        _set_weight(engine, parameter, weights[name])
        if step and parameter.requires_grad:
            _set_moments(engine, parameter, trained[name])
    for state in engine.basic_optimizer.state.values():
        state["step"] = state["step"].fill_(step) if isinstance(state["step"], Tensor) else int(step)


def empty_state(tensor: Tensor, *, fused: bool, own: bool) -> dict[str, Any]:
    """Adam's state of a tensor before its first step, as the optimizer itself makes it.

    Args:
        tensor: what the optimizer updates.
        fused: fused AdamW wants its step where the tensor is.
        own: PyTorch's AdamW counts in a tensor, DeepSpeed's CPU Adam in a number.
    """
    step = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu") if own else 0
    return {"step": step, **{key: torch.zeros_like(tensor, dtype=torch.float32) for key in MOMENTS}}


def _create_optimizer_state(engine) -> None:
    """Empty moments, which Adam would make, and DeepSpeed tie to the parameters, only at the first step."""
    optimizer = engine.basic_optimizer
    kind = dict(fused=bool(optimizer.defaults.get("fused")), own=isinstance(optimizer, torch.optim.AdamW))
    found = next((getattr(engine.optimizer, name) for name in _PARTITIONS if hasattr(engine.optimizer, name)), None)
    if found is None:  # without ZeRO the optimizer holds whole parameters, or their fp32 masters
        found = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for tensor in found:
        optimizer.state[tensor] = empty_state(tensor, **kind)
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _set_weight(engine, parameter: nn.Parameter, value: Tensor) -> None:
    """The weight that the model computes with, and its fp32 master."""
    utils = import_deepspeed().utils
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            piece = _own_piece(parameter, value)
            parameter.ds_tensor.data.copy_(piece)
            if parameter.requires_grad:
                utils.safe_set_local_fp32_param(parameter, piece.float())
            return
        parameter.data.copy_(value.reshape(parameter.shape))
        if not parameter.requires_grad:
            return
        if hasattr(parameter, "_hp_mapping"):
            utils.safe_set_full_fp32_param(parameter, value.to(parameter.device))
        else:
            _whole_master(engine, parameter).data.copy_(value.reshape(parameter.shape))


def _set_moments(engine, parameter: nn.Parameter, state: Trained) -> None:
    utils = import_deepspeed().utils
    for key in MOMENTS:
        value = getattr(state, key)
        if hasattr(parameter, "ds_id"):
            utils.safe_set_local_optimizer_state(parameter, _own_piece(parameter, value).float(), key)
        elif hasattr(parameter, "_hp_mapping"):
            utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        else:
            engine.basic_optimizer.state[_whole_master(engine, parameter)][key].copy_(value.reshape(parameter.shape))


def _whole_master(engine, parameter: nn.Parameter) -> Tensor:
    """Without ZeRO: what the optimizer updates for a parameter, itself in fp32, else its fp32 master."""
    if engine.optimizer is engine.basic_optimizer:
        return parameter
    for masters, parameters in zip(engine.optimizer.fp32_groups, engine.optimizer.fp16_groups, strict=True):
        for master, own in zip(masters, parameters, strict=True):
            if own is parameter:
                return master
    raise KeyError("the optimizer does not hold this parameter")


def _own_piece(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's flat piece of a whole tensor, as ZeRO-3 cuts it: equal pieces, the last one padded with zeros."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(), dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    start = size * dist.get_rank()
    return padded[start : start + size].to(parameter.ds_tensor.device)
