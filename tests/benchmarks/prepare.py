"""How fast text becomes token shards, beside the encoder alone and beside other tools, in one run.

    python tests/benchmarks/prepare.py --text leads-en.jsonl --tokenizer wordpiece=DIR --tokenizer xlmr=DIR \\
        --python datatrove=/path/to/python [--megabytes 64] [--out table.json]

The text is a JSONL file with a field `text`, repeated to the wanted size. Every tool reads that file, uses the same
number of processes and writes its own format to the disk. Tools are measured in turn, in `--rounds` rounds, and the
median of the rounds counts. Ours is measured on the whole text; tools that need minutes for it get a smaller part,
since all rates are per byte. A tool that is not installed (here or under `--python`) is left out of the table by name.

Rates are steady: the time for a fifth of the text is taken off, and its bytes with it, for every tool, so that imports,
process starts and loading the tokenizer do not count. Beside the wall time stands the processor time of all processes,
which other load on the machine disturbs less.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
FAST = ("encoder alone", "minilm prepare", "gigatoken + Megatron-Core")
SLOW_MEGABYTES = 6
TIMEOUT_SECONDS = 300
UNCOUNTED = ("datatrove",)  # does not wait for its processes, so their processor time is unknown


def repeat_text(source: Path, target: Path, megabytes: float) -> int:
    """Writes the lines of a JSONL file again and again; returns the bytes of text in it."""
    lines = source.read_bytes().splitlines(keepends=True)
    sizes = [len(json.loads(line)["text"].encode()) for line in lines]
    total, number = 0, 0
    with target.open("wb") as file:
        while total < megabytes * 1e6:
            file.write(lines[number % len(lines)])
            total += sizes[number % len(lines)]
            number += 1
    return total


# Tools: each takes (text file, tokenizer folder, empty folder) and does the whole work.


def encoder_alone(text: Path, tokenizer: str, folder: Path) -> tuple[float, float]:
    """Documents already in memory, ids thrown away; wall and processor seconds of encoding only."""
    import multiprocessing

    from data_prep.tokens.tokenizer import Tokenizer

    Tokenizer.load(tokenizer).encoder.save(folder)
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        times = pool.starmap(_encode_share, [(str(text), str(folder), number) for number in range(WORKERS)])
    return max(wall for wall, _ in times), sum(processor for _, processor in times)


def _encode_share(text: str, folder: str, number: int) -> tuple[float, float]:
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from data_prep.tokens.tokenizer import Encoder

    with open(text, "rb") as file:
        texts = [json.loads(line)["text"] for position, line in enumerate(file) if position % WORKERS == number]
    encoder = Encoder.load(folder)
    batches = [texts[start : start + 4096] for start in range(0, len(texts), 4096)]
    encoder.encode_flat(batches[0])
    start, processor = time.perf_counter(), time.process_time()
    for batch in batches:
        encoder.encode_flat(batch)
    return time.perf_counter() - start, time.process_time() - processor


def minilm_prepare(text: Path, tokenizer: str, folder: Path) -> None:
    from data_prep.prepare import PrepareRequest, prepare
    from data_prep.readers.sources import Source

    # Shards of the size of a unit, so that they are built all along, as they are in a corpus of many gigabytes.
    source = Source(kind="jsonl", path=str(text))
    request = PrepareRequest(tokenizer=tokenizer, sources=(source,), shard_bytes=16 << 20)
    prepare(request, folder / "corpus", workers=WORKERS, show_progress=False)


def datasets_map(text: Path, tokenizer: str, folder: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer, model_max_length=1 << 30)
    table = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder))
    table.map(
        lambda rows: {"ids": encode(rows["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=WORKERS,
        remove_columns=table.column_names,
    )


def datatrove(text: Path, tokenizer: str, folder: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    lines = text.read_bytes().splitlines(keepends=True)
    for number in range(WORKERS):  # it gives whole files to workers
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / f"{number}.jsonl").write_bytes(b"".join(lines[number::WORKERS]))
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(folder / "in")),
            DocumentTokenizer(
                output_folder=str(folder / "out"),
                tokenizer_name_or_path=f"{tokenizer}/tokenizer.json",
                eos_token=None,
                shuffle_documents=False,
            ),
        ],
        tasks=WORKERS,
        workers=WORKERS,
        logging_dir=str(folder / "logs"),
    ).run()


def gigatoken_megatron(text: Path, tokenizer: str, folder: Path) -> None:
    """Megatron's newest path: documents in batches through gigatoken, into its own indexed dataset."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        pool.starmap(_gigatoken_share, [(str(text), tokenizer, str(folder), number) for number in range(WORKERS)])


def _gigatoken_share(text: str, tokenizer: str, folder: str, number: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    import gigatoken
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    torch.set_num_threads(1)
    encode = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
    builder = IndexedDatasetBuilder(f"{folder}/{number}.bin", dtype=np.uint16)
    batch: list[str] = []

    def flush() -> None:
        for ids in encode.encode_batch_list(batch):
            builder.add_document(torch.as_tensor(np.asarray(ids, dtype=np.int64)), [len(ids)])
        batch.clear()

    size = os.path.getsize(text)
    with open(text, "rb") as file:
        file.seek(size * number // WORKERS)
        if number:
            file.readline()
        while file.tell() < size * (number + 1) // WORKERS and (line := file.readline()):
            batch.append(json.loads(line)["text"])
            if len(batch) == 1024:
                flush()
    flush()
    builder.finalize(f"{folder}/{number}.idx")


def mds_writer(text: Path, tokenizer: str, folder: Path) -> None:
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        pool.starmap(_mds_share, [(str(text), tokenizer, str(folder), number) for number in range(WORKERS)])


def _mds_share(text: str, tokenizer: str, folder: str, number: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np
    from mosaic import import_streaming
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    encode.no_truncation()
    encode.no_padding()
    with (
        open(text, "rb") as file,
        import_streaming().MDSWriter(out=f"{folder}/{number}", columns={"ids": "ndarray:uint32"}) as writer,
    ):
        for position, line in enumerate(file):
            if position % WORKERS == number:
                ids = encode.encode(json.loads(line)["text"], add_special_tokens=False).ids
                writer.write({"ids": np.array(ids, dtype=np.uint32)})


TOOLS = {
    "encoder alone": encoder_alone,
    "minilm prepare": minilm_prepare,
    "gigatoken + Megatron-Core": gigatoken_megatron,
    "datasets.map": datasets_map,
    "datatrove": datatrove,
    "MDSWriter": mds_writer,
}
SHORT_NAMES = {"datasets.map": "datasets", "gigatoken + Megatron-Core": "gigatoken", "MDSWriter": "streaming"}


def run_tool(tool: str, text: Path, tokenizer: str, python: str) -> tuple[float, float] | None:
    """Wall and processor seconds of one run in a fresh process and folder; None if the tool does not run here."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    command = [python, __file__, "--run", tool, str(text), tokenizer, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        if process.returncode:
            print(f"{tool}: left out: {errors.strip().splitlines()[-1:]}", file=sys.stderr)
            return None
        wall, processor = output.strip().splitlines()[-1].split()
        return float(wall), float(processor)
    except subprocess.TimeoutExpired:
        print(f"{tool}: left out: not done after {TIMEOUT_SECONDS} s", file=sys.stderr)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def measure(options, name: str, tokenizer: str, folder: Path) -> dict:
    """MB/s of every tool for one tokenizer."""
    sizes = {}
    for kind, megabytes in (("fast", options.megabytes), ("slow", min(options.megabytes, SLOW_MEGABYTES))):
        for part in (1.0, 0.2):
            path = folder / f"{kind}-{part}.jsonl"
            sizes[kind, part] = path, repeat_text(options.text, path, megabytes * part)
    rates: dict[str, list[dict]] = {}
    for _ in range(options.rounds):
        for tool in TOOLS:
            if options.tools and tool not in options.tools:
                continue
            kind = "fast" if tool in FAST else "slow"
            python = options.pythons.get(SHORT_NAMES.get(tool, tool), sys.executable)
            (small, small_bytes), (large, large_bytes) = sizes[kind, 0.2], sizes[kind, 1.0]
            seconds = [run_tool(tool, path, tokenizer, python) for path in (small, large)]
            if None in seconds:  # not here
                continue
            wall, processor = (later - earlier for earlier, later in zip(*seconds, strict=True))
            if wall <= 0 or (processor <= 0 and tool not in UNCOUNTED):
                print(f"{tool}: this round does not count: the smaller text took longer", file=sys.stderr)
                continue
            megabytes = (large_bytes - small_bytes) / 1e6
            rate = {"wall": megabytes / wall, "core": 0.0 if tool in UNCOUNTED else megabytes / processor}
            print(
                f"{name:10} {tool:26} {rate['wall']:7.1f} MB/s, {rate['core']:.1f} a core", file=sys.stderr, flush=True
            )
            rates.setdefault(tool, []).append(rate)
    return {
        tool: {kind: statistics.median(rate[kind] for rate in rounds) for kind in ("wall", "core")}
        for tool, rounds in rates.items()
    }


def cell(tool: str, row: dict) -> str:
    """One entry of the table."""
    if tool not in row:
        return "-"
    return f"{row[tool]['wall']:.1f}" + ("" if tool in UNCOUNTED else f" ({row[tool]['core']:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--tools", action="append", default=[], choices=TOOLS)
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.run:
        tool, text, tokenizer, folder = options.run
        start = time.perf_counter()
        inner = TOOLS[tool](Path(text), tokenizer, Path(folder))
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        wall, processor = inner or (time.perf_counter() - start, sum(use.ru_utime + use.ru_stime for use in used))
        print(wall, processor)
        return
    options.pythons = dict(pair.split("=", 1) for pair in options.python)
    table = {}
    for pair in options.tokenizer:
        name, tokenizer = pair.split("=", 1)
        with tempfile.TemporaryDirectory() as folder:
            table[name] = measure(options, name, tokenizer, Path(folder))
    if options.out:
        options.out.write_text(json.dumps(table, indent=1))
    tools = [tool for tool in TOOLS if any(tool in row for row in table.values())]
    print("| MB/s of text, 2 processes (MB a processor second) | " + " | ".join(table) + " |")
    print("|---|" + "---|" * len(table))
    for tool in tools:
        print(f"| {tool} | " + " | ".join(cell(tool, row) for row in table.values()) + " |")


if __name__ == "__main__":
    main()
