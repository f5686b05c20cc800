"""Teacher and student on the same micro-batch, and the relation loss between them."""

import itertools
from collections.abc import Callable, Iterable

import torch

from pipeline.config import Relations
from pipeline.data.loader import Batch
from pipeline.engine import ranks
from pipeline.relations.loss import RelationLoss, layerwise_relation_loss, relation_loss
from pipeline.training.monitor import PhaseTimer

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids")


class Comparison:
    """What a student is measured by.

    Args:
        teacher, student: modules that give queries, keys and values (a tuple of them if several layers are compared).
        relations: the recipe's.
        timer: told of the phases teacher, student and loss.
    """

    def __init__(self, teacher: Callable, student: Callable, relations: Relations, timer: PhaseTimer) -> None:
        self.teacher, self.student, self.relations, self.timer = teacher, student, relations, timer
        self.names = ("loss", *relations.loss_names())

    def loss(self, batch: Batch) -> RelationLoss:
        """Of one micro-batch, means over its samples."""
        inputs = self._inputs(batch)
        with self.timer.phase("teacher"), torch.no_grad():
            teacher = self.teacher(**inputs)
        with self.timer.phase("student"):
            student = self.student(**inputs)
        relations = self.relations
        options = dict(
            heads=relations.heads,
            pairs=relations.pairs,
            mask=inputs["attention_mask"],
            document_ids=inputs["document_ids"],
            implementation=relations.implementation,
        )
        with self.timer.phase("loss"):
            if relations.layers is None:
                return relation_loss(teacher, student, **options)
            return layerwise_relation_loss(teacher, student, weights=[pair[2] for pair in relations.layers], **options)

    def sums(self, batches: Iterable[Batch]) -> torch.Tensor:
        """Loss and parts in the order of `names`, summed over samples, and last their number; no gradient."""
        sums = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=self.timer.device)
        with torch.no_grad():
            for batch in batches:
                loss = self.loss(batch)
                means = torch.stack([loss.total, *loss.per_pair.values(), torch.ones_like(loss.total)])
                sums += means.double() * batch.input_ids.shape[0]
        return sums

    def teacher_is_finite(self, batches: list[Batch]) -> bool:
        """Whether the teacher's outputs for micro-batches are finite on all ranks."""
        bad = torch.zeros((), dtype=torch.bool, device=self.timer.device)
        for batch in batches:
            with torch.no_grad():
                output = self.teacher(**self._inputs(batch))
            for x in itertools.chain(*([output] if self.relations.layers is None else output)):
                # What padding gives is nobody's fault.
                bad |= ~(x if batch.attention_mask is None else x[batch.attention_mask.to(x.device)]).isfinite().all()
        return not any(ranks.gathered(bool(bad)))

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor | None]:
        """A micro-batch on the device, as teacher and student take it."""
        tensors = {name: getattr(batch, name) for name in _MODEL_INPUTS}
        return {name: t if t is None else t.to(self.timer.device, non_blocking=True) for name, t in tensors.items()}
