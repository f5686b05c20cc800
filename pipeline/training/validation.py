"""What is measured of the students while they learn: on held-out samples, and on labelled texts if there are any.

Training does not notice: models are in eval mode, there are no gradients, and random numbers are seeded anew for every
micro-batch. Every rank computes its part of the samples and texts, in as many passes as the others, as ZeRO-3 wants it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.shards import Corpus
from data_prep.tokens.tokenizer import Tokenizer
from pipeline.config import Recipe
from pipeline.data.loader import validation_batches
from pipeline.data.reader import Batch
from pipeline.engine import process_group, ranks
from pipeline.relations.qkv import QKV
from pipeline.tasks.probe import ProbeTask, read_probe, rows_of
from pipeline.tasks.vectors import FEWEST_TEXTS, linear_probe, neighbours_in_common, qkv_vectors
from pipeline.training.build import data_options
from pipeline.training.student_run import StudentRun

MOST_NEIGHBOURS = 2048  # held-out samples, the first ones, among which neighbours are looked for


class Validation:
    """Held-out losses and scores of students that learn side by side.

    Args:
        recipe: for what all of them share.
        corpus: the held-out samples are those of its validation split; without one nothing is measured.
        micro_batch_samples: of a pass.
        teach: a micro-batch -> the teacher's queries, keys and values by layer.
        say: prints a line.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        *,
        micro_batch_samples: int,
        teach: Callable[[dict[str, Tensor | None]], Mapping[int, QKV]],
        say: Callable[[str], None],
    ) -> None:
        self._corpus, self._options, self._samples = corpus, data_options(recipe), recipe.logging.validation_samples
        self._teach, self._say, self._device = teach, say, process_group.device()
        rank = dist.get_rank()
        self._is_main = rank == 0
        self._part = dict(micro_batch_samples=micro_batch_samples, rank=rank, world_size=dist.get_world_size())
        self._probe: tuple[ProbeTask, Tensor, Tensor] | None = None
        if recipe.logging.probe:
            self._probe = ranks.decided_by_rank_0(lambda: _read_probe(recipe))

    @torch.no_grad()
    def measure(self, runs: Sequence[StudentRun]) -> None:
        """Measure the students of `runs` as they are now, and log it."""
        if not self._corpus.shards("validation"):
            if runs[0].step == 0:
                self._say("no held-out loss: the corpus has no validation split (minilm prepare --validation 0.01)")
            return
        for run in runs:
            run.engine.eval()
        for run, (sums, scores), probed in zip(runs, self._held_out(runs), self._probed(runs), strict=True):
            run.engine.train()
            run.log_validation(sums, scores | probed)

    def _held_out(self, runs: Sequence[StudentRun]) -> list[tuple[Tensor, dict[str, float]]]:
        """Of each run the loss's sums over all ranks, see `StudentRun.validation_sums`, and on rank 0 its score."""
        count = min(self._samples, MOST_NEIGHBOURS)
        sums = [torch.zeros(len(run.names) + 1, dtype=torch.float64, device=self._device) for run in runs]
        student_rows = [ranks.SharedRows(count) for _ in runs]
        teacher_rows = {run.recipe.teacher.layer: ranks.SharedRows(count) for run in runs}
        for batch in validation_batches(self._corpus, self._options, samples=self._samples, **self._part):
            inputs = batch.inputs(self._device)
            teacher = self._teach(inputs)
            for layer, rows in teacher_rows.items():
                rows.put(batch.samples, qkv_vectors(teacher[layer], inputs["attention_mask"]))
            for run, own, rows in zip(runs, sums, student_rows, strict=True):
                student = run.forward(inputs)
                own += run.validation_sums(teacher, student, inputs)
                rows.put(batch.samples, run.vectors(student, inputs))
        of_teacher = {layer: rows.together() for layer, rows in teacher_rows.items()}
        found = []
        for run, own, rows in zip(runs, sums, student_rows, strict=True):
            dist.all_reduce(own)
            samples, theirs, ours = int(own[-1]), of_teacher[run.recipe.teacher.layer], rows.together()
            found.append((own, neighbours(theirs[:samples], ours[:samples]) if self._is_main else {}))
        return found

    def _probed(self, runs: Sequence[StudentRun]) -> list[dict[str, float]]:
        """Of each run, on rank 0, its score on the labelled texts."""
        if self._probe is None:
            return [{}] * len(runs)
        task, ids, real = self._probe
        found = [ranks.SharedRows(len(ids)) for _ in runs]
        for batch in batches_of(ids, real, **self._part):
            inputs = batch.inputs(self._device)
            for run, rows in zip(runs, found, strict=True):
                rows.put(batch.samples, run.vectors(run.forward(inputs), inputs))
        vectors = [rows.together() for rows in found]
        return [accuracy(one, task) if self._is_main else {} for one in vectors]


def _read_probe(recipe: Recipe) -> tuple[ProbeTask, Tensor, Tensor]:
    """The labelled texts, and those for training and testing one after another as rows, see `rows_of`."""
    task = read_probe(Path(recipe.logging.probe))
    tokenizer = Tokenizer.load(recipe.teacher.model, encoder="reference")
    return task, *rows_of([*task.train_texts, *task.test_texts], tokenizer, recipe.data.seq_tokens)


def batches_of(ids: Tensor, real: Tensor, *, micro_batch_samples: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's part of the rows, in as many whole micro-batches as on every rank; numbers past the last fill up."""
    every = micro_batch_samples * world_size
    for first in range(rank * micro_batch_samples, -(-len(ids) // every) * every, every):
        numbers = np.arange(first, first + micro_batch_samples)
        rows = numbers % len(ids)
        yield Batch(
            input_ids=ids[rows], attention_mask=real[rows], document_ids=None, position_ids=None, samples=numbers
        )


def neighbours(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """The share of neighbours in common, of vectors [samples, width]; nothing where it cannot be told."""
    if len(teacher) < FEWEST_TEXTS or not (teacher.isfinite().all() and student.isfinite().all()):
        return {}
    return {"neighbours_in_common": neighbours_in_common(teacher, student)}


def accuracy(vectors: Tensor, task: ProbeTask) -> dict[str, float]:
    """The linear probe's, of vectors [texts, width], training texts first; nothing where it cannot be told."""
    if not vectors.isfinite().all():
        return {}
    train, test = vectors.cpu().split([len(task.train_labels), len(task.test_labels)])
    with torch.enable_grad():
        return {"probe_accuracy": linear_probe(train, task.train_labels, test, task.test_labels)}
