"""Recipes as files: found by name, read with overrides, checked, written.

Strings may hold `${NAME}`, taken from the environment; `${MINILM_HOME}` always has a value (`data_prep.samples.home`).
"""

import dataclasses
import itertools
import json
import os
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pydantic

from data_prep import durable, samples
from data_prep.errors import UserError
from pipeline.config import Recipe

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

RECIPES = Path(__file__).resolve().parent.parent / "launch" / "recipes"

_LARGEST_FILE = 1 << 20


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
    overrides = list(overrides)
    for override in overrides:
        _apply_override(table, override)
    table = _expand(table)
    for section, key in (("run", "output"), ("data", "corpus"), ("teacher", "nvme_path"), ("logging", "probe")):
        if isinstance(table.get(section), dict) and isinstance(table[section].get(key), str):
            table[section][key] = os.path.expanduser(table[section][key])
    return parse_recipe(table, where=f"{path}{' with its overrides' if overrides else ''}")


def load_recipes(names: Sequence[str], overrides: Iterable[str] = (), vary: Iterable[str] = ()) -> list[Recipe]:
    """Recipes that train side by side: each of `names`, in each combination of the values that vary.

    Args:
        names: as `load_recipe` takes them.
        overrides: for all. Where several recipes are given, `run.output` is the folder in which each gets one of its
            own, named like the recipe.
        vary: `section.key=V1,V2,...` each. Every combination becomes a run in the folder `section.key=V` of
            `run.output`; several keys are joined by commas.

    Raises:
        UserError: as `load_recipe`; a value twice, or one that no folder can be named after.
    """
    overrides = list(overrides)
    outputs = [value for key, _, value in (text.partition("=") for text in overrides) if key == "run.output"]
    choices = [[f"{key}={value}" for value in values] for key, values in map(_varied, vary)]
    recipes = []
    for name in names:
        own = list(overrides)
        if outputs and len(names) > 1:
            own.append(f"run.output={Path(outputs[-1]) / Path(name).stem}")
        for combination in itertools.product(*choices):
            recipe = load_recipe(name, [*own, *combination])
            if combination:
                output = str(Path(recipe.run.output) / ",".join(combination).replace("/", "_"))
                recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, output=output))
            recipes.append(recipe)
    return recipes


def _varied(text: str) -> tuple[str, list[str]]:
    """`section.key=V1,V2` -> the key and its values; commas in brackets or quotes belong to a value."""
    key, equals, values = text.partition("=")
    if key.startswith("run."):
        raise UserError(f"--vary {text!r}: students that train side by side share everything of [run]; give each a job")
    if not equals or "." not in key:
        raise UserError(f"--vary {text!r} is not section.key=V1,V2, such as teacher.layer=17,19,21")
    found = [part.strip() for part in re.findall(r"""(?:\{[^}]*\}|\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+""", values)]
    if not all(found) or not found or len(set(found)) < len(found) or values.count(",,"):
        raise UserError(f"--vary {text!r}: expected values that differ, separated by commas")
    if bad := [value for value in found if len(value) > 100 or value in (".", "..")]:
        raise UserError(f"--vary {text!r}: no folder can be named after {bad[0]!r}; write recipes of their own instead")
    return key, found


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
            raise UserError(
                f"the recipe uses ${{{name}}}, which is not set in the environment (on machines that deepspeed logs in "
                "to, ~/.deepspeed_env sets it)"
            )
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
