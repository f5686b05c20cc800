"""Time and memory of the relation loss, forward and backward, against materialised relation matrices.

    python tests/benchmarks/relations.py                      # CPU: batch 4 x 512, 768 -> 384, 48 heads, fp32
    python tests/benchmarks/relations.py --rows 16 --positions 128
    python tests/benchmarks/relations.py --ragged             # rows of 32 to 512 real positions
    python tests/benchmarks/relations.py --device cuda --dtype bfloat16 --rows 16 --teacher 1024 --heads 64

Every implementation is timed in turn within each round, so that a busy machine disturbs all alike; the table has
medians. Memory is the peak above inputs and runtime, of a process of its own on a CPU.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.relations.loss import relation_loss  # noqa: E402
from pipeline.relations.qkv import QKV


def materialised(teacher: QKV, student: QKV, heads: int, lengths: list[int]) -> torch.Tensor:
    """Q-Q, K-K and V-V with whole matrices and torch's own softmax and KL divergence, row by row where rows differ."""
    positions = teacher.query.shape[1]
    rows = [slice(None)] if set(lengths) == {positions} else [slice(i, i + 1) for i in range(len(lengths))]
    total = torch.zeros((), device=teacher.query.device)
    for x_t, x_s in zip(teacher, student, strict=True):
        scores = []
        for x in (x_t, x_s):
            x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
            scores.append(x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1]))
        for row in rows:
            n = positions if row == slice(None) else lengths[row.start]
            t, s = (x[row, :, :n, :n].float() for x in scores)
            divergence = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum")
            total = total + divergence / (heads * n * len(lengths))
    return total


def inputs(options: argparse.Namespace) -> tuple[QKV, QKV, torch.Tensor | None, list[int]]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def made(hidden: int) -> QKV:
        shape = (options.rows, options.positions, hidden)
        return QKV(*(torch.randn(shape, generator=generator).to(options.device, dtype) for _ in range(3)))

    teacher, student = made(options.teacher), QKV(*(x.requires_grad_() for x in made(options.student)))
    lengths = [options.positions] * options.rows
    if options.ragged:
        lengths = torch.linspace(options.positions / 16, options.positions, options.rows).round().int().tolist()
    mask = torch.arange(options.positions) < torch.tensor(lengths)[:, None]
    return teacher, student, mask.to(options.device) if options.ragged else None, lengths


def step(name: str, options: argparse.Namespace, data) -> tuple[float, float]:
    """Seconds, and seconds of all processors, of one loss with its gradient."""
    teacher, student, mask, lengths = data
    for x in student:
        x.grad = None
    synchronise(options.device)
    began, busy = time.perf_counter(), time.process_time()
    if name == "materialised":
        total = materialised(teacher, student, options.heads, lengths)
    else:
        total = relation_loss(teacher, student, heads=options.heads, mask=mask, implementation=name).total
    total.backward()
    synchronise(options.device)
    return time.perf_counter() - began, time.process_time() - busy


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(name: str, options: argparse.Namespace) -> int:
    """Peak memory of one step above what is there before it."""
    if options.device == "cuda":
        data = inputs(options)
        step(name, options, data)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name, options, data)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_own_peak(options: argparse.Namespace) -> int:
    small = argparse.Namespace(**{**vars(options), "rows": 1, "positions": 16, "ragged": False})
    step(options.memory_of, small, inputs(small))  # what the libraries allocate once does not count
    data = inputs(options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is there now
    before = resident_bytes("VmRSS")
    step(options.memory_of, options, data)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A memory field of this process's status on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--teacher", type=int, default=768, help="hidden size")
    parser.add_argument("--student", type=int, default=384, help="hidden size")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(measure_own_peak(options))
        return
    names = ["materialised", "chunked", *(["triton"] if options.device == "cuda" else [])]
    data = inputs(options)
    for name in names:
        step(name, options, data)
    rounds = [{name: step(name, options, data) for name in names} for _ in range(options.rounds)]
    result = {
        name: {
            "seconds": statistics.median(r[name][0] for r in rounds),
            "cpu_seconds": statistics.median(r[name][1] for r in rounds),
            "speedup": statistics.median(r["materialised"][0] / r[name][0] for r in rounds),
            "cpu_speedup": statistics.median(r["materialised"][1] / r[name][1] for r in rounds),
            "peak_bytes": peak_bytes(name, options),
        }
        for name in names
    }
    shape = f"{options.rows} x {options.positions}{' ragged' if options.ragged else ''}"
    print(f"{shape}, {options.teacher} -> {options.student}, {options.heads} heads, {options.dtype}, {options.device}")
    print("| | seconds | CPU seconds | times faster | (CPU) | peak MiB | times less |\n|" + "---|" * 7)
    for name, row in result.items():
        less = result["materialised"]["peak_bytes"] / max(row["peak_bytes"], 1)
        mib = row["peak_bytes"] / 2**20
        times = f"{row['seconds']:.3f} | {row['cpu_seconds']:.3f} | {row['speedup']:.1f} | {row['cpu_speedup']:.1f}"
        print(f"| {name} | {times} | {mib:.0f} | {less:.1f} |")
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "result": result}, indent=1))


if __name__ == "__main__":
    main()
