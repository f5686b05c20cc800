"""Floating-point operations of one training step, for the utilisation that a run logs.

A multiplication and an addition count as two. A matrix of w weights costs 2 w a token forward, and twice that backward
for the student. Attention costs 4 S H a token and layer (scores and their use); a relation costs 2 S H a token for the
teacher's scores, and three times 2 S H for the student's (scores, and the gradients of both sides).
"""

from torch import nn

from pipeline import devices
from pipeline.encoders.models import RelationEncoder, tail_parameter_names


def teacher_flops(teacher: RelationEncoder, *, seq_tokens: int, global_batch_samples: int, relations: int) -> float:
    """Of the teacher in one optimizer step over all ranks, for full windows of `seq_tokens`.

    Args:
        relations: that are compared, of all students.
    """
    a_token = encoder_flops(teacher, seq_tokens) + relations * 2 * seq_tokens * teacher.config.hidden_size
    return a_token * seq_tokens * global_batch_samples


def student_flops(student: RelationEncoder, *, seq_tokens: int, global_batch_samples: int, relations: int) -> float:
    """Of a student in one optimizer step over all ranks, forward and backward, for full windows of `seq_tokens`."""
    a_token = encoder_flops(student, seq_tokens) + relations * 2 * seq_tokens * student.config.hidden_size
    return 3 * a_token * seq_tokens * global_batch_samples


def encoder_flops(encoder: RelationEncoder, seq_tokens: int) -> float:
    """Of a forward pass to the last layer's projections, a token."""
    tail = set(tail_parameter_names(encoder))
    tables = {f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Embedding)}
    weights = sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in encoder.named_parameters()
        if name not in tail and name not in tables and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    )
    whole_layers = len(encoder.architecture.layer_list(encoder.backbone)) - 1
    return 2 * weights + whole_layers * 4 * seq_tokens * encoder.config.hidden_size


def peak_flops(device_name: str) -> float | None:
    """Of one device, in operations a second; None for a device that is not in the table."""
    device = devices.recognised(device_name)
    return None if device is None else 1e12 * device.tera
