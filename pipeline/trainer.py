"""The loop: batches -> frozen teacher and student -> relation loss -> DeepSpeed -> checkpoints.

A step is a function of the weights and its number alone: the loader's order is pure, and the random numbers of dropout
are seeded anew for every step and rank. So the state of a run is what DeepSpeed saves and one integer, `samples_seen`,
and a resumed run computes what an unbroken one would have.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep import durable, samples
from data_prep.errors import UserError
from data_prep.shards import Corpus
from data_prep.tokenizer import Tokenizer
from pipeline import checkpoint, config, engine, placement
from pipeline.config import Recipe
from pipeline.loader import Batch, DataOptions, Loader, validation_batches
from pipeline.models import StudentShape, build_student, position_limit, teacher_config
from pipeline.monitor import PhaseTimer, RunLog
from pipeline.relations import RelationLoss, relation_loss
from pipeline.stopping import EXIT_REQUEUE, StopRequest

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids")


def preflight(recipe: Recipe, ds_config: dict[str, Any], *, world_size: int, resume: str) -> tuple[Corpus, Any]:
    """Refuse everything that can be refused without loading weights.

    Returns:
        The opened corpus and the checkpoint's record to resume from (None: a fresh start).
    """
    engine.merge(recipe, ds_config, world_size=world_size)
    StudentShape.parse(recipe.student.shape, heads=recipe.student.heads, feed_forward=recipe.student.feed_forward)
    if Path(recipe.teacher.model) == samples.folder() / samples.TEACHER:
        samples.require(samples.TEACHER)
    teacher = teacher_config(recipe.teacher.model, trust_remote_code=recipe.teacher.trust_remote_code)
    config.check_against_teacher(
        recipe,
        layers=teacher.num_hidden_layers,
        hidden=teacher.hidden_size,
        positions=position_limit(teacher),
    )
    corpus = Corpus.open(recipe.data.corpus)
    _check_tokenizer(corpus, recipe.teacher.model)
    checkpoints = Path(recipe.run.output) / "checkpoints"
    record = checkpoint.find(checkpoints, resume, log=_say_on_main)
    if record is not None:
        checkpoint.check_belongs(
            record, recipe=recipe.learned(), corpus_fingerprint=corpus.fingerprint, folder=checkpoints
        )
    return corpus, record


def distill(recipe: Recipe, ds_config: dict[str, Any], *, resume: str = "auto", stop_at_step: int | None = None) -> int:
    """Run the recipe on this rank and return the exit code.

    Args:
        recipe: what is learned.
        ds_config: a DeepSpeed configuration, see `engine.read_ds_config`.
        resume: "auto", "never" or a step, see `checkpoint.find`.
        stop_at_step: save and leave after this step, as if the job's time were over, but with exit code 0.

    Returns:
        0 when the last step (or `stop_at_step`) is done and saved, EXIT_REQUEUE after a signal.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    corpus, record = preflight(recipe, ds_config, world_size=world_size, resume=resume)
    engine.init_distributed()
    run = Distillation(recipe, engine.merge(recipe, ds_config, world_size=world_size), corpus, record)
    try:
        return run.train(stop_at_step)
    finally:
        run.close()


class Distillation:
    """One run on this rank: teacher, student engine, loader and log, ready to take steps."""

    def __init__(
        self, recipe: Recipe, ds_config: dict[str, Any], corpus: Corpus, record: checkpoint.Record | None
    ) -> None:
        self.recipe, self.corpus = recipe, corpus
        self.output = Path(recipe.run.output)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = engine.device()
        self.stop = StopRequest()
        order = {name: value for name, value in dataclasses.asdict(recipe.data).items() if name != "corpus"}
        self.options = DataOptions(seed=recipe.run.seed, **order)
        student = self._build_student()
        where = placement.choose(
            recipe.teacher,
            dtype=engine.compute_dtype(ds_config),
            free_bytes=placement.free_bytes(engine.ranks_on_this_machine()),
            world_size=self.world_size,
        )
        self.teacher = placement.start_teacher(recipe.teacher, where, ds_config)
        if self.rank == 0:
            self._describe_run(student, ds_config)
        self.student = engine.start_student(student, recipe.optimizer, ds_config)
        self.step, self.lr = 0, 0.0
        if record is not None:
            checkpoint.load(self.student, self.output / "checkpoints", record)
            self.step = record.step
        self.log = RunLog(
            self.output,
            engine.start_monitor(ds_config, self.output).write_events,
            total_steps=recipe.optimizer.steps,
            first_step=self.step,
            is_main=self.rank == 0,
        )
        self.log.say(f"teacher: {where.kind} ({where.reason})")
        self.timer = PhaseTimer(self.device)
        self.micro_batch_samples = ds_config["train_micro_batch_size_per_gpu"]
        self.accumulation_steps = ds_config["gradient_accumulation_steps"]
        self.loader = Loader(
            corpus,
            self.options,
            global_batch_samples=recipe.optimizer.global_batch_samples,
            micro_batch_samples=self.micro_batch_samples,
            rank=self.rank,
            world_size=self.world_size,
            samples_seen=self.samples_seen,
        )

    @property
    def samples_seen(self) -> int:
        return self.step * self.recipe.optimizer.global_batch_samples

    def train(self, stop_at_step: int | None = None) -> int:
        """Take steps until the recipe's last one, `stop_at_step`, or a signal; save; return the exit code."""
        last_step = self.recipe.optimizer.steps
        end = min(last_step, stop_at_step or last_step)
        if self.step == 0:
            self.validate()
        else:
            self.log.say(f"resumed from step {self.step} ({self.samples_seen:,} samples seen)")
        batches = iter(self.loader)
        saved_step, interval = self.step, _Interval(self.step)
        while self.step < end:
            losses = self._take_step(batches)
            if self.step % self.recipe.logging.every_steps == 0 or self.step == end:
                self._log_step(losses, interval)
                interval = _Interval(self.step)
            if self._validation_is_due():
                self.validate()
            stopping = self.stop.agreed(self.device)
            if stopping or self.step == end or self.step % self.recipe.checkpoint.every_steps == 0:
                self.save()
                saved_step = self.step
            if stopping and self.step < last_step:
                self.log.say(f"stopping: {self.stop.reason}; saved step {saved_step}, start again to go on")
                return EXIT_REQUEUE
        if self.step < last_step:
            self.log.say(f"stopped after step {self.step} as asked; start again to go on")
        else:
            self.log.say(f"done: {self.step} steps, {self.samples_seen:,} samples, {self.output}")
        return 0

    def validate(self) -> None:
        """Measure the relation loss on the first held-out samples, without dropout, and log it."""
        self.student.eval()
        totals: dict[str, torch.Tensor] = {}
        rows = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = validation_batches(
            self.corpus,
            self.options,
            samples=self.recipe.logging.validation_samples,
            micro_batch_samples=self.micro_batch_samples,
            rank=self.rank,
            world_size=self.world_size,
        )
        with torch.no_grad():
            for batch in batches:
                loss = self._loss(batch)
                size = batch.input_ids.shape[0]
                rows += size
                for name, value in {"loss": loss.total, **loss.per_pair}.items():
                    totals[name] = totals.get(name, 0.0) + value.double() * size
        self.student.train()
        names = ["loss", *self.recipe.relations.pairs]
        sums = torch.stack([torch.as_tensor(totals.get(name, 0.0), device=self.device) for name in names] + [rows])
        dist.all_reduce(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        values = dict(loss=means[0], per_pair=dict(zip(names[1:], means[1:], strict=True)))
        self.log.record("validation", self.step, {"samples_seen": self.samples_seen, **values})
        self.log.say(f"held-out loss at step {self.step}: {_loss_text(values)}")

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        began = time.perf_counter()
        record = checkpoint.Record(
            step=self.step,
            samples_seen=self.samples_seen,
            world_size=self.world_size,
            zero_stage=self.student.zero_optimization_stage(),
            recipe=self.recipe.learned(),
            corpus_fingerprint=self.corpus.fingerprint,
            files={},
        )
        keep = self.recipe.checkpoint
        checkpoint.save(
            self.student,
            self.output / "checkpoints",
            record,
            keep_last=keep.keep_last,
            keep_every_steps=keep.keep_every_steps,
        )
        self.log.say(f"saved {checkpoint.tag_of(self.step)} in {time.perf_counter() - began:.1f} s")

    def close(self) -> None:
        self.loader.close()
        self.log.close()

    def _take_step(self, batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
        """One optimizer step; the loss and its parts, means over this rank's micro-batches, on the device."""
        torch.manual_seed(step_seed(self.recipe.run.seed, self.step, self.rank))
        sums: dict[str, torch.Tensor] = {}
        self.lr = self.student.get_lr()[0]
        for _ in range(self.accumulation_steps):
            with self.timer.phase("data_wait"):
                batch = next(batches)
            loss = self._loss(batch)
            with self.timer.phase("backward"):
                self.student.backward(loss.total)
            with self.timer.phase("step"):
                self.student.step()
            for name, value in {"loss": loss.total.detach(), **loss.per_pair}.items():
                sums[name] = sums.get(name, 0.0) + value / self.accumulation_steps
        self.step += 1
        return sums

    def _loss(self, batch: Batch) -> RelationLoss:
        inputs = {
            name: None if tensor is None else tensor.to(self.device, non_blocking=True)
            for name, tensor in ((name, getattr(batch, name)) for name in _MODEL_INPUTS)
        }
        with self.timer.phase("teacher"), torch.no_grad():
            teacher = self.teacher(**inputs)
        with self.timer.phase("student"):
            student = self.student(**inputs)
        with self.timer.phase("loss"):
            return relation_loss(
                teacher,
                student,
                heads=self.recipe.relations.heads,
                pairs=self.recipe.relations.pairs,
                mask=inputs["attention_mask"],
                document_ids=inputs["document_ids"],
                implementation=self.recipe.relations.implementation,
            )

    def _log_step(self, losses: dict[str, torch.Tensor], interval: "_Interval") -> None:
        means = torch.stack([losses[name].double() for name in losses])
        dist.all_reduce(means)
        loss, *parts = (means / self.world_size).tolist()
        pairs = dict(zip(list(losses)[1:], parts, strict=True))
        seconds = time.perf_counter() - interval.began
        steps = self.step - interval.first_step
        tokens = steps * self.recipe.optimizer.global_batch_samples * self.recipe.data.seq_tokens
        values = dict(
            loss=loss,
            per_pair=pairs,
            lr=self.lr,
            gradient_norm=float(self.student.get_global_grad_norm() or 0.0),
            samples_seen=self.samples_seen,
            tokens_per_second=tokens / seconds,
            seconds={name: spent / steps for name, spent in self.timer.take().items()} | {"total": seconds / steps},
            shares=self.loader.shares(self.samples_seen),
        )
        self.log.record("train", self.step, values)
        self.log.progress(self.step, f"{_loss_text(values)}  lr {values['lr']:.1e}  {tokens / seconds:,.0f} tokens/s")

    def _validation_is_due(self) -> bool:
        every = self.recipe.logging.validate_every_steps
        return self.step == self.recipe.optimizer.steps or bool(every and self.step % every == 0)

    def _build_student(self):
        student = self.recipe.student
        return build_student(
            StudentShape.parse(student.shape, heads=student.heads, feed_forward=student.feed_forward),
            teacher_config(self.recipe.teacher.model, trust_remote_code=self.recipe.teacher.trust_remote_code),
            family=student.family,
            init=student.init,
            tail_init=student.tail_init,
            dropout=student.dropout,
            seed=self.recipe.run.seed,
            teacher_model=self.recipe.teacher.model,
        )

    def _describe_run(self, student, ds_config: dict[str, Any]) -> None:
        """Put beside the checkpoints what it takes to read them without the teacher, the corpus or this recipe."""
        self.output.mkdir(parents=True, exist_ok=True)
        config.write_recipe(self.recipe, self.output / "recipe.toml")
        durable.write(self.output / "deepspeed.json", json.dumps(ds_config, indent=2))
        model = self.output / "model"
        shutil.copytree(self.corpus.folder / "tokenizer", model, dirs_exist_ok=True)
        student.backbone.config.save_pretrained(model)


class _Interval:
    """Since when the throughput is counted."""

    def __init__(self, first_step: int) -> None:
        self.first_step, self.began = first_step, time.perf_counter()


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout's random numbers in one step on one rank."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _check_tokenizer(corpus: Corpus, teacher_model: str) -> None:
    ours, theirs = Tokenizer.load(teacher_model).fingerprint, corpus.manifest.tokenizer["fingerprint"]
    if ours != theirs:
        raise UserError(
            f"the corpus {corpus.folder} was made with another tokenizer ({theirs[:12]}) than that of the teacher "
            f"{teacher_model} ({ours[:12]}). Prepare it again: minilm prepare --tokenizer {teacher_model} ..."
        )


def _loss_text(values: dict[str, Any]) -> str:
    parts = "  ".join(f"{pair} {value:.4f}" for pair, value in values["per_pair"].items())
    return f"loss {values['loss']:.4f}  ({parts})"


def _say_on_main(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
