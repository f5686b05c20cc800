"""What a run will take: which configurations fit, which is chosen, how long it lasts, what it costs and writes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import Recipe
from pipeline.encoders.flops import student_flops, teacher_flops
from pipeline.engine import deepspeed_config
from pipeline.planning.memory import Memory, rank_memory
from pipeline.planning.models import Models, models_of
from pipeline.planning.rates import Rates
from pipeline.planning.steps import Step, step_of
from pipeline.planning.totals import Totals, totals_of
from pipeline.planning.trace import Trace, trace
from pipeline.training import company

ON_GPUS = ("zero1", "zero0", "zero2", "zero3", "zero2_offload", "zero3_offload")
ON_CPUS = ("cpu",)
PLACEMENTS = ("replica", "zero3", "zero3_cpu")
# Of a device's memory: the allocator's gaps take the rest. Of the machine's, where freed blocks stay with the process.
USABLE_SHARE, USABLE_SHARE_OF_CPU = 0.9, 0.75
LARGEST_MICRO_BATCH = 128
NEARLY = 1.1  # a simpler configuration is taken for a step that is so much longer
CURVE = tuple(2**k for k in range(10))


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What the job runs on."""

    nodes: int
    gpus_per_node: int
    rates: Rates
    bf16: bool = True
    threads: int = 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way to run it.

    Attributes:
        name: of the DeepSpeed configuration.
        config: merged with the recipe.
        placement: of the teacher.
        fits: whether its memory does.
    """

    name: str
    config: dict[str, Any]
    placement: str
    memory: Memory
    step: Step
    fits: bool

    @property
    def micro_batch(self) -> int:
        return self.config["train_micro_batch_size_per_gpu"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number of devices on the scaling curve; `step` is None where the global batch cannot be shared by so many."""

    ranks: int
    step: Step | None
    micro_batch: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `minilm plan` says."""

    students: list[Models]
    machines: Machines
    options: list[Option]
    chosen: Option | None
    totals: Totals | None
    curve: list[Point]


class Planner:
    """The sizes of some students that share a teacher, and what follows from them for any machines.

    Args:
        recipes: one for each student.
        vocabulary: of a trimmed vocabulary; the teacher's if absent.

    Raises:
        UserError: the recipes cannot share a teacher's pass, or one of them is impossible.
    """

    def __init__(self, recipes: Sequence[Recipe], *, vocabulary: int | None = None) -> None:
        different = list({id(recipe): recipe for recipe in recipes}.values())
        company.check(different, {})
        deepest = max(company.teacher_layers(recipes))
        unique = {id(r): models_of(r, vocabulary=vocabulary, teacher_layer=deepest) for r in different}
        self.students = [unique[id(recipe)] for recipe in recipes]
        self.recipe = recipes[0]
        self._trace = functools.lru_cache(maxsize=None)(self._traced)

    def shapes(self, samples: int) -> list[tuple[int, int, int]]:
        """Of the matrix products of a micro-batch: rows, inner, columns."""
        works = [work for t in self._trace(samples, torch.float32, True, False) for work in t.work.values()]
        return sorted({shape for work in works for shape in work.products})

    def widths(self) -> list[int]:
        """Of attention heads and relation heads."""
        found = []
        for models in self.students:
            for encoder in (models.teacher, models.student):
                hidden = encoder.config.hidden_size
                found += [hidden // encoder.config.num_attention_heads, hidden // models.recipe.relations.heads]
        return found

    def plan(self, machines: Machines, *, ds_config: str = "auto", text_bytes: float | None = None) -> Plan:
        """What a run on these machines takes.

        Args:
            ds_config: a shipped configuration or a file; "auto" compares the shipped ones.
            text_bytes: of the corpus's text, where it is not prepared yet.
        """
        options = self.options(machines, ds_config)
        # zero0 adds up gradients in bf16 and is there to compare with (ds_configs/README.md).
        fitting = [option for option in options if option.fits and (option.name != "zero0" or ds_config != "auto")]
        least = min((option.step.total for option in fitting), default=0.0)
        chosen = next((option for option in fitting if option.step.total <= NEARLY * least), None)
        return Plan(
            students=self.students,
            machines=machines,
            options=options,
            chosen=chosen,
            totals=None
            if chosen is None
            else totals_of(self.students, chosen.config, chosen.step, machines.ranks, text_bytes),
            curve=[] if chosen is None else self.curve(chosen, machines),
        )

    def options(self, machines: Machines, ds_config: str) -> list[Option]:
        """The best micro-batch of each configuration and placement."""
        named = [ds_config] if ds_config != "auto" else ON_CPUS if machines.rates.is_cpu else ON_GPUS
        placement = self.recipe.teacher.placement
        places = PLACEMENTS[: 1 if machines.ranks == 1 else 2] if placement == "auto" else (placement,)
        found = []
        for name in named:
            config = deepspeed_config.read_ds_config(name)
            deepspeed_config.check(config)
            config = _for_device(config, machines)
            for place in places:
                found.append(self._best(name, config, place, machines, free=ds_config == "auto"))
        if placement == "auto" and machines.ranks == 1 and not any(option.fits for option in found):
            found.append(self._best(named[0], _for_device(deepspeed_config.read_ds_config(named[0]), machines),
                                    "zero3_cpu", machines, free=ds_config == "auto"))  # fmt: skip
        return found

    def option(self, name: str, config: dict[str, Any], placement: str, machines: Machines) -> Option:
        """A configuration as it is, with its own micro-batch."""
        merged = deepspeed_config.merge(self.recipe, config, world_size=machines.ranks)
        dtype, on_cpu = deepspeed_config.compute_dtype(config), machines.rates.is_cpu
        again = "activation_checkpointing" in config
        traces = self._trace(merged["train_micro_batch_size_per_gpu"], dtype, on_cpu, again)
        memory = rank_memory(
            self.students, merged, traces, ranks=machines.ranks, placement=placement, on_cpu=on_cpu,
            threads=machines.threads,
        )  # fmt: skip
        step = step_of(
            self.students, merged, traces, machines.rates, ranks=machines.ranks,
            gpus_per_node=machines.gpus_per_node, placement=placement, flops=self.flops(),
        )  # fmt: skip
        share = USABLE_SHARE_OF_CPU if on_cpu else USABLE_SHARE
        fits = memory.total <= share * machines.rates.memory
        return Option(name=name, config=merged, placement=placement, memory=memory, step=step, fits=fits)

    def flops(self) -> float:
        """Model operations of a step over all ranks; the teacher's pass counts once."""
        sizes = dict(
            seq_tokens=self.recipe.data.seq_tokens, global_batch_samples=self.recipe.optimizer.global_batch_samples
        )
        relations = [len(m.recipe.relations.loss_names()) for m in self.students]
        teacher = teacher_flops(self.students[0].teacher, relations=sum(relations), **sizes)
        each = zip(self.students, relations, strict=True)
        return teacher + sum(student_flops(m.student, relations=count, **sizes) for m, count in each)

    def curve(self, chosen: Option, machines: Machines) -> list[Point]:
        """Steps on other numbers of the same devices, with the chosen configuration."""
        points = []
        for ranks in CURVE:
            if self.recipe.optimizer.global_batch_samples % ranks:
                points.append(Point(ranks=ranks, step=None))
                continue
            per_node = min(ranks, machines.gpus_per_node)
            others = dataclasses.replace(machines, nodes=ranks // per_node or 1, gpus_per_node=per_node)
            if others.ranks != ranks:  # a machine of three, say
                others = dataclasses.replace(machines, nodes=ranks, gpus_per_node=1)
            plain = self._unmerged(chosen)
            option = self.option(chosen.name, plain, chosen.placement, others)
            points.append(Point(ranks=ranks, step=option.step, micro_batch=option.micro_batch))
        return points

    def _best(self, name: str, config: dict[str, Any], placement: str, machines: Machines, *, free: bool) -> Option:
        """The fastest micro-batch that fits, or the smallest if none does."""
        if not free:
            return self.option(name, config, placement, machines)
        share = self.recipe.optimizer.global_batch_samples // machines.ranks
        deepspeed_config.merge(self.recipe, config, world_size=machines.ranks)  # says what is wrong with it
        largest = min(share, LARGEST_MICRO_BATCH)
        sizes = [size for size in range(largest, 0, -1) if share % size == 0]
        best = None
        for size in sizes[:4] + sizes[-1:]:
            option = self.option(name, {**config, "train_micro_batch_size_per_gpu": size}, placement, machines)
            if option.fits and (best is None or not best.fits or option.step.total < 0.99 * best.step.total):
                best = option
            elif best is None or (not best.fits and option.memory.total < best.memory.total):
                best = option
        return best

    def _unmerged(self, option: Option) -> dict[str, Any]:
        own = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping", "zero_allow_untested_optimizer")
        return {key: value for key, value in option.config.items() if key not in (*own, "steps_per_print")}

    def written(self, option: Option) -> dict[str, Any]:
        """The option as a DeepSpeed configuration that `--ds-config` takes."""
        config = self._unmerged(option)
        if "fp16" not in config:  # which a machine without a GPU refuses, though others take it
            deepspeed_config.check(config)
        return config

    def _traced(self, samples: int, dtype: torch.dtype, on_cpu: bool, again: bool) -> list[Trace]:
        done: dict[int, Trace] = {}
        for models in self.students:
            if id(models) not in done:
                typed = models.in_type(dtype)
                if again:
                    typed.student.checkpoint_activations()
                sizes = dict(samples=samples, positions=self.recipe.data.seq_tokens)
                done[id(models)] = trace(typed.teacher, typed.student, on_cpu=on_cpu, **sizes)
        return [done[id(models)] for models in self.students]


def _for_device(config: dict[str, Any], machines: Machines) -> dict[str, Any]:
    """fp16 instead of bf16 on devices without."""
    if machines.bf16 or not config.get("bf16", {}).get("enabled"):
        return config
    without = ("bf16", "data_types")
    return {**{key: value for key, value in config.items() if key not in without}, "fp16": {"enabled": True}}
