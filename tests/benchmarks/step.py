"""A whole training step on a CPU: this project beside bertdistiller, in one paired run.

    python -m venv PEER && PEER/bin/pip install bertdistiller==0.1.2    # needs transformers 4, so it lives apart
    python tests/benchmarks/step.py --peer-python PEER/bin/python [--ragged] [--positions 128 --rows 16]

Teacher, student weights, batch, optimizer (AdamW, fp32), dropout (0.1) and threads are the same for both; a step is
teacher, student, loss, backward, update. Each contender is a process of its own that waits while the other one works;
they take turns, and the table has medians. First both give the loss of the same student without dropout: it must be
the same number. Memory is the peak of the steps above the process with its models loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def make_batch(options: argparse.Namespace):
    """Token ids and mask, int64 [rows, positions]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30_000, (options.rows, options.positions), generator=generator)
    lengths = torch.full((options.rows,), options.positions)
    if options.ragged:
        lengths = torch.linspace(options.positions / 16, options.positions, options.rows).round().long()
    mask = torch.arange(options.positions) < lengths[:, None]
    return ids.masked_fill(~mask, 0), mask


def our_loss(options: argparse.Namespace):
    """(student, function that gives the loss of the batch)."""
    import torch
    from transformers import AutoModel

    from pipeline.encoders.models import RelationEncoder, load_teacher, tail_parameter_names
    from pipeline.relations.loss import relation_loss

    teacher = load_teacher(options.teacher, layer=options.layer)
    student = RelationEncoder(AutoModel.from_pretrained(options.student_folder, add_pooling_layer=False)).train()
    for name in tail_parameter_names(student):
        student.get_parameter(name).requires_grad_(False)
    ids, mask = make_batch(options)
    mask = mask if options.ragged else None

    def loss():
        with torch.no_grad():
            wanted = teacher(ids, mask)
        return relation_loss(wanted, student(ids, mask), heads=options.heads, mask=mask).total

    return student, loss


def peer_loss(options: argparse.Namespace):
    """The same for bertdistiller, through its own trainer."""
    from bertdistiller import MiniLMTrainer, MiniLMTrainingArguments
    from transformers import AutoModel

    teacher = AutoModel.from_pretrained(options.teacher)
    teacher.config.architectures = ["BertForMaskedLM"]  # the only name it accepts; the encoder is the same
    student = AutoModel.from_pretrained(options.student_folder).train()
    arguments = MiniLMTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        report_to=[],
        teacher_layer=options.layer,
        student_layer=student.config.num_hidden_layers,
        student_hidden_size=student.config.hidden_size,
        student_attention_heads=student.config.num_attention_heads,
        num_relation_heads=options.heads,
    )
    trainer = MiniLMTrainer(model=student, args=arguments, teacher_model=teacher)
    ids, mask = make_batch(options)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return student, lambda: trainer.compute_loss(student, inputs)


def work(options: argparse.Namespace) -> None:
    """A contender: answers each line on stdin with a line of JSON."""
    import torch

    torch.set_num_threads(options.threads)
    student, loss = (our_loss if options.work == "ours" else peer_loss)(options)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4)
    loaded = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for command in sys.stdin:
        if command.strip() == "loss":
            student.eval()
            with torch.no_grad():
                answer = {"loss": float(loss())}
            student.train()
        elif command.strip() == "step":
            began, busy = time.perf_counter(), time.process_time()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            answer = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
        else:
            answer = {"peak_bytes": memory_bytes("VmHWM") - loaded}
        print(json.dumps(answer), flush=True)


def memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Contender:
    """A worker process."""

    def __init__(self, python: str, name: str, options: argparse.Namespace) -> None:
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(options).items() if v not in (None, False, True)]
        flags += ["--ragged"] if options.ragged else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, __file__, *flags, f"--work={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, command: str) -> dict[str, float]:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")


def make_student(options: argparse.Namespace, folder: str) -> None:
    from pipeline.encoders.models import StudentShape, build_student, teacher_config

    shape = StudentShape.parse(options.shape)
    build_student(shape, teacher_config(options.teacher), dropout=0.1).backbone.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter with bertdistiller; without it only this project is timed")
    parser.add_argument("--teacher", help="model folder; the sample teacher unless given")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--shape", default="3x192")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--student-folder", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    if options.teacher is None:
        from data_prep import samples

        options.teacher = str(samples.fetch() / samples.TEACHER)
    with tempfile.TemporaryDirectory() as folder:
        options.student_folder = folder
        make_student(options, folder)
        pythons = {"ours": sys.executable} | ({"bertdistiller": options.peer_python} if options.peer_python else {})
        contenders = {name: Contender(python, name, options) for name, python in pythons.items()}
        losses = {name: contender.ask("loss")["loss"] for name, contender in contenders.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
            raise SystemExit(f"the losses differ: {losses}")
        for contender in contenders.values():
            contender.ask("step")
        rounds = [{name: c.ask("step") for name, c in contenders.items()} for _ in range(options.rounds)]
        peaks = {name: contender.ask("memory")["peak_bytes"] for name, contender in contenders.items()}
        for contender in contenders.values():
            contender.process.stdin.close()
            contender.process.wait()
    report(options, losses, rounds, peaks)


def report(options, losses: dict[str, float], rounds: list[dict], peaks: dict[str, int]) -> None:
    shape = f"{options.rows} x {options.positions}{' ragged' if options.ragged else ''}"
    tokens = int(make_batch(options)[1].sum())
    print(f"{shape}, layer {options.layer} -> {options.shape}, {options.heads} heads, {options.threads} threads")
    print("| | loss | seconds | CPU seconds | real tokens/s | times faster | (CPU) | peak MiB |\n|" + "---|" * 8)
    last = list(losses)[-1]
    for name, loss in losses.items():
        seconds, cpu = (statistics.median(r[name][k] for r in rounds) for k in ("seconds", "cpu_seconds"))
        faster, leaner = (
            statistics.median(r[last][k] / r[name][k] for r in rounds) for k in ("seconds", "cpu_seconds")
        )
        print(
            f"| {name} | {loss:.5f} | {seconds:.2f} | {cpu:.2f} | {tokens / seconds:.0f} | {faster:.2f} | {leaner:.2f} "
            f"| {peaks[name] / 2**20:.0f} |"
        )


if __name__ == "__main__":
    main()
