"""Several students from one pass of the teacher: which recipes may train side by side, and what that costs.

Each student stays a run of its own, with its own folder, and computes bit for bit what it would compute alone. So what
decides the batches and the teacher's outputs must be the same for all; what is the student's own may differ.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.shards import Corpus
from pipeline.config import Recipe
from pipeline.engine import deepspeed_config, records
from pipeline.training import preflight, run_folder
from pipeline.training.build import compared_layers

# What each student has for itself; the rest of the recipe is shared.
_OWN_SECTIONS = ("student", "relations")
_OWN_KEYS = {
    "run": ("output",),
    "teacher": ("layer",),
    "optimizer": ("peak_lr", "warmup_steps", "schedule", "betas", "eps", "weight_decay", "clip_norm"),
}


def check(recipes: Sequence[Recipe], ds_config: dict[str, Any]) -> None:
    """Refuse recipes that cannot train side by side, key by key.

    Raises:
        UserError: they differ in what decides the batches or the teacher's pass, or two write to one folder.
    """
    if len(recipes) == 1:
        return
    first, *others = recipes
    problems = []
    for number, recipe in enumerate(others, start=2):
        for line in records.differences(_shared(recipe), _shared(first)):
            key, _, values = line.partition(": ")
            here, _, there = values.removesuffix(" there").partition(" here, ")
            problems.append(f"{key}: {there} in recipe 1, {here} in recipe {number}")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError(
            "these recipes cannot train side by side, because they do not share the batches and the teacher's pass:\n"
            + "\n".join(f"  {line}" for line in [*problems[:10], *more])
            + "\nStudents side by side may differ in [student], [relations], teacher.layer, run.output and the "
            "optimizer but for its batch and steps. Make the rest equal, or train them one after another."
        )
    folders = [os.path.realpath(recipe.run.output) for recipe in recipes]
    for folder in folders:
        if folders.count(folder) > 1 or any(Path(folder) in Path(other).parents for other in folders):
            raise UserError(f"two of the recipes have run.output = {folder!r}, or a folder in it: each needs its own")
    for name in ("wandb", "comet"):
        if ds_config.get(name, {}).get("enabled"):
            raise UserError(
                f"{name} knows one run a process, and {len(recipes)} students train in this one: take {name} out of "
                "the DeepSpeed configuration. TensorBoard and CSV have a folder for each."
            )


def _shared(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that must be the same for all."""
    return {
        name: {key: value for key, value in section.items() if key not in _OWN_KEYS.get(name, ())}
        for name, section in recipe.to_dict().items()
        if name not in _OWN_SECTIONS
    }


def names(recipes: Sequence[Recipe]) -> list[str]:
    """Of the runs beside each other: their folders' paths below the one that all lie in; "" for a run alone."""
    return run_folder.short_names([Path(recipe.run.output) for recipe in recipes]) if len(recipes) > 1 else [""]


def teacher_layers(recipes: Sequence[Recipe]) -> tuple[int, ...]:
    """The teacher's layers that the students learn from, rising; the teacher runs to the last of them."""
    return tuple(sorted({n for recipe in recipes for n in compared_layers(recipe)[0] or (recipe.teacher.layer,)}))


def ds_configs(
    recipes: Sequence[Recipe], ds_config: dict[str, Any], *, world_size: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The configuration of each student's engine; where it names folders, each student gets one of its own."""
    merged = [deepspeed_config.merge(recipe, copy.deepcopy(ds_config), world_size=world_size) for recipe in recipes]
    for config, name in zip(merged, names, strict=True):
        if not name:
            continue
        for monitor in ("tensorboard", "csv_monitor"):
            if monitor in config:
                config[monitor]["job_name"] = str(Path(config[monitor].get("job_name", "run")) / name)
        offloaded = deepspeed_config.offload(config, "param")
        if offloaded["device"] == "nvme":  # DeepSpeed empties the folder that it finds
            folder = Path(offloaded["nvme_path"]) / name.replace(os.sep, "-")
            folder.mkdir(exist_ok=True)
            config["zero_optimization"]["offload_param"]["nvme_path"] = str(folder)
    return merged


def costs(teacher: float, students: Mapping[str, tuple[float, int]]) -> list[str]:
    """What training side by side costs, in words.

    Args:
        teacher: floating-point operations of the teacher in a step.
        students: of each run, by its name: operations of the student in a step, and bytes of its weights, gradients and
            optimizer over all ranks.
    """
    own, memory = (sum(values) for values in zip(*students.values(), strict=True))
    together, apart = teacher + own, len(students) * teacher + own
    shares = ", ".join(f"{name} {operations / together:.0%}" for name, (operations, _) in students.items())
    return [
        f"{len(students)} students side by side: a step takes {together / 1e12:.3g} TFLOP: teacher "
        f"{teacher / together:.0%}, {shares}",
        f"one after another they would take about {apart / together:.2f} times as much; their weights, gradients and "
        f"optimizers need {memory / 2**30:.2f} GiB",
    ]


def find_checkpoints(recipes: Sequence[Recipe], corpus: Corpus, resume: str) -> list[records.Record | None]:
    """The checkpoints that the runs go on from, all of one step; None for all: from the beginning.

    "auto" is the newest step that is whole in all runs. A run that is further along goes back to it, at most by one
    interval of checkpoints, as after a kill while some were saved.

    Raises:
        UserError: as `preflight.find_checkpoint`; or the runs stand further apart.
    """
    found = [preflight.find_checkpoint(recipe, corpus, resume) for recipe in recipes]
    steps = [0 if record is None else record.step for record in found]
    if len(set(steps)) == 1:
        return found
    whole = [records.whole_steps(Path(recipe.run.output) / run_folder.CHECKPOINTS) for recipe in recipes]
    common = max(set.intersection(*map(set, whole)), default=0)
    if max(steps) - common > recipes[0].checkpoint.every_steps:
        stand = "\n".join(
            f"  {recipe.run.output}: {f'step {step}' if step else 'no checkpoint'}"
            for recipe, step in zip(recipes, steps, strict=True)
        )
        back = (
            f"--resume {common} takes all back to step {common}, the newest that all have."
            if common
            else "No step is there in all."
        )
        raise UserError(
            f"the runs do not stand at one step:\n{stand}\nTo train side by side they must. {back} Or train those "
            "that are behind by themselves first, or leave them out."
        )
    if not common:
        return [None] * len(recipes)
    return [preflight.find_checkpoint(recipe, corpus, str(common)) for recipe in recipes]


def still_running(recipes: Sequence[Recipe]) -> list[int]:
    """Which of several recipes' runs have not ended before their time; a run alone may always try again."""
    if len(recipes) == 1:
        return [0]
    return [i for i, recipe in enumerate(recipes) if run_folder.read_ended(Path(recipe.run.output)) is None]
