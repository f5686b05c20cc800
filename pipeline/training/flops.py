"""Floating-point operations of one training step, for the utilisation that a run logs.

A multiplication and an addition count as two. A matrix of w weights costs 2 w a token forward, and twice that backward
for the student. Attention costs 4 S H a token and layer (scores and their use); a relation costs 2 S H a token for the
teacher's scores, and three times 2 S H for the student's (scores, and the gradients of both sides).
"""

import re

from torch import nn

from pipeline.encoders.models import RelationEncoder, tail_parameter_names

# Dense peaks of 16-bit matrix products summed in fp32, without sparsity, in 10^12 operations a second, from the makers'
# data sheets. A device is the row with the most words that all stand in its name.
PEAKS = {
    "GB200": 2500, "B200": 2250,
    "H200": 989, "H200 NVL": 835, "GH200": 989,
    "H100": 989, "H100 NVL": 835, "H100 PCIe": 756, "H800": 989, "H800 PCIe": 756, "H20": 148,
    "A100": 312, "A800": 312, "A40": 149.7, "A30": 165, "A10": 125, "A10G": 70,
    "L40S": 362, "L40": 181, "L4": 121,
    "RTX 6000 Ada": 364, "RTX A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71,
    "V100": 125, "T4": 65,
    "MI300X": 1307, "MI325X": 1307,
}  # fmt: skip
# Part of a device, or a slower namesake: the peak of the row would be wrong.
_OTHERS = {"MIG", "Laptop", "D"}


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
    words = set(re.split(r"[\s_-]+", device_name))
    rows = [row for row in PEAKS if set(row.split()) <= words]
    if not rows or words & _OTHERS:
        return None
    return 1e12 * PEAKS[max(rows, key=lambda row: len(row.split()))]
