"""The recipe: everything that decides what is learned, as frozen dataclasses that check themselves.

A recipe never says how a run fits its machines (ZeRO stage, offload, precision, micro-batch): that is the DeepSpeed
configuration's, see `pipeline.engine.deepspeed_config`. Recipes as files: `pipeline.recipes`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=1e-9, le=1e9)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PairName = Literal["qq", "kk", "vv", "qk", "qv", "kq", "kv", "vq", "vk"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Run:
    """Where a run lives.

    Attributes:
        output: folder of recipe.toml, checkpoints/, tensorboard/, metrics.jsonl and export/.
        seed: of the sample order, the student's initial weights and dropout.
    """

    output: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Teacher:
    """The frozen teacher.

    Attributes:
        model: hub id or local folder.
        layer: whose queries, keys and values are learned; the first layer is 1.
        placement: a replica on every rank, or partitioned over the ranks by ZeRO-3, its pieces on the device, in the
            host's memory, or on NVMe; "auto" decides by the memory that is free and says why.
        nvme_path: folder on a fast local disk, for "zero3_nvme".
        trust_remote_code: run model code that comes with the weights.
    """

    model: str
    layer: Positive
    placement: Literal["auto", "replica", "zero3", "zero3_cpu", "zero3_nvme"] = "auto"
    nvme_path: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Student:
    """The student's architecture and first weights.

    Attributes:
        shape: layers x hidden size, such as "6x384".
        heads: attention heads.
        feed_forward: inner size of the feed-forward; four times the hidden size if absent.
        family: the teacher's architecture, or BERT's with the teacher's vocabulary.
        init: the first weights, see `pipeline.encoders.models.build_student`.
        tail_init: of the last layer's part behind its queries, keys and values, which the loss never trains.
        dropout: of hidden states and attention.
    """

    shape: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,2}x[1-9][0-9]{0,5}$")]
    heads: Positive = 12
    feed_forward: Positive | None = None
    family: Literal["teacher", "bert"] = "teacher"
    init: str = "random"
    tail_init: str = "random"
    dropout: Fraction = 0.1


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Relations:
    """The relations of Wang et al. (2021), section 3.

    Attributes:
        heads: relation heads A_r; must divide the hidden sizes of teacher and student.
        pairs: weight of each relation; q, k, v stand for queries, keys, values.
        implementation: of the loss, see `pipeline.relations.loss.relation_loss`.
        layers: several pairs of layers instead of the one, for studies: [teacher layer, student layer, weight] each,
            rising, the last pair being `teacher.layer` and the student's last layer.
    """

    heads: Positive
    pairs: Annotated[dict[PairName, Weight], Field(min_length=1)] = Field(
        default_factory=lambda: dict(qq=1.0, kk=1.0, vv=1.0)
    )
    implementation: Literal["auto", "reference", "chunked", "triton"] = "auto"
    layers: Annotated[tuple[tuple[Positive, Positive, Weight], ...], Field(min_length=1)] | None = None

    def loss_names(self) -> list[str]:
        """What the parts of the loss are called: `qq`, or `1.qq` for the first of several pairs of layers."""
        if self.layers is None:
            return list(self.pairs)
        return [f"{number}.{pair}" for number in range(1, len(self.layers) + 1) for pair in self.pairs]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Data:
    """Which samples come in which order; the fields are those of `pipeline.data.loader.DataOptions`.

    Attributes:
        corpus: folder made by `minilm prepare`.
        seq_tokens: positions of a sample, special tokens included.
        verify: at the start of a run, "sizes" of all shards, or "checksums" as well, which reads every byte once.
    """

    corpus: str
    seq_tokens: Annotated[int, Field(ge=8)]
    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]] | None = None
    temperature_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    attention: Literal["window", "document"] = "window"
    packing: Literal["window", "none"] = "window"
    block_samples: Annotated[int, Field(ge=0, le=1 << 40)] = 0
    shift_windows: bool = False
    verify: Literal["sizes", "checksums"] = "sizes"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Optimizer:
    """AdamW and its schedule.

    Attributes:
        global_batch_samples: samples of one optimizer step, over all ranks and micro-batches.
        schedule: of the learning rate after the warm-up, down to zero at the last step.
        clip_norm: largest norm of the gradient; 0 leaves it alone.
        weight_decay: of matrices; norms and biases do not decay.
    """

    global_batch_samples: Positive
    steps: Positive
    peak_lr: Annotated[float, Field(gt=0, le=1e30)]
    warmup_steps: NotNegative
    schedule: Literal["linear", "cosine"] = "linear"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=1e-20, le=1.0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.01
    clip_norm: Annotated[float, Field(ge=0)] = 1.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Checkpoint:
    """When checkpoints are written and which are kept: the last `keep_last`, and every `keep_every_steps`-th step.

    `stop_after_skipped_steps` steps in a row whose loss or gradient was not finite end the run, saved as it was before.
    """

    every_steps: Positive
    keep_last: Positive = 3
    keep_every_steps: NotNegative = 0
    stop_after_skipped_steps: Positive = 25


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Logging:
    """When the loss is logged and when the held-out loss is measured (at the first and last step in any case).

    Attributes:
        probe: labelled texts, JSON lines of `text` and `label` or `topic`; with the held-out loss the accuracy of a
            linear probe on the student's features is measured.
        hang_seconds: when no step ends for so long, every rank prints the stacks of its threads.
    """

    every_steps: Positive = 10
    validate_every_steps: NotNegative = 0
    validation_samples: Positive = 256
    probe: Annotated[str, Field(min_length=1)] | None = None
    hang_seconds: Annotated[int, Field(gt=0, le=10_000_000)] = 900


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Recipe:
    """One distillation run. `pipeline.recipes` reads and writes it."""

    run: Run
    teacher: Teacher
    student: Student
    relations: Relations
    data: Data
    optimizer: Optimizer
    checkpoint: Checkpoint
    logging: Logging = Field(default_factory=Logging)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are absent (TOML has no null)."""
        sections = dataclasses.asdict(self)
        return {name: {k: v for k, v in section.items() if v is not None} for name, section in sections.items()}

    def as_text(self) -> str:
        """One line a key, indented as Markdown shows it unchanged."""
        sections = self.to_dict().items()
        return "\n".join(
            f"    {name}.{key} = {value!r}" for name, section in sections for key, value in section.items()
        )

    def learned(self) -> dict[str, Any]:
        """The part that decides the weights: what a checkpoint must agree with."""
        sections = self.to_dict()
        sections["run"] = {"seed": self.run.seed}
        for name in ("checkpoint", "logging"):
            del sections[name]
        # Where teacher and corpus lie does not count: what they are is compared by fingerprints.
        for name in ("model", "placement", "nvme_path"):
            sections["teacher"].pop(name, None)
        del sections["data"]["corpus"]
        del sections["relations"]["implementation"]
        del sections["data"]["verify"]
        return sections

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.learned(), sort_keys=True).encode()).hexdigest()


def flat(table: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables, each under its keys joined by `separator`."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value
