"""Several students from one pass of the teacher, against the same students one after another.

    python tests/benchmarks/side_by_side.py [--teacher FOLDER ...] [--students 1 2 4] [--steps 6] [--rounds 3]

Every measurement is a process of its own on one rank: it takes real steps of real text (the samples of `minilm
samples`), and says how long a step took and how much memory it held at most. A round trains N students together, then
each of them alone; the ratio is (sum of the times alone) / (time together). The limit is written down first: what the
operations allow (`pipeline/encoders/flops.py`), T for the teacher and S for a student: (N T + N S) / (T + N S).
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

from data_prep import samples

WARM_UP = 2
# Students that differ as those of a sweep do: in their rate.
RATES = (6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4, 8e-5, 6e-5)


def measure(teacher: str, corpus: str, numbers: list[int], steps: int, shape: str, seq_tokens: int, batch: int) -> None:
    """Train the students of these numbers side by side, and print what it took as JSON."""
    from pipeline.encoders.models import teacher_config
    from pipeline.engine import deepspeed_config, process_group
    from pipeline.recipes import load_recipe
    from pipeline.training import job
    from pipeline.training.monitor import peak_memory_bytes
    from pipeline.training.trainer import Distillation

    layers = teacher_config(teacher).num_hidden_layers
    sizes = [f"data.seq_tokens={seq_tokens}", f"optimizer.global_batch_samples={batch}", f"student.shape={shape}"]
    sizes += ["student.heads=12", f"student.feed_forward={4 * int(shape.split('x')[1])}", "relations.heads=12"]
    sizes += [f"optimizer.steps={WARM_UP + steps}", "optimizer.warmup_steps=1", f"teacher.layer={layers}"]
    sizes += [f"teacher.model={teacher}", f"data.corpus={corpus}", "logging.every_steps=1000"]
    config = deepspeed_config.read_ds_config("cpu") | {"train_micro_batch_size_per_gpu": batch}
    with tempfile.TemporaryDirectory() as folder:
        own = [[f"run.output={folder}/{n}", f"optimizer.peak_lr={RATES[n]}"] for n in numbers]
        recipes = [load_recipe("demo", [*sizes, *more]) for more in own]
        corpus_opened = job.check_all(recipes, config, world_size=1)
        process_group.init_distributed()
        run = Distillation(recipes, config, corpus_opened, [None] * len(recipes))
        batches = iter(run.loader)
        for _ in range(WARM_UP):
            run._take_step(batches)
        began = time.perf_counter()
        for _ in range(steps):
            run._take_step(batches)
        seconds = (time.perf_counter() - began) / steps
        teacher_operations, students = run._teacher_operations(), [one.operations for one in run.runs]
        peak = peak_memory_bytes(run.device)
        run.close()
    print(json.dumps(dict(seconds=seconds, teacher=teacher_operations / len(numbers), students=students, peak=peak)))


def in_a_process(options: argparse.Namespace, teacher: Path, corpus: Path, numbers: list[int]) -> dict:
    command = [sys.executable, __file__, "--measure", *map(str, numbers), "--teacher", teacher, "--corpus", corpus]
    command += ["--steps", options.steps, "--shape", options.shape, "--seq-tokens", options.seq_tokens]
    command += ["--batch", options.batch]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if process.returncode:
        sys.exit(process.stderr[-3000:])
    return json.loads(process.stdout.strip().splitlines()[-1])


def prepare(teacher: Path, folder: Path) -> Path:
    """A corpus of the samples' leads with the teacher's tokenizer."""
    from data_prep.prepare import PrepareRequest, prepare
    from data_prep.readers.sources import Source

    source = Source.parse(f"jsonl,language=en:{samples.folder() / samples.LEADS.format(language='en')}")
    prepare(
        PrepareRequest(tokenizer=str(teacher), sources=(source,), limit_documents=2000), folder, show_progress=False
    )
    return folder


def compare(options: argparse.Namespace, teacher: Path, corpus: Path) -> None:
    first = in_a_process(options, teacher, corpus, [0])
    t, s = first["teacher"], first["students"][0]
    print(f"\n{teacher.name} -> {options.shape}, {options.batch} samples of {options.seq_tokens} tokens a step")
    print(f"a step is {(t + s) / 1e9:,.0f} GFLOP: teacher {t / (t + s):.0%}, student {s / (t + s):.0%}")
    print("students   limit    ratio (all rounds)             together   apart/step   peak together   peak alone")
    for count in options.students:
        ratios, together, apart, peaks = [], [], [], []
        for _ in range(options.rounds):
            both = in_a_process(options, teacher, corpus, list(range(count)))
            alone = [in_a_process(options, teacher, corpus, [n]) for n in range(count)]
            together.append(both["seconds"])
            apart.append(sum(one["seconds"] for one in alone))
            ratios.append(apart[-1] / together[-1])
            peaks.append((both["peak"], max(one["peak"] for one in alone)))
        limit = count * (t + s) / (t + count * s)
        every = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"{count:8} {limit:7.2f} {statistics.median(ratios):8.2f} ({every:20}) "
            f"{statistics.median(together):9.2f} s {statistics.median(apart):9.2f} s "
            f"{max(p[0] for p in peaks) / 1e9:11.2f} GB {max(p[1] for p in peaks) / 1e9:9.2f} GB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", action="append", help="a folder; the sample teacher by default")
    parser.add_argument("--students", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="6x384")
    parser.add_argument("--seq-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sizes = (options.steps, options.shape, options.seq_tokens, options.batch)
        return measure(options.teacher[0], options.corpus, options.measure, *sizes)
    samples.fetch()
    for teacher in map(Path, options.teacher or [samples.folder() / samples.TEACHER]):
        with tempfile.TemporaryDirectory() as folder:
            compare(options, teacher, prepare(teacher, Path(folder) / "corpus"))


if __name__ == "__main__":
    main()
