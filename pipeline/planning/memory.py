"""Bytes that a rank needs, by part: what DeepSpeed's ZeRO holds for a student, a teacher beside it, and a micro-batch.

T trained weights, F frozen ones of the student, N ranks, p = T / N; c bytes of a number that is computed with (2 or 4),
a of one that gradients are added up in.
The table is what DeepSpeed 0.19 allocates, read off its optimizers (docs/plan.md has it beside runs):

    stage 0, fp32   weights c (T + F)    gradients 4 T    optimizer 8 T
    stage 0, 16 bit weights c (T + F)    gradients c T    optimizer 12 T (with the fp32 weights)
    stage 1         weights c (T + F)    gradients a T    optimizer 12 p   buffer: a bucket
    stage 1, bf16   weights c (T + F)    gradients 6 T    optimizer 12 p   (gradients added up in fp32, a = 4)
    stage 2         weights c (T + F)    gradients 4 p    optimizer 12 p   buffers: c bucket, or two of them, and what
                                                                           is joined to be sent, for the backward pass
    stage 3         weights c (T + F)/N  gradients 4 p    optimizer 12 p   and weights gathered to be used

Gradients of a step of one micro-batch come with its backward pass and go with its update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import Recipe
from pipeline.engine.deepspeed_config import compute_dtype, offload, zero_stage
from pipeline.planning.models import Models
from pipeline.planning.trace import Trace

_BUCKET = 500_000_000  # DeepSpeed's own, in numbers
_PREFETCH = 50_000_000
GIGA = 1 << 30
# What a process on an accelerator holds besides tensors: the driver's context, the libraries' workspaces, NCCL's
# channels. Not measured here.
CONTEXT_BYTES = int(1.5 * GIGA)
# The same on a CPU beyond an interpreter that has imported everything: 88 to 91 MiB in runs of one, two and four ranks,
# of which 28 are code of the libraries that only a step reads in.
CPU_CONTEXT_BYTES = 90 << 20
# Scores of a thread's blocks in the loss and in attention on a CPU (relations/blocks.py): two of 2 MiB, and as much for
# their products.
CPU_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        device: part -> bytes, at the moment at which most is held.
        host: part -> bytes of this rank in the host's memory, besides the process itself (offload).
        moment: the phase at which most is held.
        phases: phase -> bytes held in it, static parts included.
        arithmetic: lines that show how the parts come about.
    """

    device: dict[str, int]
    host: dict[str, int]
    moment: str
    phases: dict[str, int]
    arithmetic: list[str]

    @property
    def total(self) -> int:
        return sum(self.device.values())


@dataclass(frozen=True, kw_only=True)
class _Student:
    """What ZeRO holds for one student: in every phase, and in some of them besides.

    Attributes:
        gathered: weights of other ranks, from the forward to the backward pass.
        ahead: those that arrive while others are used, in the forward pass.
    """

    weights: int
    gathered: int
    ahead: int
    gradients: int
    optimizer: int
    buffers: int
    backward: int
    update: int
    host: dict[str, int]
    gradients_are_fresh: bool
    words: str


def rank_memory(
    students: list[Models], config: dict[str, Any], traces: list[Trace], *, ranks: int, placement: str, on_cpu: bool,
    threads: int = 1,
) -> Memory:  # fmt: skip
    """Of one rank that trains students side by side; they share the teacher's forward pass.

    Args:
        config: merged with the recipe (`deepspeed_config.merge`).
        traces: of each student's micro-batch.
        ranks: of the job.
        placement: of the teacher: replica, zero3, zero3_cpu or zero3_nvme.
        threads: of a rank, on a CPU.
    """
    parts = [_student(models, config, ranks, on_cpu) for models in students]
    weights, gathered, host = _teacher(students[0], config, ranks, placement)
    first = traces[0]
    context = CPU_CONTEXT_BYTES if on_cpu else CONTEXT_BYTES
    buffers = sum(p.buffers for p in parts)
    scratch = threads * CPU_BLOCK_BYTES if on_cpu else _statistics(students, config)
    static = {
        "weights": sum(p.weights for p in parts),
        "gradients": sum(p.gradients for p in parts),
        "optimizer": sum(p.optimizer for p in parts),
        "teacher": weights,
        "buffers": buffers,
        "context": context,
    }
    several = config["gradient_accumulation_steps"] > 1
    waiting = max(trace.targets for trace in traces)  # the teacher's outputs are held until its next pass is over
    moments = {"teacher": {"teacher": gathered, "activations": first.teacher + several * waiting}}
    for number, (part, trace) in enumerate(zip(parts, traces, strict=True), 1):
        of = f" {number}" if len(parts) > 1 else ""
        moments[f"student{of}"] = {
            "weights": part.gathered + part.ahead,
            "activations": trace.student + waiting,
        }
        moments[f"loss{of}"] = {
            "weights": part.gathered,
            "activations": trace.kept + waiting + trace.loss,
            "loss": trace.loss + scratch,
        }
        backward = trace.backward_with_gradients if part.gradients_are_fresh else trace.backward
        moments[f"backward{of}"] = {
            "weights": part.gathered,
            "activations": backward - trace.loss + waiting,
            "loss": trace.loss,
            "buffers": part.backward,
        }
        moments[f"update{of}"] = {"gradients": part.update, "activations": waiting}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    held = sum(static.values())
    device = {name: size + moments[moment].get(name, 0) for name, size in static.items()}
    device |= {name: moments[moment].get(name, 0) for name in ("activations", "loss")}
    for part in parts:
        for name, size in part.host.items():
            host[name] = host.get(name, 0) + size
    return Memory(
        device=device,
        host=host,
        moment=moment,
        phases={name: held + sum(parts.values()) for name, parts in moments.items()},
        arithmetic=[*(p.words for p in parts), _teacher_words(students[0], config, ranks, placement)],
    )


def _student(models: Models, config: dict[str, Any], n: int, on_cpu: bool) -> _Student:
    stage, c = zero_stage(config), compute_dtype(config).itemsize
    sizes = models.trained
    t, f, largest = sum(sizes), models.frozen_parameters, max(sizes)
    p = -(-t // n)
    zero = config.get("zero_optimization", {})
    several = config.get("gradient_accumulation_steps", 1) > 1
    offloads = offload(config, "optimizer")["device"] != "none"
    a = 4 if config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else c
    bucket = int(zero.get("reduce_bucket_size", _BUCKET))
    bucket = min(bucket, t) if on_cpu else bucket  # pages that are never written to are not there
    # torch's AdamW makes two numbers a weight of each tensor it updates; the fused one on a GPU makes none.
    adam = (lambda numbers: 8 * numbers) if on_cpu else (lambda numbers: 0)
    host: dict[str, int] = {}
    gathered, ahead, backward, fresh = 0, 0, 0, False
    filled = min(bucket, t)
    joined = c * filled if n > 1 else 0  # the parts of a bucket that go to several ranks, joined to be sent
    wire = 4 * filled if c == 2 and config.get("communication_data_type", "fp32") == "fp32" else 0
    if stage == 0 and c == 4:
        weights, optimizer = c * (t + f), 8 * t
        gradients, fresh = (4 * t if several else 0), not several
        update, buffers = max(4 * min(t, _BUCKET) if n > 1 else 0, adam(largest)) + (0 if several else 4 * t), 0
    elif stage == 0:
        weights, optimizer, buffers = c * (t + f), 12 * t, 0
        gradients, fresh = (c * t if several else 0), not several
        # Each gradient in fp32, and all of them in one piece, before those in 16 bit go.
        update = max(c * t + 8 * t, 4 * t + adam(t)) - gradients
    elif stage == 1 and c < a == 4 and not offloads:  # DeepSpeed's BF16_Optimizer, which has no buckets
        weights, optimizer, gradients, buffers = c * (t + f), 12 * p, 4 * t + c * t, 0
        update = max(adam(p), 4 * largest)
    elif stage == 1:
        weights, optimizer, buffers = c * (t + f), 12 * p, 0 if on_cpu else a * bucket
        gradients = a * t if several or a != c else 0
        fresh = not gradients
        # A gradient goes when it has been copied into the bucket; the optimizer has those of its part, and a copy.
        update = max(a * t + (a * filled if on_cpu and n > 1 else 0), 8 * p + adam(p)) - gradients
    elif stage == 2:
        weights, optimizer, buffers = c * (t + f), 12 * p, 0
        gradients, fresh = (4 * p if several else 0), on_cpu
        overlaps = 2 if zero.get("overlap_comm", False) else 1
        # Buckets come with the first gradient and go with the last; on a CPU they fill while activations go.
        backward = 0 if on_cpu else (0 if several else 4 * p) + c * bucket * overlaps + joined + wire
        update = max(4 * t + joined if on_cpu else 0, 8 * p + adam(p) - gradients)
    else:
        live = min(t + f, int(zero.get("stage3_max_live_parameters", 1e9)))
        coming = min(t + f, int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)) + largest)
        away = offload(config, "param")["device"]
        if n > 1 or away != "none":
            gathered, ahead = c * live, c * coming
        weights = 0 if away != "none" else -(-c * (t + f) // n)
        if away == "cpu":
            host["weights"] = c * (t + f) // n
        optimizer, gradients = 12 * p, 4 * p
        buffers, update = c * bucket + wire, 4 * p + adam(p)
    words = _words(stage, c, t, f, n, dict(weights=weights, gradients=gradients, optimizer=optimizer, buffers=buffers))
    if offloads:
        host |= {"optimizer": optimizer + (c * p if stage < 3 else 0), "gradients": 4 * p}
        optimizer, gradients, update = 0, 0, c * largest
    return _Student(
        weights=weights, gathered=gathered, ahead=ahead, gradients=gradients, optimizer=optimizer, buffers=buffers,
        backward=backward, update=update, host=host, gradients_are_fresh=fresh, words=words,
    )  # fmt: skip


def _teacher(models: Models, config: dict[str, Any], n: int, placement: str) -> tuple[int, int, dict[str, int]]:
    """Bytes of the frozen teacher that are held always, those of its pass, and those on the host."""
    size, c = models.teacher_parameters, compute_dtype(config).itemsize
    if placement == "replica":
        return c * size, 0, {}
    largest = max(p.numel() for p in models.teacher.parameters())
    gathered = 2 * c * min(size, _PREFETCH + largest)
    if placement == "zero3":
        return -(-c * size // n), gathered, {}
    return 0, gathered, {"teacher": -(-c * size // n)} if placement == "zero3_cpu" else {}


def _statistics(students: list[Models], config: dict[str, Any]) -> int:
    """What the kernels keep: four numbers a relation head and position, for each pair."""
    recipe: Recipe = students[0].recipe
    micro = config["train_micro_batch_size_per_gpu"]
    heads = max(m.recipe.relations.heads * len(m.recipe.relations.pairs) for m in students)
    return 16 * micro * recipe.data.seq_tokens * heads


def _words(stage: int, c: int, t: int, f: int, n: int, found: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {size / GIGA:.2f}" for name, size in found.items() if size)
    return (
        f"student, ZeRO {stage}, {n} ranks: T = {t:,} trained and F = {f:,} frozen weights, {c} bytes a number: "
        f"{shown} GiB"
    )


def _teacher_words(models: Models, config: dict[str, Any], n: int, placement: str) -> str:
    size, c = models.teacher_parameters, compute_dtype(config).itemsize
    share = "" if placement == "replica" else f" / {n} ranks"
    held = _teacher(models, config, n, placement)[0] / GIGA
    return f"teacher, {placement}: {size:,} weights x {c} bytes{share} = {held:.2f} GiB"
