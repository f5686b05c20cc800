"""Everything about a run that can be refused without loading weights or starting a process group."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from data_prep import samples
from data_prep.errors import UserError
from data_prep.shards import Corpus
from data_prep.tokens import tokenizer_files
from data_prep.tokens.tokenizer import Tokenizer
from pipeline.config import Recipe, flat
from pipeline.data.loader import SampleSet, validation_batches
from pipeline.encoders.architectures import mixes_neighbours, require_activation_checkpointing
from pipeline.encoders.models import StudentShape, position_limit, student_config
from pipeline.encoders.student_init import TAIL_INITS, parse_init
from pipeline.engine import deepspeed_config, records
from pipeline.engine.operators import require_async_io
from pipeline.engine.placement import teacher_fingerprint
from pipeline.tasks.probe import read_probe
from pipeline.training.build import data_options, student_shape, teacher_settings
from pipeline.training.run_folder import CHECKPOINTS, check_claimable

MOST_STEP_TOKENS = 1 << 31


def check(recipes: Sequence[Recipe], ds_config: dict[str, Any], *, world_size: int) -> Corpus:
    """Refuse what cannot run, and return the opened corpus.

    Args:
        recipes: what is to be learned; several share corpus, teacher and batch.
        ds_config: of `deepspeed_config.read_ds_config`.
        world_size: ranks that will run it.

    Raises:
        UserError: what was given, what was expected, what to do.
    """
    deepspeed_config.check(ds_config)
    recipe = recipes[0]
    _check_nvme(recipe, ds_config)
    if Path(recipe.teacher.model) == samples.folder() / samples.TEACHER:
        samples.require(samples.TEACHER)
    teacher = teacher_settings(recipe)
    for own in recipes:
        deepspeed_config.merge(own, ds_config, world_size=world_size)
        _check_models(own, ds_config, teacher)
    corpus = Corpus.open(recipe.data.corpus, look=_is_first_of_machine())
    _check_probe(recipe, corpus)
    _check_bytes(recipe, corpus)
    _check_tokenizer(corpus, recipe.teacher.model)
    _check_vocabulary(corpus, teacher.vocab_size, recipe.teacher.model)
    _check_samples(recipe, corpus, world_size)
    return corpus


def _check_models(recipe: Recipe, ds_config: dict[str, Any], teacher: PretrainedConfig) -> None:
    """Refuse a student that cannot be made, or cannot learn from this teacher."""
    sizes = dict(layers=teacher.num_hidden_layers, hidden=teacher.hidden_size, positions=position_limit(teacher))
    check_against_teacher(recipe, **sizes)
    _check_sizes(recipe, teacher.vocab_size)
    shape = student_shape(recipe)
    student = student_config(shape, teacher, family=recipe.student.family, dropout=recipe.student.dropout)
    if "activation_checkpointing" in ds_config:
        require_activation_checkpointing(student)
    if recipe.data.attention == "document" and (mixes_neighbours(teacher) or mixes_neighbours(student)):
        raise UserError(
            'data.attention = "document", but a convolution of this model (conv_kernel_size) lets documents see each '
            'other: use "window"; with data.packing = "none" no window holds two documents'
        )
    _check_init(recipe.student.init, recipe.student.tail_init, shape, teacher)


def facts(recipes: Sequence[Recipe], ds_config: dict[str, Any], corpus: Corpus) -> dict[str, str]:
    """What must be the same on all ranks of a job: name -> value.

    What is read from disks is told by one rank of each machine.
    """
    of_recipes = {}
    for number, recipe in enumerate(recipes, start=1):
        which = "recipe" if len(recipes) == 1 else f"recipe {number}"
        shared = recipe.learned() | {"logging": recipe.to_dict()["logging"]}  # also what is measured, by all together
        of_recipes |= {f"{which} {name}": json.dumps(value) for name, value in flat(shared)}
        of_recipes[f"{which} run.output"] = recipe.run.output
    told = {
        **of_recipes,
        "recipes": str(len(recipes)),
        **{f"DeepSpeed {name}": json.dumps(value) for name, value in flat(ds_config)},
        "corpus": corpus.fingerprint[:12],
        "device": _device(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
    }
    if _is_first_of_machine():
        told |= {"teacher": teacher_fingerprint(recipes[0].teacher.model)[:12], "this project's code": _code()[:12]}
    return told


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory
    return f"{torch.cuda.get_device_name()}, {memory / 2**30:.0f} GiB"


def _is_first_of_machine() -> bool:
    """Whether this rank looks at disks for all of its machine, which hear in `meeting` what it finds wrong."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _code() -> str:
    """Of the sources that this rank runs, as far as they decide what is learned."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_checkpoint(recipe: Recipe, corpus: Corpus, resume: str) -> records.Record | None:
    """The record of the checkpoint that the run goes on from; None: a fresh start.

    One rank asks for all: the others may see a network disk as it was.

    Args:
        resume: "auto", "never" or a step, see `records.find`.

    Raises:
        UserError: the folder is not a run's, no checkpoint is whole, or it belongs to another recipe or corpus.
    """
    check_claimable(Path(recipe.run.output))
    checkpoints = Path(recipe.run.output) / CHECKPOINTS
    record = records.find(checkpoints, resume)
    if record is not None:
        records.check_belongs(
            record,
            recipe=recipe.learned(),
            corpus_fingerprint=corpus.fingerprint,
            teacher_fingerprint=teacher_fingerprint(recipe.teacher.model),
            folder=checkpoints,
        )
    return record


def check_against_teacher(recipe: Recipe, *, layers: int, hidden: int, positions: int) -> None:
    """Refuse what the teacher's size makes impossible.

    Args:
        layers: of the whole teacher.
        hidden: the teacher's hidden size.
        positions: the longest input that the teacher takes, in tokens.
    """
    student_hidden = int(recipe.student.shape.split("x")[1])
    heads = recipe.relations.heads
    problems = []
    if recipe.teacher.layer > layers:
        problems.append(f"teacher.layer = {recipe.teacher.layer}, but {recipe.teacher.model} has layers 1 to {layers}")
    for whose, size in (("teacher", hidden), ("student", student_hidden)):
        if size % heads:
            problems.append(f"relations.heads = {heads} does not divide the {whose}'s hidden size {size}")
    if student_hidden % recipe.student.heads:
        problems.append(f"student.heads = {recipe.student.heads} does not divide the student's hidden {student_hidden}")
    if recipe.data.seq_tokens > positions:
        problems.append(f"data.seq_tokens = {recipe.data.seq_tokens}, but the teacher has {positions} positions")
    if recipe.optimizer.warmup_steps > recipe.optimizer.steps:
        problems.append(
            f"optimizer.warmup_steps = {recipe.optimizer.warmup_steps} exceeds optimizer.steps = "
            f"{recipe.optimizer.steps}"
        )
    if recipe.data.weights is not None and recipe.data.temperature_alpha is not None:
        problems.append("data.weights and data.temperature_alpha exclude each other: give one of them")
    if chosen := recipe.relations.layers:
        teacher_layers, student_layers = ([pair[side] for pair in chosen] for side in (0, 1))
        ends = [recipe.teacher.layer, int(recipe.student.shape.split("x")[0])]
        rising = all(sorted(set(side)) == side for side in (teacher_layers, student_layers))
        if not rising or [teacher_layers[-1], student_layers[-1]] != ends:
            problems.append(
                f"relations.layers must rise and end with teacher.layer and the student's last layer, {ends}"
            )
    if problems:
        raise UserError("the recipe cannot run:\n" + "\n".join(f"  {problem}" for problem in problems))


def _check_sizes(recipe: Recipe, vocabulary: int) -> None:
    """Refuse by arithmetic what no machine could hold or finish, before anything is made of it."""
    layers, hidden = map(int, recipe.student.shape.split("x"))
    inner = recipe.student.feed_forward or 4 * hidden
    weights = layers * (4 * hidden * hidden + 2 * hidden * inner) + vocabulary * hidden
    total = psutil.virtual_memory().total
    problems = []
    if 4 * weights > total:
        problems.append(
            f"a student of shape {recipe.student.shape} has about {weights:,} weights: {4 * weights / 2**30:,.0f} "
            f"GiB in fp32, and each rank begins with all of them; this machine has {total / 2**30:,.0f} GiB"
        )
    tokens = recipe.optimizer.global_batch_samples * recipe.data.seq_tokens
    if tokens > MOST_STEP_TOKENS:
        problems.append(
            f"optimizer.global_batch_samples = {recipe.optimizer.global_batch_samples:,} of {recipe.data.seq_tokens:,} "
            f"tokens makes a step of {tokens:,} tokens; at most {MOST_STEP_TOKENS:,} are taken"
        )
    if recipe.optimizer.steps * recipe.optimizer.global_batch_samples >= 1 << 62:
        problems.append(f"optimizer.steps = {recipe.optimizer.steps:,} are more samples than can be numbered")
    if problems:
        raise UserError("the recipe cannot run:\n" + "\n".join(f"  {problem}" for problem in problems))


def _check_nvme(recipe: Recipe, ds_config: dict[str, Any]) -> None:
    """Refuse weights on NVMe without a folder for them, or without what reads them."""
    student, teacher, folders = deepspeed_config.offload(ds_config, "param"), recipe.teacher, {}
    if student["device"] == "nvme":
        folders["zero_optimization.offload_param.nvme_path"] = student.get("nvme_path")
    if teacher.placement == "zero3_nvme":
        folders["teacher.nvme_path"] = teacher.nvme_path
    for key, folder in folders.items():
        if not folder or not Path(folder).is_dir():
            raise UserError(f"{key} = {folder!r}: expected a folder that exists, on a fast local disk")
    if folders:
        require_async_io()


def _check_init(init: str, tail_init: str, shape: StudentShape, teacher: PretrainedConfig) -> None:
    kind, _ = parse_init(init, shape.layers, teacher.num_hidden_layers)
    if kind != "random" and shape.hidden > teacher.hidden_size:
        raise UserError(
            f"student.init = {init!r} needs a student no wider than its teacher, of {teacher.hidden_size}; "
            f'student.shape says {shape.hidden}. Choose "random"'
        )
    if tail_init not in TAIL_INITS:
        raise UserError(f"student.tail_init = {tail_init!r} is not one of {', '.join(TAIL_INITS)}")


def _check_probe(recipe: Recipe, corpus: Corpus) -> None:
    """Refuse labelled texts that cannot be used, where rank 0 will read them for all."""
    if not recipe.logging.probe or os.environ.get("RANK", "0") != "0":
        return
    try:
        read_probe(Path(recipe.logging.probe))
    except UserError as error:
        raise UserError(f"logging.probe: {error}") from None
    if not corpus.shards("validation"):
        raise UserError(
            f"logging.probe is measured with the held-out loss, but the corpus {corpus.folder} has no validation "
            "split: prepare it with --validation 0.01, or leave the probe out"
        )


def _check_bytes(recipe: Recipe, corpus: Corpus) -> None:
    """Read all shards and compare checksums if the recipe asks for it, once a machine."""
    if recipe.data.verify == "checksums" and _is_first_of_machine():
        if changed := corpus.verify():
            raise UserError(
                f"files of the corpus {corpus.folder} differ from their checksums: {', '.join(changed[:5])}"
                f"{' and more' if len(changed) > 5 else ''}. Copy or prepare the corpus again."
            )


def _check_tokenizer(corpus: Corpus, teacher_model: str) -> None:
    tokenizer, made = Tokenizer.load(teacher_model), corpus.manifest.tokenizer
    ours, theirs = tokenizer.fingerprint, made["fingerprint"]
    if ours != theirs:
        raise UserError(
            f"the corpus {corpus.folder} was made with another tokenizer ({theirs[:12]}) than that of the teacher "
            f"{teacher_model} ({ours[:12]}). Prepare it again: minilm prepare --tokenizer {teacher_model} ..."
        )
    for name in ("vocabulary_tokens", "cls_id", "sep_id", "pad_id"):
        if made[name] != getattr(tokenizer, name):
            raise UserError(
                f"{corpus.folder / 'manifest.json'} has {name} {made[name]}, the tokenizer of the teacher "
                f"{teacher_model} has {getattr(tokenizer, name)}: one of them was changed. Copy it again."
            )


def _check_vocabulary(corpus: Corpus, vocabulary: int, model: str) -> None:
    """Refuse ids that the teacher has no embedding for, and a corpus whose own tokenizer has been changed."""
    tokens = corpus.manifest.tokenizer["vocabulary_tokens"]
    if tokens > vocabulary:
        raise UserError(
            f"the tokenizer of the corpus {corpus.folder} knows {tokens:,} tokens, the teacher {model} has "
            f"embeddings for {vocabulary:,}: one of them is not the other's"
        )
    tokenizer_files.require_unchanged(corpus.folder / "tokenizer", corpus.manifest.tokenizer["fingerprint"])


def _check_samples(recipe: Recipe, corpus: Corpus, world_size: int) -> None:
    """Make the order of training, and the first held-out batch, to see whether they can be made."""
    SampleSet(corpus, data_options(recipe), "train")
    if corpus.shards("validation"):
        held_out = dict(samples=recipe.logging.validation_samples, micro_batch_samples=1, world_size=world_size)
        next(validation_batches(corpus, data_options(recipe), **held_out))
