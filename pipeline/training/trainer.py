"""The loop: batches -> frozen teacher and student -> relation loss -> DeepSpeed -> checkpoints.

A step is a function of the weights and its number alone: the loader's order is pure, and the random numbers of dropout
are seeded anew for every step and rank. So the state of a run is what DeepSpeed saves and one integer, `samples_seen`,
and a resumed run computes what an unbroken one would have.
"""

import faulthandler
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.shards import Corpus
from pipeline.config import Recipe
from pipeline.data.loader import Batch, Loader, validation_batches
from pipeline.engine import checkpoint, deepspeed_config, placement, process_group, ranks, records
from pipeline.engine.records import Record
from pipeline.engine.student import (
    learning_rate_factor,
    set_learning_rate,
    spoil_unless_finite,
    start_student,
    take_step,
)
from pipeline.training import flops, run_folder
from pipeline.training.build import compared_layers, data_options, fresh_student
from pipeline.training.comparison import Comparison
from pipeline.training.monitor import PhaseTimer, RunLog, peak_memory_bytes, start_monitor
from pipeline.training.stopping import EXIT_DIVERGED, EXIT_REQUEUE, StopRequest


class Distillation:
    """One run on this rank: teacher, student engine, loader and log, ready to take steps."""

    def __init__(self, recipe: Recipe, ds_config: dict[str, Any], corpus: Corpus, record: Record | None) -> None:
        self.recipe, self.corpus, self.options = recipe, corpus, data_options(recipe)
        self.output = Path(recipe.run.output)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = process_group.device()
        self.stop = StopRequest()
        self.timer = PhaseTimer(self.device)
        self.micro_batch_samples = ds_config["train_micro_batch_size_per_gpu"]
        self.accumulation_steps = ds_config["gradient_accumulation_steps"]
        self.teacher_fingerprint = ranks.decided_by_rank_0(lambda: placement.teacher_fingerprint(recipe.teacher.model))
        student = fresh_student(recipe)
        self.teacher, where = self._place_teacher(ds_config)
        self.step_flops = self._count_operations(student)
        if self.rank == 0:
            run_folder.describe(self.output, recipe, ds_config, corpus, student)
        self.student = start_student(student, recipe.optimizer, ds_config)
        self.comparison = Comparison(self.teacher, self.student, recipe.relations, self.timer)
        self.step, self.lr, self.skipped_in_a_row = 0, 0.0, 0
        aside = None if record is None else self._go_on_from(record)
        self.log = self._open_log(ds_config)
        self.log.say(f"teacher: {where.kind} ({where.reason})")
        if aside is not None:
            self.log.say(f"went back to step {self.step}: the checkpoints of later steps are now in {aside}")
        self.loader = Loader(
            corpus,
            self.options,
            global_batch_samples=recipe.optimizer.global_batch_samples,
            micro_batch_samples=self.micro_batch_samples,
            rank=self.rank,
            world_size=self.world_size,
            samples_seen=self.samples_seen,
        )

    def _place_teacher(self, ds_config: dict[str, Any]) -> tuple[torch.nn.Module, placement.Placement]:
        where = placement.choose(
            self.recipe.teacher,
            dtype=deepspeed_config.compute_dtype(ds_config),
            free_bytes=min(ranks.gathered(placement.free_bytes(process_group.ranks_on_this_machine()))),
            world_size=self.world_size,
        )
        layers, _ = compared_layers(self.recipe)
        return placement.start_teacher(self.recipe.teacher, where, ds_config, layers), where

    def _count_operations(self, student: torch.nn.Module) -> int:
        return flops.step_flops(
            getattr(self.teacher, "module", self.teacher),
            student,
            seq_tokens=self.recipe.data.seq_tokens,
            global_batch_samples=self.recipe.optimizer.global_batch_samples,
            pairs=len(self.recipe.relations.loss_names()),
        )

    def _go_on_from(self, record: Record) -> Path | None:
        """Load a checkpoint; the folder in which those of later steps are now."""
        checkpoints = self.output / run_folder.CHECKPOINTS
        checkpoint.load(self.student, checkpoints, record)
        self.step = record.step
        return ranks.decided_by_rank_0(lambda: checkpoint.set_aside(checkpoints, record.step))

    def _open_log(self, ds_config: dict[str, Any]) -> RunLog:
        return RunLog(
            self.output,
            start_monitor(ds_config, self.output, self.recipe.as_text()).write_events,
            total_steps=self.recipe.optimizer.steps,
            first_step=self.step,
            is_main=self.rank == 0,
        )

    def compile_layers(self) -> None:
        for model in (self.teacher, self.student):
            getattr(model, "module", model).compile_layers(ragged=self.recipe.data.packing == "none")

    @property
    def samples_seen(self) -> int:
        return self.step * self.recipe.optimizer.global_batch_samples

    def train(self, stop_at_step: int | None = None, after_step=lambda: None) -> int:
        """Take steps until the recipe's last one, `stop_at_step`, or a signal; save; return the exit code."""
        last_step = self.recipe.optimizer.steps
        end = min(last_step, stop_at_step or last_step)
        if self.step == 0:
            self.validate()
        else:
            self.log.say(f"resumed from step {self.step} ({self.samples_seen:,} samples seen)")
        batches = iter(self.loader)
        interval = _Interval(self.step, self.loader.data_wait_seconds)
        while self.step < end:
            faulthandler.dump_traceback_later(self.recipe.logging.hang_seconds)
            losses = self._take_step(batches)
            after_step()
            if self.step % self.recipe.logging.every_steps == 0 or self.step == end:
                self._log_step(losses, interval)
                interval = _Interval(self.step, self.loader.data_wait_seconds)
            every = self.recipe.logging.validate_every_steps
            if self.step == last_step or (every and self.step % every == 0):
                self.validate()
            stopping = self.stop.agreed(self.device)
            diverged = self.skipped_in_a_row >= self.recipe.checkpoint.stop_after_skipped_steps
            if stopping or diverged or self.step == end or self.step % self.recipe.checkpoint.every_steps == 0:
                self.save()
            if diverged:
                self.log.say(
                    f"giving up: {self.skipped_in_a_row} steps in a row were not finite. The weights are those before "
                    f"them; their samples are in metrics.jsonl. Lower optimizer.peak_lr, or look at the data."
                )
                return EXIT_DIVERGED
            if stopping and self.step < last_step:
                self.log.say(f"stopping: {self.stop.reason}; saved step {self.step}, start again to go on")
                return EXIT_REQUEUE
        if self.student.skipped_steps >= self.step > 0:
            self.log.say(f"all {self.step} steps were skipped, because none was finite: nothing has been learned")
            return EXIT_DIVERGED
        if self.step < last_step:
            self.log.say(f"stopped after step {self.step} as asked; start again to go on")
        else:
            self.log.say(f"done: {self.step} steps, {self.samples_seen:,} samples, {self.output}")
        return 0

    def validate(self) -> None:
        """Measure the relation loss on the first held-out samples, without dropout, and log it."""
        if not self.corpus.shards("validation"):
            if self.step == 0:
                self.log.say("no held-out loss: the corpus has no validation split (minilm prepare --validation 0.01)")
            return
        self.student.eval()
        batches = validation_batches(
            self.corpus,
            self.options,
            samples=self.recipe.logging.validation_samples,
            micro_batch_samples=self.micro_batch_samples,
            rank=self.rank,
            world_size=self.world_size,
        )
        sums = self.comparison.sums(batches)
        self.student.train()
        self.timer.take()
        dist.all_reduce(sums)
        total, *parts = (sums[:-1] / sums[-1]).tolist()
        values = dict(loss=total, per_pair=dict(zip(self.comparison.names[1:], parts, strict=True)))
        self.log.record("validation", self.step, {"samples_seen": self.samples_seen, **values})
        self.log.say(f"held-out loss at step {self.step}: {_loss_text(values)}")

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        began = time.perf_counter()
        record = Record(
            step=self.step,
            samples_seen=self.samples_seen,
            world_size=self.world_size,
            zero_stage=self.student.zero_optimization_stage(),
            recipe=self.recipe.learned(),
            corpus_fingerprint=self.corpus.fingerprint,
            teacher_fingerprint=self.teacher_fingerprint,
            files={},
        )
        keep = self.recipe.checkpoint
        checkpoint.save(
            self.student,
            self.output / run_folder.CHECKPOINTS,
            record,
            keep_last=keep.keep_last,
            keep_every_steps=keep.keep_every_steps,
        )
        seconds = time.perf_counter() - began
        self.log.record("checkpoint", self.step, {"seconds": seconds})
        self.log.say(f"saved {records.tag_of(self.step)} in {seconds:.1f} s")

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.loader.close()
        self.log.close()

    def _take_step(self, batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
        """One optimizer step; the loss and its parts, means over this rank's micro-batches, on the device."""
        torch.manual_seed(step_seed(self.recipe.run.seed, self.step, self.rank))
        names = self.comparison.names
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        options = self.recipe.optimizer
        self.lr = options.peak_lr * learning_rate_factor(self.step, options)
        set_learning_rate(self.student, self.lr)
        stepped, taken = True, []
        for number in range(self.accumulation_steps):
            taken.append(next(batches))
            loss = self.comparison.loss(taken[-1])
            sums += torch.stack([loss.total.detach(), *loss.per_pair.values()])
            with self.timer.phase("backward"):
                last = number == self.accumulation_steps - 1
                self.student.backward(spoil_unless_finite(loss.total, sums) if last else loss.total)
            with self.timer.phase("step"):
                stepped = take_step(self.student)
        self.step += 1
        self._count_skipped(stepped, taken)
        return dict(zip(names, sums / self.accumulation_steps, strict=True))

    def _count_skipped(self, stepped: bool, batches: list[Batch]) -> None:
        self.skipped_in_a_row = 0 if stepped else self.skipped_in_a_row + 1
        if stepped:
            return
        size = self.recipe.optimizer.global_batch_samples
        samples = dict(first_sample=self.samples_seen - size, last_sample=self.samples_seen - 1)
        self.log.record("skipped", self.step, {"in_a_row": self.skipped_in_a_row, **samples})
        self.log.say(f"step {self.step} skipped: loss or gradient not finite (samples {list(samples.values())})")
        if self.skipped_in_a_row == 1 and not self.comparison.teacher_is_finite(batches):
            self.log.say(
                f"the teacher's own queries, keys or values of layer {self.recipe.teacher.layer} are not finite: look "
                f"at the weights of {self.recipe.teacher.model}, or compute in fp32 or bf16 if this is fp16"
            )

    def _log_step(self, losses: dict[str, torch.Tensor], interval: "_Interval") -> None:
        means = torch.stack(list(losses.values()))
        dist.all_reduce(means)
        loss, *parts = (means / self.world_size).tolist()
        seconds = interval.seconds_a_step(self.step)
        tokens = self.recipe.optimizer.global_batch_samples * self.recipe.data.seq_tokens
        phases = self.timer.take() | {"data_wait": self.loader.data_wait_seconds - interval.data_wait_seconds}
        phases = {name: spent / interval.steps(self.step) for name, spent in phases.items()}
        values: dict[str, Any] = dict(
            loss=loss,
            per_pair=dict(zip(list(losses)[1:], parts, strict=True)),
            lr=self.lr,
            gradient_norm=float(self.student.get_global_grad_norm() or 0.0),
            skipped_steps=self.student.skipped_steps,
            samples_seen=self.samples_seen,
            tokens_seen=self.step * tokens,
            tokens_per_second=tokens / seconds,
            flops_per_second=self.step_flops / seconds,
            seconds=phases | {"total": seconds},
            peak_memory_bytes=peak_memory_bytes(self.device),
            shares=self.loader.shares(self.samples_seen),
            epochs=self.loader.epochs(self.samples_seen),
        )
        if self.device.type == "cuda" and (peak := flops.peak_flops(torch.cuda.get_device_name())):
            values["model_flops_utilisation"] = values["flops_per_second"] / (peak * self.world_size)
        self.log.record("train", self.step, values)
        self.log.progress(self.step, f"{_loss_text(values)}  lr {self.lr:.1e}  {tokens / seconds:,.0f} tokens/s")


class _Interval:
    """Since when throughput and waiting are counted."""

    def __init__(self, first_step: int, data_wait_seconds: float) -> None:
        self._first_step, self._began = first_step, time.perf_counter()
        self.data_wait_seconds = data_wait_seconds

    def steps(self, step: int) -> int:
        return step - self._first_step

    def seconds_a_step(self, step: int) -> float:
        return (time.perf_counter() - self._began) / self.steps(step)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout's random numbers in one step on one rank."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _loss_text(values: dict[str, Any]) -> str:
    parts = "  ".join(f"{pair} {value:.4f}" for pair, value in values["per_pair"].items())
    return f"loss {values['loss']:.4f}  ({parts})"
