"""The loop: batches -> frozen teacher and students -> relation losses -> DeepSpeed -> checkpoints.

A step is a function of the weights and its number alone: the loader's order is pure, and the random numbers of dropout
are seeded anew for every micro-batch and rank. So the state of a run is what DeepSpeed saves and one integer,
`samples_seen`, and a resumed run computes what an unbroken one would have.

Several students may learn side by side from one pass of the teacher; each computes what it would compute alone.
"""

import dataclasses
import faulthandler
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.shards import Corpus
from pipeline.config import Recipe
from pipeline.data.loader import Batch, Loader
from pipeline.encoders import flops
from pipeline.engine import checkpoint, deepspeed_config, placement, process_group, ranks
from pipeline.engine.records import Record
from pipeline.relations.qkv import QKV
from pipeline.training import company
from pipeline.training.build import data_options
from pipeline.training.monitor import Interval, PhaseTimer, Terminal
from pipeline.training.stopping import EXIT_DIVERGED, EXIT_REQUEUE, StopRequest
from pipeline.training.student_run import StudentRun, loss_text
from pipeline.training.validation import Validation


class Distillation:
    """One job on this rank: a teacher, the students' runs and the loader, ready to take steps.

    Args:
        recipes: that may train side by side, see `company.check`.
        ds_config: a DeepSpeed configuration, see `deepspeed_config.read_ds_config`.
        corpus: of all recipes.
        checkpoints: the record that each run goes on from, all of one step; None: from the beginning.
    """

    def __init__(
        self, recipes: Sequence[Recipe], ds_config: dict[str, Any], corpus: Corpus, checkpoints: Sequence[Record | None]
    ) -> None:
        self.recipe = recipes[0]
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = process_group.device()
        self.stop = StopRequest()
        self.timer = PhaseTimer(self.device)
        self.step = checkpoints[0].step if checkpoints[0] is not None else 0
        steps = self.recipe.optimizer.steps
        self.terminal = Terminal(total_steps=steps, first_step=self.step, is_main=self.rank == 0)
        model = self.recipe.teacher.model
        fingerprint = ranks.decided_by_rank_0(lambda: placement.teacher_fingerprint(model))
        names = company.names(recipes)
        configs = company.ds_configs(recipes, ds_config, world_size=self.world_size, names=names)
        self.teacher_layers = company.teacher_layers(recipes)
        self.teacher, where = self._place_teacher(configs[0])
        self.micro_batch_samples = configs[0]["train_micro_batch_size_per_gpu"]
        self.accumulation_steps = configs[0]["gradient_accumulation_steps"]
        self.runs = [
            StudentRun(recipe, config, corpus, teacher_fingerprint=fingerprint, name=name, say=self.terminal.say)
            for recipe, config, name in zip(recipes, configs, names, strict=True)
        ]
        self.operations = self._count_operations()
        self._say_what_company_costs()
        for run, record in zip(self.runs, checkpoints, strict=True):
            run.start(record)
        self.terminal.say(f"teacher: {where.kind} ({where.reason})")
        self.loader = Loader(
            corpus,
            data_options(self.recipe),
            global_batch_samples=self.recipe.optimizer.global_batch_samples,
            micro_batch_samples=self.micro_batch_samples,
            rank=self.rank,
            world_size=self.world_size,
            samples_seen=self.samples_seen,
        )
        if self.recipe.data.weights is None and (short := self.loader.sample_set.without_samples):
            self.terminal.say(f"never seen, having less text than one sample takes: {', '.join(short)}")
        self.is_padded = self.recipe.data.packing == "none"
        self._tokens_seen, self._tokens_taken = self._tokens_before(), 0  # of all ranks; of this one, not yet logged
        self.validation = Validation(
            self.recipe,
            corpus,
            micro_batch_samples=self.micro_batch_samples,
            teach=self._teach,
            say=self.terminal.say,
        )

    def _tokens_before(self) -> int:
        """Real tokens of the steps before this start. Where rows are padded the log tells, which has a record of every
        step that was saved."""
        tokens = self.samples_seen * self.recipe.data.seq_tokens
        if not self.is_padded or not self.step:
            return tokens
        logged = ranks.decided_by_rank_0(lambda: self.runs[0].last_logged("tokens_seen"))
        return logged if isinstance(logged, int) else tokens

    def _place_teacher(self, ds_config: dict[str, Any]) -> tuple[torch.nn.Module, placement.Placement]:
        """The teacher up to the deepest layer that a student learns from."""
        teacher = dataclasses.replace(self.recipe.teacher, layer=self.teacher_layers[-1])
        where = placement.choose(
            teacher,
            dtype=deepspeed_config.compute_dtype(ds_config),
            free_bytes=min(ranks.gathered(placement.free_bytes(process_group.ranks_on_this_machine()))),
            world_size=self.world_size,
        )
        return placement.start_teacher(teacher, where, ds_config, self.teacher_layers), where

    def _count_operations(self) -> float:
        """Of a step of the active runs, with the teacher's pass."""
        return self._teacher_operations() + sum(run.operations for run in self.active)

    def _teacher_operations(self) -> float:
        """Of the teacher in one step, with the scores of all relations."""
        return flops.teacher_flops(
            getattr(self.teacher, "module", self.teacher),
            seq_tokens=self.recipe.data.seq_tokens,
            global_batch_samples=self.recipe.optimizer.global_batch_samples,
            relations=sum(len(run.recipe.relations.loss_names()) for run in self.active),
        )

    def _say_what_company_costs(self) -> None:
        students = {run.name: (run.operations, checkpoint.state_bytes(run.engine)) for run in self.runs}
        for line in company.costs(self._teacher_operations(), students) if len(students) > 1 else ():
            self.terminal.say(line)

    def compile_layers(self) -> None:
        getattr(self.teacher, "module", self.teacher).compile_layers(ragged=self.recipe.data.packing == "none")
        for run in self.runs:
            run.compile_layers()

    @property
    def samples_seen(self) -> int:
        return self.step * self.recipe.optimizer.global_batch_samples

    @property
    def active(self) -> list[StudentRun]:
        """The runs that have not ended before their time."""
        return [run for run in self.runs if not run.has_ended]

    def train(self, stop_at_step: int | None = None, after_step: Callable[[], None] = lambda: None) -> int:
        """Take steps until the recipe's last one, `stop_at_step`, or a signal; save; return the exit code."""
        last_step = self.recipe.optimizer.steps
        end = min(last_step, stop_at_step or last_step)
        if self.step == 0:
            self.validate()
        else:
            self.terminal.say(f"resumed from step {self.step} ({self.samples_seen:,} samples seen)")
        batches = iter(self.loader)
        interval = Interval(self.step, self.loader.data_wait_seconds)
        every, saved_every = self.recipe.logging, self.recipe.checkpoint.every_steps
        self.terminal.begin()
        while self.step < end and self.active:
            faulthandler.dump_traceback_later(every.hang_seconds)
            self._take_step(batches)
            after_step()
            is_logged = self.step % every.every_steps == 0 or self.step == end
            if is_logged or (self.is_padded and self.step % saved_every == 0):
                self._log_step(interval)
                interval = Interval(self.step, self.loader.data_wait_seconds)
            if self.step == last_step or (every.validate_every_steps and self.step % every.validate_every_steps == 0):
                with interval.left_out():
                    self.validate()
            stopping = self.stop.agreed(self.device)
            if stopping and self.is_padded and interval.steps(self.step):
                self._log_step(interval)
            if stopping or self.step == end or self.step % saved_every == 0:
                self._save(self.active)
            else:
                self._save([run for run in self.active if run.has_diverged])
            self._end_diverged()
            if stopping and self.active and self.step < last_step:
                self.terminal.say(f"stopping: {self.stop.reason}; saved step {self.step}, start again to go on")
                return EXIT_REQUEUE
        return self._how_it_ended(last_step)

    def _how_it_ended(self, last_step: int) -> int:
        fruitless = [run for run in self.active if run.engine.skipped_steps >= self.step > 0]
        for run in self.active:
            if run in fruitless:
                run.say(f"all {self.step} steps were skipped, because none was finite: nothing has been learned")
            elif self.step < last_step:
                run.say(f"stopped after step {self.step} as asked; start again to go on")
            else:
                run.say(f"done: {self.step} steps, {self.samples_seen:,} samples, {run.output}")
        return EXIT_DIVERGED if fruitless or len(self.active) < len(self.runs) else 0

    def validate(self) -> None:
        """Measure the students on held-out samples, without dropout, and log what comes of it."""
        self.validation.measure(self.active)
        self.timer.take()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.loader.close()
        for run in self.runs:
            run.close()
        self.terminal.close()

    def _save(self, runs: Sequence[StudentRun]) -> None:
        """Checkpoints of this step. No run loses older ones before all are whole: all may have to go back together."""
        for run in runs:
            run.save()
        for run in runs:
            run.remove_old()

    def _end_diverged(self) -> None:
        for run in self.active:
            if run.has_diverged:
                run.end(
                    f"giving up: {run.skipped_in_a_row} steps in a row were not finite. The weights are those before "
                    f"them; their samples are in metrics.jsonl. Lower optimizer.peak_lr, or look at the data."
                )
                self.operations = self._count_operations()

    def _take_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step of every run; a micro-batch goes through the teacher once."""
        runs, taken = self.active, []
        for run in runs:
            run.begin_step()
        for number in range(self.accumulation_steps):
            taken.append(next(batches))
            self._tokens_taken += taken[-1].tokens if self.is_padded else 0
            inputs = taken[-1].inputs(self.device)
            teacher = self._teach(inputs)
            for run in runs:
                run.learn(teacher, inputs, number)
        self.step += 1
        skipped = [run for run in runs if run.skipped_in_a_row]
        for run in skipped:
            run.note_skipped()
        if any(run.skipped_in_a_row == 1 for run in skipped):
            self._look_at_teacher(taken)

    def _look_at_teacher(self, batches: list[Batch]) -> None:
        """Say so if the teacher's own outputs for micro-batches are not finite on some rank."""
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        for batch in batches:
            with torch.no_grad():
                outputs = self._teach(batch.inputs(self.device))
            for x in (x for qkv in outputs.values() for x in qkv):
                # What padding gives is nobody's fault.
                bad |= ~(x if batch.attention_mask is None else x[batch.attention_mask.to(x.device)]).isfinite().all()
        if any(ranks.gathered(bool(bad))):
            layers = ", ".join(map(str, self.teacher_layers))
            self.terminal.say(
                f"the teacher's own queries, keys or values of layer {layers} are not finite: look at the weights of "
                f"{self.recipe.teacher.model}, or compute in fp32 or bf16 if this is fp16"
            )

    def _teach(self, inputs: dict[str, Tensor | None]) -> Mapping[int, QKV]:
        """The teacher's queries, keys and values by layer."""
        with self.timer.phase("teacher"), torch.no_grad():
            return dict(zip(self.teacher_layers, self.teacher(**inputs), strict=True))

    def _log_step(self, interval: Interval) -> None:
        seconds, steps = interval.seconds_a_step(self.step), interval.steps(self.step)
        tokens = self._count_tokens()
        shared: dict[str, Any] = dict(
            tokens_seen=self._tokens_seen,
            tokens_per_second=tokens / steps / seconds,
            flops_per_second=self.operations / seconds,
            side_by_side=len(self.active),
            shares=self.loader.shares(self.samples_seen),
            epochs=self.loader.epochs(self.samples_seen),
        )
        if self.device.type == "cuda" and (peak := flops.peak_flops(torch.cuda.get_device_name())):
            shared["model_flops_utilisation"] = shared["flops_per_second"] / (peak * self.world_size)
        phases = self.timer.take() | {"data_wait": self.loader.data_wait_seconds - interval.data_wait_seconds}
        phases = {name: spent / steps for name, spent in phases.items()}
        logged = [run.log_step(seconds=seconds, steps=steps, shared=shared, phases=phases) for run in self.active]
        texts = [f"{loss_text(logged[0])}  lr {self.active[0].lr:.1e}"]
        if len(self.runs) > 1:
            texts = [f"{run.name} {values['loss']:.4f}" for run, values in zip(self.active, logged, strict=True)]
        self.terminal.progress(self.step, f"{'  |  '.join(texts)}  {shared['tokens_per_second']:,.0f} tokens/s")

    def _count_tokens(self) -> int:
        """Real tokens of all ranks since the last call, which `_tokens_seen` is raised by."""
        before = self._tokens_seen
        if self.is_padded:
            self._tokens_seen += sum(ranks.gathered(self._tokens_taken))
            self._tokens_taken = 0
        else:
            self._tokens_seen = self.samples_seen * self.recipe.data.seq_tokens
        return self._tokens_seen - before
