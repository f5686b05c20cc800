"""One student's run on this rank: its engine, its loss, its folder and log.

Nothing of it depends on the company that it has: its random numbers are seeded for every micro-batch anew, and its
gradient, clipping and optimizer are its own.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.shards import Corpus
from pipeline.config import Recipe
from pipeline.encoders import flops
from pipeline.engine import checkpoint, ranks, records
from pipeline.engine.records import Record
from pipeline.engine.student import (
    learning_rate_factor,
    set_learning_rate,
    spoil_unless_finite,
    start_student,
    take_step,
)
from pipeline.relations.loss import RelationLoss, layerwise_relation_loss, relation_loss
from pipeline.relations.qkv import QKV
from pipeline.tasks.vectors import qkv_vectors
from pipeline.training import run_folder
from pipeline.training.build import compared_layers, fresh_student
from pipeline.training.metrics import SCORES, iterate_metrics
from pipeline.training.monitor import PhaseTimer, RunLog, peak_memory_bytes, start_monitor


class StudentRun:
    """A student that learns.

    Args:
        recipe: what it learns.
        ds_config: of `deepspeed_config.merge`.
        corpus: for what the run's folder says of it.
        teacher_fingerprint: of the teacher, for its checkpoints.
        name: of the run among those beside it; "" if it is alone.
        say: prints a line, on rank 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: dict[str, Any],
        corpus: Corpus,
        *,
        teacher_fingerprint: str,
        name: str,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.output, self.name, self._say = recipe, Path(recipe.run.output), name, say
        self._ds_config, self._corpus_fingerprint = ds_config, corpus.fingerprint
        self._teacher_fingerprint = teacher_fingerprint
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.names = ("loss", *recipe.relations.loss_names())
        student = fresh_student(recipe)
        self.operations = flops.student_flops(
            student,
            seq_tokens=recipe.data.seq_tokens,
            global_batch_samples=recipe.optimizer.global_batch_samples,
            relations=len(recipe.relations.loss_names()),
        )
        self._marker = run_folder.marker_of(self.output)
        if self.rank == 0:
            run_folder.describe(self.output, recipe, ds_config, corpus, student)
        self.engine = start_student(student, recipe.optimizer, ds_config)
        self.device = self.engine.device
        self.timer = PhaseTimer(self.device)
        self.step, self.lr, self.skipped_in_a_row, self.has_ended = 0, 0.0, 0, False
        self.log: RunLog | None = None

    def start(self, record: Record | None) -> None:
        """From a checkpoint, or from the first weights; the log begins here.

        Checkpoints of later steps, from a time before, are set aside.
        """
        checkpoints = self.output / run_folder.CHECKPOINTS
        ranks.decided_by_rank_0(lambda: checkpoint.check_room(self.engine, checkpoints))
        if record is not None:
            checkpoint.load(self.engine, checkpoints, record)
            self.step = record.step
        aside = ranks.decided_by_rank_0(lambda: checkpoint.set_aside(checkpoints, self.step))
        self.log = RunLog(
            self.output,
            start_monitor(self._ds_config, self.output, self.recipe.as_text(), self.step).write_events,
            first_step=self.step,
            is_main=self.rank == 0,
            say=self.say,
        )
        if aside is not None:
            self.say(f"went back to step {self.step}: the checkpoints of later steps are now in {aside}")

    def last_logged(self, name: str) -> Any:
        """What the log's last training record up to the present step says; None if nothing."""
        last = None
        for record in iterate_metrics(self.output, "train"):  # which may be long
            last = record.get(name) if record["step"] <= self.step else last
        return last

    def say(self, text: str) -> None:
        """A line for the terminal, with the run's name if it is one of several."""
        self._say(f"{self.name}: {text}" if self.name else text)

    @property
    def samples_seen(self) -> int:
        return self.step * self.recipe.optimizer.global_batch_samples

    def compile_layers(self) -> None:
        self.engine.module.compile_layers(ragged=self.recipe.data.packing == "none")

    # --- a step ------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        options = self.recipe.optimizer
        self.lr = options.peak_lr * learning_rate_factor(self.step, options)
        set_learning_rate(self.engine, self.lr)
        self._sums = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)

    def learn(self, teacher: Mapping[int, QKV], inputs: dict[str, Tensor | None], number: int) -> None:
        """Forward and backward of one micro-batch; with the last of a step, the optimizer's step too.

        Args:
            teacher: the teacher's queries, keys and values by layer.
            inputs: of the encoders, on the device.
            number: of the micro-batch in its step, from 0.
        """
        torch.manual_seed(micro_batch_seed(self.recipe.run.seed, self.step, number, self.rank))
        loss = self.loss(teacher, self.forward(inputs), inputs)
        self._sums += torch.stack([loss.total.detach(), *loss.per_pair.values()])
        last = number == self.engine.gradient_accumulation_steps() - 1
        with self.timer.phase("backward"):
            self.engine.backward(spoil_unless_finite(loss.total, self._sums) if last else loss.total)
        with self.timer.phase("step"):
            stepped = take_step(self.engine)
        if last:
            self.step += 1
            self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1

    def forward(self, inputs: dict[str, Tensor | None]) -> QKV | tuple[QKV, ...]:
        """The student's queries, keys and values, as `RelationEncoder` gives them."""
        with self.timer.phase("student"):
            return self.engine(**inputs)

    def loss(
        self, teacher: Mapping[int, QKV], student: QKV | tuple[QKV, ...], inputs: dict[str, Tensor | None]
    ) -> RelationLoss:
        """Of one micro-batch, means over its samples."""
        relations = self.recipe.relations
        options = dict(
            heads=relations.heads,
            pairs=relations.pairs,
            mask=inputs["attention_mask"],
            document_ids=inputs["document_ids"],
            implementation=relations.implementation,
        )
        with self.timer.phase("loss"):
            layers, _ = compared_layers(self.recipe)
            if layers is None:
                return relation_loss(teacher[self.recipe.teacher.layer], student, **options)
            weights = [pair[2] for pair in relations.layers]
            return layerwise_relation_loss([teacher[n] for n in layers], student, weights=weights, **options)

    @property
    def has_diverged(self) -> bool:
        return self.skipped_in_a_row >= self.recipe.checkpoint.stop_after_skipped_steps

    # --- what is written ---------------------------------------------------------------------------------------------

    def note_skipped(self) -> None:
        """Log that the step just taken was skipped."""
        size = self.recipe.optimizer.global_batch_samples
        samples = dict(first_sample=self.samples_seen - size, last_sample=self.samples_seen - 1)
        self.log.record("skipped", self.step, {"in_a_row": self.skipped_in_a_row, **samples})
        self.say(f"step {self.step} skipped: loss or gradient not finite (samples {list(samples.values())})")

    def log_step(
        self, *, seconds: float, steps: int, shared: dict[str, Any], phases: dict[str, float]
    ) -> dict[str, Any]:
        """Log the step just taken, and return what was logged: `loss`, `per_pair` and so on.

        Args:
            seconds: a step took.
            steps: since the last call.
            shared: what is the same for all runs of a job.
            phases: seconds of a step that all runs share.
        """
        means = self._sums / self.engine.gradient_accumulation_steps()
        dist.all_reduce(means)
        loss, *parts = (means / self.world_size).tolist()
        own = {name: spent / steps for name, spent in self.timer.take().items()}
        values: dict[str, Any] = dict(
            loss=loss,
            per_pair=dict(zip(self.names[1:], parts, strict=True)),
            lr=self.lr,
            gradient_norm=float(self.engine.get_global_grad_norm() or 0.0),
            skipped_steps=self.engine.skipped_steps,
            samples_seen=self.samples_seen,
            **shared,
            seconds={**phases, **own, "total": seconds},
            peak_memory_bytes=peak_memory_bytes(self.device),
        )
        self.log.record("train", self.step, values)
        return values

    def log_validation(self, sums: Tensor, scores: dict[str, float]) -> None:
        """Log the held-out loss and the scores beside it.

        Args:
            sums: of all ranks, see `validation_sums`.
            scores: of `metrics.SCORES`, those that were measured.
        """
        self.timer.take()
        total, *parts = (sums[:-1] / sums[-1]).tolist()
        values = dict(loss=total, per_pair=dict(zip(self.names[1:], parts, strict=True)), **scores)
        self.log.record("validation", self.step, {"samples_seen": self.samples_seen, **values})
        shown = [f"{SCORES[name]} {score:.1%}" for name, score in scores.items()]
        self.say("  ".join([f"held-out loss at step {self.step}: {loss_text(values)}", *shown]))

    def validation_sums(
        self, teacher: Mapping[int, QKV], student: QKV | tuple[QKV, ...], inputs: dict[str, Tensor | None]
    ) -> Tensor:
        """Loss and parts in the order of `names`, summed over the samples of a micro-batch, and last their number."""
        loss, samples = self.loss(teacher, student, inputs), inputs["input_ids"].shape[0]
        means = torch.stack([loss.total, *loss.per_pair.values(), torch.ones_like(loss.total)])
        return means.double() * samples

    def vectors(self, student: QKV | tuple[QKV, ...], inputs: dict[str, Tensor | None]) -> Tensor:
        """Of samples or texts, from what the student gives for them: means over the last layer, [rows, 3 hidden]."""
        last = student if self.recipe.relations.layers is None else student[-1]
        return qkv_vectors(last, inputs["attention_mask"])

    def save(self) -> None:
        """Write a checkpoint of the present step; older ones stay until `remove_old`."""
        began = time.perf_counter()
        record = Record(
            step=self.step,
            samples_seen=self.samples_seen,
            world_size=self.world_size,
            zero_stage=self.engine.zero_optimization_stage(),
            recipe=self.recipe.learned(),
            corpus_fingerprint=self._corpus_fingerprint,
            teacher_fingerprint=self._teacher_fingerprint,
            files={},
        )
        ranks.decided_by_rank_0(lambda: run_folder.require_unmoved(self.output, self._marker))
        checkpoint.save(self.engine, self.output / run_folder.CHECKPOINTS, record)
        seconds = time.perf_counter() - began
        self.log.record("checkpoint", self.step, {"seconds": seconds})
        self.say(f"saved {records.tag_of(self.step)} in {seconds:.1f} s")

    def remove_old(self) -> None:
        """Remove the checkpoints that the recipe does not keep."""
        keep, folder = self.recipe.checkpoint, self.output / run_folder.CHECKPOINTS
        ranks.decided_by_rank_0(lambda: checkpoint.remove_old(folder, keep.keep_last, keep.keep_every_steps))

    def end(self, words: str) -> None:
        """End this run before its time, after its last `save`; those beside it go on."""
        self.has_ended = True
        self.say(words)
        if self.rank == 0:
            run_folder.mark_ended(self.output, step=self.step, reason=words)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def micro_batch_seed(seed: int, step: int, number: int, rank: int) -> int:
    """The seed of dropout's random numbers in one micro-batch of one step on one rank."""
    digest = hashlib.sha256(f"{seed} {step} {number} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def loss_text(values: dict[str, Any]) -> str:
    parts = "  ".join(f"{pair} {value:.4f}" for pair, value in values["per_pair"].items())
    return f"loss {values['loss']:.4f}  ({parts})"
