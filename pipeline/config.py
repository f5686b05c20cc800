"""The recipe: everything that decides what is learned, read from TOML into frozen dataclasses and checked.

A recipe never says how a run fits its machines (ZeRO stage, offload, precision, micro-batch): that is the DeepSpeed
configuration's, see `pipeline.engine.deepspeed_config`. Strings may hold `${NAME}`, taken from the environment;
`${MINILM_HOME}` always has a value (`data_prep.samples.home`).
"""

import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep import durable, samples
from data_prep.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

RECIPES = Path(__file__).resolve().parent.parent / "launch" / "recipes"
_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_LARGEST_FILE = 1 << 20

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

    When no step ends for `hang_seconds`, every rank prints the stacks of its threads.
    """

    every_steps: Positive = 10
    validate_every_steps: NotNegative = 0
    validation_samples: Positive = 256
    hang_seconds: Annotated[int, Field(gt=0, le=10_000_000)] = 900


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Recipe:
    """One distillation run. `load_recipe` reads it, `to_dict` and `write_recipe` give it back."""

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


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by its shipped name or its path; `overrides` are `section.key=value` with TOML values.

    Raises:
        UserError: no such recipe, not TOML, unknown key, wrong type or value; the message names each.
    """
    path = _find_recipe(name_or_path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} holds {path.stat().st_size:,} bytes: that is no recipe")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from None
    for override in overrides:
        _apply_override(table, override)
    table = _expand(table)
    for section, key in (("run", "output"), ("data", "corpus"), ("teacher", "nvme_path")):
        if isinstance(table.get(section), dict) and isinstance(table[section].get(key), str):
            table[section][key] = os.path.expanduser(table[section][key])
    return parse_recipe(table, where=str(path))


def parse_recipe(table: dict[str, Any], where: str) -> Recipe:
    """Check plain values and make the recipe of them; `where` names their origin in messages."""
    try:  # as JSON, because strict Python values would have to be the dataclasses themselves
        return pydantic.TypeAdapter(Recipe).validate_json(json.dumps(table, default=str))
    except pydantic.ValidationError as error:
        problems = "\n".join(f"  {_problem(item)}" for item in error.errors())
        raise UserError(f"the recipe {where} is not valid:\n{problems}") from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as TOML; `load_recipe` gives an equal one."""
    import tomli_w

    durable.write(path, tomli_w.dumps(recipe.to_dict()))


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _find_recipe(name_or_path: str) -> Path:
    for path in (Path(name_or_path), RECIPES / f"{name_or_path}.toml"):
        if path.is_file():
            return path
    raise UserError(
        f"there is no recipe {name_or_path!r}: give a TOML file or one of {', '.join(shipped_recipes())} (in {RECIPES})"
    )


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name) or "\n" in override:
        raise UserError(f"{override!r} is not section.key=value, such as optimizer.peak_lr=3e-4")
    value = _value_of(text, is_text=_is_text(section, name))
    *parents, leaf = name.split(".")
    target = table
    for parent in (section, *parents):
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UserError(f"{override!r}: {parent} holds a value, no keys of its own")
    target[leaf] = value


def _value_of(text: str, *, is_text: bool) -> Any:
    """The value that is typed behind an override: TOML, or the text itself where the key takes text.

    Without this 0x24 as a shape would be the number 36, and 2026-01-01 as a folder a date.
    """
    if is_text and not text.startswith(('"', "'")):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, KeyError, RecursionError):
        return text


def _is_text(section: str, name: str) -> bool:
    """Whether a recipe's key takes text alone."""
    kind = typing.get_type_hints(Recipe).get(section)
    hint = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    options = [o for o in (typing.get_args(hint) or (hint,)) if o is not type(None)]
    return bool(options) and all(option is str or isinstance(option, str) for option in options)


def _expand(value: Any) -> Any:
    """Replace `${NAME}` in all strings, however deep."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if bad := [character for character in value if ord(character) < 32 or ord(character) == 127]:
        raise UserError(f"{value!r} holds the control character {bad[0]!r}: no name of a file or model has that")

    def replace(match: re.Match) -> str:
        name = match.group(1)
        if name == "MINILM_HOME":
            return str(samples.home())
        if name not in os.environ:
            raise UserError(f"the recipe uses ${{{name}}}, which is not set in the environment")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", replace, value)


def _problem(item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: there is no such key"
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing"
    given = item.get("input")
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]} (given: {given!r})"
