"""Where the teacher's weights live: a replica on every rank, or partitioned over the ranks in a ZeRO-3 engine.

A partitioned teacher is built empty inside `zero.Init`, so that every parameter is cut as soon as it exists, and filled
tensor by tensor from its safetensors files: no rank ever holds the whole. Its engine has no optimizer.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import UserError, first_line
from pipeline.config import Teacher
from pipeline.encoders.architectures import without_pooler
from pipeline.encoders.models import RelationEncoder, load_teacher, teacher_config, with_layers
from pipeline.engine.deepspeed_config import compute_dtype
from pipeline.engine.operators import import_deepspeed, initialize, load_async_io
from pipeline.engine.process_group import device
from pipeline.engine.student import set_buffers

_SAMPLES, _SAMPLE_BYTES = 32, 1 << 13
REPLICA_SHARE = 0.25  # of the memory that is free: the rest is for the student, its optimizer and activations


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was decided, and why, in words for the log."""

    kind: str
    reason: str


def choose(teacher: Teacher, *, dtype: torch.dtype, free_bytes: int, world_size: int) -> Placement:
    """Resolve `teacher.placement`; "auto" takes a replica where it fits into a share of the free memory.

    Args:
        teacher: of the recipe.
        dtype: of the weights.
        free_bytes: memory that is free on this rank's device.
        world_size: ranks to partition over.
    """
    if teacher.placement != "auto":
        return Placement(kind=teacher.placement, reason="as the recipe says")
    parameters = count_parameters(teacher)
    needed = parameters * dtype.itemsize
    words = f"{parameters / 1e6:,.0f} M parameters take {needed / 2**30:.2f} of {free_bytes / 2**30:.1f} GiB free"
    if needed <= REPLICA_SHARE * free_bytes:
        return Placement(kind="replica", reason=words)
    if world_size > 1 and needed / world_size <= REPLICA_SHARE * free_bytes:
        return Placement(kind="zero3", reason=f"{words}; {world_size} ranks share them")
    return Placement(kind="zero3_cpu", reason=f"{words}, too much even for a share of {world_size} ranks")


def count_parameters(teacher: Teacher) -> int:
    """Of the teacher up to its layer."""
    return sum(_parameter_sizes(teacher))


def _parameter_sizes(teacher: Teacher) -> list[int]:
    """Of each parameter up to the teacher's layer; nothing is allocated."""
    with torch.device("meta"):
        return [p.numel() for p in _empty_backbone(teacher).parameters()]


def free_bytes(local_ranks: int) -> int:
    """Memory free for this rank: on its GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available // local_ranks


def start_teacher(
    teacher: Teacher, placement: Placement, ds_config: dict[str, Any], layers: tuple[int, ...] | None = None
) -> nn.Module:
    """The frozen teacher, in eval mode, ending at the projections of its layer.

    Args:
        teacher: of the recipe.
        placement: of `choose`.
        ds_config: the run's merged DeepSpeed configuration; its precision is the teacher's.
        layers: several layers to return instead of `teacher.layer`, which is the last of them.

    Returns:
        A module whose forward is `RelationEncoder.forward`.
    """
    dtype = compute_dtype(ds_config)
    if placement.kind == "replica":
        trust = teacher.trust_remote_code
        return load_teacher(
            teacher.model, layer=layers or teacher.layer, dtype=dtype, device=device(), trust_remote_code=trust
        )
    import torch._dynamo  # noqa: F401  zero.Init replaces Tensor.__new__, and this module must have seen the original

    deepspeed = import_deepspeed()
    config = _zero3_config(teacher, placement.kind, ds_config)
    buffers = dict(_empty_backbone(teacher).named_buffers())
    # The configuration carries the precision: the argument `dtype` is not heeded on a device without fp16.
    with deepspeed.zero.Init(config_dict_or_path=config), _default_dtype(dtype):
        encoder = RelationEncoder(_empty_backbone(teacher), layers).requires_grad_(False)
    _check_dtype(encoder, dtype)
    _fill(encoder.backbone, weight_files(teacher.model))
    engine = initialize(model=encoder.eval(), config=config, dist_init_required=False)
    set_buffers(encoder.backbone, buffers)
    engine.eval()
    return engine


def teacher_fingerprint(model: str) -> str:
    """What a teacher is, wherever it lies: of its configuration, and of its weights' names, shapes, sizes and samples.

    A few hundred kilobytes are read of each file, spread evenly.
    """
    digest = hashlib.sha256()
    config = json.loads(Path(_cached(model, "config.json")).read_bytes())
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for path in weight_files(model):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))  # the header: names, shapes and types
            for number in range(1, _SAMPLES):
                file.seek(size * number // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _cached(model: str, name: str) -> str:
    """A file of a local folder or a hub model."""
    from transformers.utils import cached_file

    try:
        return cached_file(os.path.expanduser(model), name)
    except OSError as error:
        raise UserError(f"cannot find {name} of {model!r}: {first_line(error)}") from error


def weight_files(model: str) -> list[Path]:
    """The safetensors files of a local folder or a hub model."""
    from transformers.utils import cached_file

    try:
        index = cached_file(model, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else []
        return [Path(cached_file(model, name)) for name in names or ["model.safetensors"]]
    except OSError as error:
        raise UserError(f"cannot find the safetensors weights of {model!r}: {first_line(error)}") from error


def _zero3_config(teacher: Teacher, kind: str, ds_config: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 10_000}
    if kind == "zero3_cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if kind == "zero3_nvme":
        load_async_io()
        # A folder of its own: DeepSpeed names files by a parameter's number, and the student's may lie there too.
        folder = Path(teacher.nvme_path) / "teacher"
        folder.mkdir(exist_ok=True)
        # Its buffers hold a rank's share of one parameter each; what DeepSpeed takes by default is too small for the
        # embeddings of a large vocabulary, and too much for other teachers.
        share = -(-max(_parameter_sizes(teacher)) // dist.get_world_size())
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": str(folder),
            "buffer_size": share + 1024,
            "buffer_count": 3,
        }
    precision = {name: ds_config[name] for name in ("bf16", "fp16") if name in ds_config}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 1 << 62, **precision}


def _empty_backbone(teacher: Teacher):
    """The truncated encoder with weights that mean nothing yet."""
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    config = with_layers(teacher_config(teacher.model, teacher.trust_remote_code), teacher.layer)
    with no_init_weights():
        return AutoModel.from_config(config, trust_remote_code=teacher.trust_remote_code, **without_pooler(config))


def _fill(backbone, files: list[Path]) -> None:
    """Copy every weight from the files into its partitioned place; rank 0 reads, one tensor at a time."""
    zero = import_deepspeed().zero
    missing = dict(backbone.named_parameters())
    for name, tensor in _tensors(files, f"{backbone.base_model_prefix}."):
        parameter = missing.pop(name, None)
        if parameter is None:
            continue
        with zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                parameter.copy_(tensor())
    if missing:
        raise UserError(f"{files[0].parent} lacks {len(missing)} of the teacher's weights, such as {min(missing)}")


def _check_dtype(encoder: nn.Module, dtype: torch.dtype) -> None:
    """What DeepSpeed made must be what was asked for: a teacher of another precision gives another loss, unseen."""
    if others := {p.dtype for p in encoder.parameters()} - {dtype}:
        raise RuntimeError(f"the partitioned teacher has weights of {others}, asked for was {dtype}")


def _tensors(files: list[Path], prefix: str) -> Iterator[tuple]:
    """(name in the backbone, function that reads the tensor), in the same order on every rank."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                plain = name.removeprefix(prefix).replace("LayerNorm.gamma", "LayerNorm.weight")
                yield plain.replace("LayerNorm.beta", "LayerNorm.bias"), partial(file.get_tensor, name)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
