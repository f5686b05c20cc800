"""DeepSpeed's checkpoint files, read without running any code of theirs: whole fp32 tensors out of partitions.

What a checkpoint of W ranks holds depends on the ZeRO stage and the precision:

    stage 0           one file; fp32 weights in `module`, or, in mixed precision, the master in `optimizer.fp32_groups`
    stages 1 and 2    each rank 1/W of every group's flat fp32 master and moments; `param_slice_mappings` says which
                      part of which parameter lies where
    stage 3           each rank 1/W of every parameter, group after group, in the order of `param_shapes`

Frozen weights are in the precision of training: in `module`, at stage 3 in `frozen_param_fragments`.

Pickle can run code, so files are read with `weights_only=True`, and of DeepSpeed's own classes only four pass.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError, first_line
from pipeline.engine.operators import import_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")
GROUPS = "trained_parameters"  # in our part of the model states: names, one list for each of the optimizer's groups


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained parameter: its fp32 weight and Adam's moments in its whole shape, and Adam's step."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float


def load(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """The content of one file, on the CPU.

    Args:
        path: of the file.
        mmap: leave tensors on the disk until they are read.

    Raises:
        UserError: the file is damaged, or holds what no checkpoint of ours holds.
    """
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler stumbles over damaged bytes in every way there is
        reason = first_line(error)
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): it is damaged, or was not written by this program. "
            "Go on from another step with --resume STEP."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, no checkpoint")
    return content


def read(checkpoint: Path, *, zero_stage: int) -> tuple[dict[str, Tensor], dict[str, Trained]]:
    """What a checkpoint holds, whole and on the CPU; no process group is needed.

    Args:
        checkpoint: folder of a whole checkpoint.
        zero_stage: of the run that wrote it.

    Returns:
        All weights by name in fp32, trained ones from the fp32 master; and the trained ones with Adam's state.

    Raises:
        UserError: a file is damaged, or the partitions do not add up.
    """
    try:
        trained = _trained(checkpoint, zero_stage)
        weights = _frozen_or_all(checkpoint, zero_stage)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the files of {checkpoint} do not fit together ({type(error).__name__}: {error})") from None
    return weights | {name: state.weight for name, state in trained.items()}, trained


def _trained(checkpoint: Path, zero_stage: int) -> dict[str, Trained]:
    if zero_stage == 0:
        return _of_stage_0(load(checkpoint / "mp_rank_00_model_states.pt", mmap=True))
    ranks = [load(path, mmap=True)["optimizer_state_dict"] for path in _of_ranks(checkpoint, "optim_states")]
    shapes = [shape for group in _model_states(checkpoint)["param_shapes"] for shape in group.items()]
    return _of_stage_3(ranks, shapes) if zero_stage == 3 else _of_stages_1_and_2(ranks, shapes)


def _of_stage_0(states: dict[str, Any]) -> dict[str, Trained]:
    optimizer = states["optimizer"]
    names = [name for group in states[GROUPS] for name in group]
    if "fp32_groups" in optimizer:
        masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
        moments = optimizer["optimizer_state_dict"]["state"]
    else:
        masters, moments = [states["module"][name] for name in names], optimizer["state"]
    return {
        name: Trained(
            weight=master.detach().float().clone(),
            step=float(moments[number]["step"]) if number in moments else 0.0,
            **{key: _moment(moments.get(number, {}), key, master).clone() for key in MOMENTS},
        )
        for number, (name, master) in enumerate(zip(names, masters, strict=True))
    }


def _of_stages_1_and_2(ranks: list[dict[str, Any]], shapes: list[tuple[str, torch.Size]]) -> dict[str, Trained]:
    pieces: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[str, float] = {}
    for rank in ranks:
        groups = zip(rank["single_partition_of_fp32_groups"], rank["param_slice_mappings"], strict=True)
        for number, (master, slices) in enumerate(groups):
            state = rank["base_optimizer_state"]["state"].get(number, {})
            flat = {"weight": master.detach()} | {key: _moment(state, key, master) for key in MOMENTS}
            for name, part in slices.items():
                steps[name] = float(state.get("step", 0.0))
                for key, tensor in flat.items():
                    pieces[name][key].append(tensor.narrow(0, part.start, part.numel))
    return {
        name: Trained(step=steps[name], **{key: _whole(parts, shape) for key, parts in pieces[name].items()})
        for name, shape in shapes
    }


def _of_stage_3(ranks: list[dict[str, Any]], shapes: list[tuple[str, torch.Size]]) -> dict[str, Trained]:
    flats: dict[str, list[Tensor]] = {"weight": [torch.cat([*rank["fp32_flat_groups"]]) for rank in ranks]}
    for key in MOMENTS:
        flats[key] = []
        for rank in ranks:
            states = rank["optimizer_state_dict"]["state"]
            groups = enumerate(rank["fp32_flat_groups"])
            flats[key].append(torch.cat([_moment(states.get(number, {}), key, flat) for number, flat in groups]))
    step = float(ranks[0]["optimizer_state_dict"]["state"].get(0, {}).get("step", 0.0))
    trained, offset = {}, 0
    for name, shape in shapes:
        share = -(-shape.numel() // len(ranks))
        parts = {key: [flat.narrow(0, offset, share) for flat in of_ranks] for key, of_ranks in flats.items()}
        trained[name] = Trained(step=step, **{key: _whole(pieces, shape) for key, pieces in parts.items()})
        offset += share
    if any(len(flat) != offset for flat in flats["weight"]):
        raise RuntimeError(f"the parameters take {offset} numbers of each rank, the file has {len(flats['weight'][0])}")
    return trained


def _moment(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    """One of Adam's moments; zeros before the first step that was taken."""
    return state[key].detach().float() if key in state else torch.zeros_like(like, dtype=torch.float32).detach()


def _whole(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """Consecutive flat pieces, perhaps with padding behind the last, as a tensor of its own."""
    return torch.cat(pieces)[: shape.numel()].view(shape).float().clone()


def _frozen_or_all(checkpoint: Path, zero_stage: int) -> dict[str, Tensor]:
    """At stage 3 the frozen weights; below it all, in the precision of training."""
    if zero_stage < 3:
        return {name: tensor.float() for name, tensor in _model_states(checkpoint)["module"].items()}
    ranks = [load(path, mmap=True) for path in _of_ranks(checkpoint, "model_states")]
    return {
        name: _whole([rank["frozen_param_fragments"][name] for rank in ranks], shape)
        for name, shape in (ranks[0]["frozen_param_shapes"] or {}).items()
    }


def _model_states(checkpoint: Path) -> dict[str, Any]:
    """Of the first rank."""
    return load(next(iter(_of_ranks(checkpoint, "model_states"))))


def _of_ranks(checkpoint: Path, kind: str) -> list[Path]:
    """The files of one kind, in the order of the ranks that wrote them."""
    files = sorted(checkpoint.glob(f"*_{kind}.pt"), key=lambda path: writer_of(path.name))
    if not files:
        raise UserError(f"{checkpoint} has no file *_{kind}.pt")
    return files


def writer_of(name: str) -> int:
    """The rank that wrote a file: DeepSpeed puts it into the names of partitioned files, rank 0 writes the others."""
    _, found, rest = name.partition("zero_pp_rank_")
    return int(rest.split("_")[0]) if found else 0


def _deepspeed_classes() -> list[type]:
    """What DeepSpeed puts into its files besides tensors and plain values; making them runs nothing of the file's."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def read_skipped_steps(checkpoint: Path) -> int:
    """Steps that the run had skipped until this checkpoint."""
    return int(_model_states(checkpoint)["skipped_steps"])
