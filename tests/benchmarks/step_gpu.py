"""A whole training step on one GPU: where the time goes, how busy the GPU is, how much memory the loss takes.

    python tests/benchmarks/step_gpu.py --shape xlmr-large            # 24x1024, layer 19 -> 12x384, 64 heads
    python tests/benchmarks/step_gpu.py --shape bert-base             # 12x768, layer 12 -> 6x384, 48 heads
    python tests/benchmarks/step_gpu.py --shape bert-base --loss materialised --rows 16 --micro-rows 16
    python tests/benchmarks/step_gpu.py --shape bert-base --compile --sweep

Weights are random, in bf16; the step is the training loop's: micro-batches of teacher, student, loss and backward, then
one fused AdamW update. Goals: the loss at most 15 % of the step, model FLOPs utilisation at least 45 %, memory of the
loss linear in positions. --sweep times the loss alone with every block size of the kernels. docs/distillation.md has
the roofline.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from relations import materialised  # noqa: E402

from pipeline import relation_kernel  # noqa: E402
from pipeline.encoders.flops import peak_flops, student_flops, teacher_flops  # noqa: E402
from pipeline.encoders.models import RelationEncoder, StudentShape, build_student, with_layers  # noqa: E402
from pipeline.relations.loss import relation_loss  # noqa: E402
from pipeline.relations.qkv import QKV

SHAPES = {
    "xlmr-large": dict(
        model_type="xlm-roberta", vocab=250_002, hidden=1024, layers=24, layer=19, student="12x384", heads=64
    ),
    "bert-base": dict(model_type="bert", vocab=30_522, hidden=768, layers=12, layer=12, student="6x384", heads=48),
}
PHASES = ("teacher", "student", "loss", "backward", "update")


def build(shape: dict, device: str) -> tuple[RelationEncoder, RelationEncoder]:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        shape["model_type"],
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // 64,
        intermediate_size=4 * shape["hidden"],
        max_position_embeddings=514,
    )
    with torch.device(device):
        truncated = with_layers(config, shape["layer"])
        backbone = AutoModel.from_config(truncated, dtype=torch.bfloat16, add_pooling_layer=False)
    teacher = RelationEncoder(backbone).eval().requires_grad_(False)
    student = build_student(StudentShape.parse(shape["student"]), config, family="bert", dropout=0.1)
    return teacher, student.to(device, torch.bfloat16)


class Step:
    """The training step, with an event between its phases."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.shape = options, SHAPES[options.shape]
        self.teacher, self.student = build(self.shape, options.device)
        if options.compile:
            self.teacher.compile_layers()
            self.student.compile_layers()
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.ids = torch.randint(5, self.shape["vocab"], (options.micro_rows, options.positions), device=options.device)

    def loss(self, teacher: QKV, student: QKV) -> torch.Tensor:
        if self.options.loss == "materialised":
            lengths = [self.options.positions] * self.options.micro_rows
            return materialised(teacher, student, self.shape["heads"], lengths)
        return relation_loss(teacher, student, heads=self.shape["heads"], implementation=self.options.loss).total

    def run(self) -> dict[str, float]:
        """Milliseconds of each phase, summed over the micro-batches."""
        marks: list[torch.cuda.Event] = []

        def mark() -> None:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        micro_batches = self.options.rows // self.options.micro_rows
        for _ in range(micro_batches):
            mark()
            with torch.no_grad():
                wanted = self.teacher(self.ids)
            mark()
            given = self.student(self.ids)
            mark()
            loss = self.loss(wanted, given)
            mark()
            (loss / micro_batches).backward()
            mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark()
        torch.cuda.synchronize()
        times = dict.fromkeys(PHASES, 0.0)
        for i in range(micro_batches):
            for j, phase in enumerate(PHASES[:4]):
                times[phase] += marks[5 * i + j].elapsed_time(marks[5 * i + j + 1])
        times["update"] = marks[-2].elapsed_time(marks[-1])
        return times

    def loss_bytes(self) -> int:
        """Peak memory of the loss and its gradient above its inputs."""
        with torch.no_grad():
            wanted, given = self.teacher(self.ids), self.student(self.ids)
        given = QKV(*(x.requires_grad_() for x in given))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.loss(wanted, given).backward()
        return torch.cuda.max_memory_allocated() - before


def sweep(step: Step) -> None:
    """Milliseconds of the loss alone for every block size."""
    with torch.no_grad():
        wanted, given = step.teacher(step.ids), step.student(step.ids)
    given = QKV(*(x.requires_grad_() for x in given))
    for rows_block, columns_block in itertools.product(itertools.product((64, 128), (32, 64, 128)), repeat=2):
        relation_kernel._ROWS_BLOCK, relation_kernel._COLUMNS_BLOCK = rows_block, columns_block
        times = []
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step.loss(wanted, given).backward()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        print(f"rows kernel {rows_block}, columns kernel {columns_block}: {statistics.median(times[2:]):.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--loss", default="triton", choices=["triton", "chunked", "materialised"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--micro-rows", type=int, default=64)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    step = Step(options)
    for _ in range(3):
        step.run()
    rounds = [step.run() for _ in range(options.rounds)]
    times = {phase: statistics.median(r[phase] for r in rounds) for phase in PHASES}
    total = statistics.median(sum(r.values()) for r in rounds)
    sizes = dict(seq_tokens=options.positions, global_batch_samples=options.rows, relations=3)
    flops = teacher_flops(step.teacher, **sizes) + student_flops(step.student, **sizes)
    name = torch.cuda.get_device_name()
    peak = peak_flops(name)
    print(f"{name}, {options.shape}, {options.rows} x {options.positions}, loss {options.loss}")
    print("  ".join(f"{phase} {ms:.1f} ms ({ms / total:.0%})" for phase, ms in times.items()))
    print(f"step {total:.1f} ms, {options.rows * options.positions / total * 1000:,.0f} tokens/s", end="")
    print(f", {flops / total / 1e9:.0f} TFLOP/s" + (f", MFU {flops / (total / 1000) / peak:.1%}" if peak else ""))
    print(f"loss memory {step.loss_bytes() / 2**20:.0f} MiB for {options.micro_rows} rows")
    if options.sweep:
        sweep(step)


if __name__ == "__main__":
    main()
