"""Operations, seconds and bytes on the wire of one optimizer step.

S positions, A relation heads, T and H hidden sizes of teacher and student. What the trace of a micro-batch leaves out
is added here:

    attention, forward     4 S H a token and layer, S heads exponentials; on a CPU with dropout twice that exponentials
    attention, backward    10 S H a token and layer (scores again, and the gradients of five products)
    relation loss          a pair and token: 2 S (2 T + 2 H) + 2 S H x 2 + 2 S H x 2 and 4 A S exponentials on a GPU,
                           2 A S on a CPU, where sums and gradients come out of one pass
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.engine.deepspeed_config import compute_dtype, offload, zero_stage
from pipeline.planning import rates as assumed
from pipeline.planning.counting import Work
from pipeline.planning.models import Models
from pipeline.planning.rates import Rates
from pipeline.planning.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of one rank.

    Attributes:
        seconds: part -> seconds; `launches` is what the device waits for Python, `wire` what is not hidden behind the
            backward pass.
        tokens: of the step over all ranks.
        flops: model operations over all ranks, as `pipeline.encoders.flops` counts them.
        wire_bytes: that one rank sends.
        binds: which of the parts is the longest, in words.
    """

    seconds: dict[str, float]
    tokens: int
    flops: float
    wire_bytes: float
    binds: str

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def step_of(
    students: list[Models], config: dict[str, Any], traces: list[Trace], rates: Rates, *, ranks: int,
    gpus_per_node: int, placement: str, flops: float,
) -> Step:  # fmt: skip
    """The step of students that share a teacher's pass."""
    recipe = students[0].recipe
    micro, several = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    positions = recipe.data.seq_tokens
    busy, host = {}, 0.0
    launches = traces[0].work["teacher"].launches
    busy["teacher"] = _seconds(traces[0].work["teacher"], rates) + _attention(
        students[0].teacher, traces[0].fused_attention["teacher"], micro, positions, rates, backward=False
    )
    for models, trace in zip(students, traces, strict=True):
        fused, drops = trace.fused_attention["student"], models.recipe.student.dropout > 0
        sizes = (models.student, fused, micro, positions, rates)
        for phase in ("student", "backward"):
            spent = _seconds(trace.work[phase], rates) + _attention(*sizes, backward=phase == "backward", drops=drops)
            busy[phase] = busy.get(phase, 0.0) + spent
            launches += trace.work[phase].launches
        busy["loss"] = busy.get("loss", 0.0) + _loss(models, micro, positions, rates)
        launches += 12 * len(models.recipe.relations.loss_names())
        if not rates.is_cpu:
            host += assumed.HOOK_SECONDS * len(models.trained)
    seconds = {name: spent * several for name, spent in busy.items()}
    waits = several * (launches * rates.launch + host)
    seconds["launches"] = max(0.0, waits - sum(seconds.values()))
    seconds["update"] = sum(_update(m, config, ranks, rates) for m in students)
    sent, hidden = _wire(students, config, ranks, placement)
    link = link_of(rates, ranks=ranks, gpus_per_node=gpus_per_node)
    on_wire = sent / link + 2 * math.ceil(math.log2(ranks)) * assumed.LATENCY_SECONDS * 10 if ranks > 1 else 0.0
    can_hide = 0.5 * seconds["backward"] if hidden else 0.0
    seconds["wire"] = max(0.0, on_wire - can_hide)
    seconds["host"] = 0.0 if rates.is_cpu else _through_host(students, config, ranks, placement)
    longest = max(seconds, key=seconds.get)
    words = {"launches": "launches", "wire": "the wire", "host": "the host's memory", "update": "the update"}
    return Step(
        seconds=seconds,
        tokens=recipe.optimizer.global_batch_samples * positions,
        flops=flops,
        wire_bytes=sent,
        binds=words.get(longest, "computing"),
    )


def _seconds(work: Work, rates: Rates) -> float:
    """Of what was traced."""
    spent = work.flops / rates.products
    for kind, size in work.bytes.items():
        special = {"gelu": rates.gelu, "random": rates.random}.get(kind)
        spent += size / rates.bandwidth if special is None else work.elements[kind] / special
    return spent


def _attention(
    encoder, fused: bool, samples: int, positions: int, rates: Rates, *, backward: bool, drops=False
) -> float:
    """Of all layers but the last, of a micro-batch."""
    if not fused:
        return 0.0
    config = encoder.config
    layers = len(encoder.architecture.layer_list(encoder.backbone)) - 1
    scores = layers * samples * config.num_attention_heads * positions**2
    width = config.hidden_size // config.num_attention_heads
    products = 2 * scores * width * (5 if backward else 2)
    if not rates.is_cpu:
        return products / rates.products + scores / rates.exponentials
    spent = products / rates.narrow.get(width, rates.products)
    # Without dropout a fused kernel makes one pass; with it, cpu_attention.py makes several over a block in the cache.
    exponentials, passes = (1, 6 if backward else 2) if not drops else ((1, 8) if backward else (2, 6))
    spent += scores * (exponentials / rates.exponentials + passes / rates.in_cache)
    return spent + (scores / rates.masks if drops else 0.0)


def _loss(models: Models, samples: int, positions: int, rates: Rates) -> float:
    """Of a micro-batch with its gradient."""
    relations = models.recipe.relations
    pairs, heads = len(relations.loss_names()), relations.heads
    scores = pairs * samples * heads * positions**2
    wide, small = (e.config.hidden_size // heads for e in (models.teacher, models.student))
    if not rates.is_cpu:
        flops = 2 * scores * (2 * max(wide, 16) + 5 * max(small, 16))
        return flops / rates.products + 4 * scores / rates.exponentials
    teacher = 2 * scores * wide * 2 / rates.narrow.get(wide, rates.products)
    student = 2 * scores * small * 5 / rates.narrow.get(small, rates.products)
    return teacher + student + scores * 2 / rates.exponentials


def _update(models: Models, config: dict[str, Any], ranks: int, rates: Rates) -> float:
    """AdamW and what DeepSpeed copies around it; bytes a weight by the number of times that it is read and written."""
    trained, stage = sum(models.trained), zero_stage(config)
    own = trained / (ranks if stage else 1)
    copied = 3 * 8 * trained if stage else 4 * trained  # into buckets, the partition, and the weights again
    norm = 20 * own  # in fp64
    adam = (80 if rates.is_cpu else 28) * own  # torch's plain form makes twenty passes, the fused one seven
    return (copied + norm + adam) / (rates.new_memory or rates.bandwidth) + (
        0.0 if rates.is_cpu else assumed.STEP_SECONDS
    )


def _wire(students: list[Models], config: dict[str, Any], ranks: int, placement: str) -> tuple[float, bool]:
    """Bytes that a rank sends in a step (ds_configs/README.md), and whether they go beside the backward pass."""
    c, stage, several = compute_dtype(config).itemsize, zero_stage(config), config["gradient_accumulation_steps"]
    share = (ranks - 1) / ranks
    wire = 4 if config.get("communication_data_type", "fp32") == "fp32" else 2
    sent = 0.0
    for models in students:
        trained, whole = sum(models.trained), models.student_parameters
        sent += 2 * share * wire * trained * (several if stage > 1 else 1)
        sent += share * c * trained if stage in (1, 2) else 0.0
        sent += 2 * share * c * whole * several if stage == 3 else 0.0
    if placement != "replica":
        sent += share * c * students[0].teacher_parameters * several
    return sent, stage > 1 and bool(config["zero_optimization"].get("overlap_comm", stage == 3))


def link_of(rates: Rates, *, ranks: int, gpus_per_node: int) -> float:
    """Bytes a second of a collective's ring; between machines it runs over all of a machine's adapters at once."""
    return rates.link if ranks <= gpus_per_node else min(rates.link, rates.network * gpus_per_node)


def _through_host(students: list[Models], config: dict[str, Any], ranks: int, placement: str) -> float:
    """Seconds of what is offloaded: gradients down, weights up, AdamW there; a teacher's share up for each pass."""
    c, several = compute_dtype(config).itemsize, config["gradient_accumulation_steps"]
    moved = 0.0
    for models in students:
        own = sum(models.trained) / ranks
        if offload(config, "optimizer")["device"] != "none":
            moved += (c * several + c + 28) * own
        if offload(config, "param")["device"] != "none":
            moved += 2 * c * models.student_parameters / ranks * several
    if placement in ("zero3_cpu", "zero3_nvme"):
        moved += c * students[0].teacher_parameters / ranks * several
    return moved / assumed.HOST_BYTES_A_SECOND
