"""Shuffled 512-token samples a second, start-up and memory: this loader beside its peers and a bare memory map.

    python tests/benchmarks/loader.py [--folder DIR] [--rounds 5] [--scales 1 10] [--only NAME ...] [--cold]

Every contender serves the same tokens as int64 [64, 512] batches in shuffled order, in a process of its own, from a
warm page cache, in its fastest setting known to us; the rounds go through all contenders in turn, so that a busy moment
of the machine does not fall on one of them alone. Peers that are not installed are left out; none of them is a
dependency of this project (`pip install mosaicml-streaming megatron-core`). The data take 1.3 GB of disk. Printed is
the best of the rounds, because whatever else the machine does can only make things slower:

    of bare loop  samples/s relative to a loop over a memory map in the same round; the median of the rounds
    samples/s     of an uninterrupted loop over the batches
    CPU us        processor time of all threads for a sample, in microseconds
    open ms       from nothing (libraries imported) to a loader that can be iterated, indices not cached
    first ms      from there to the first batch
    memory MB     growth of the process's peak resident memory over that of the imported libraries

With --cold the corpus is dropped from the page cache before each measurement, which reads 6,400 samples, and the
kilobytes are counted that the disk delivers for a sample.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mosaic import import_streaming
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SEQ, BATCH = 512, 64
WINDOW = SEQ - 2
TOKENS_AT_SCALE_1 = 20_000_000
CLS, SEP = 101, 102


def tokens_of(scale: int) -> np.ndarray:
    """The corpus: documents of 500 tokens, each closed by the separator; uint16."""
    tokens = np.random.default_rng(0).integers(1000, 30_000, scale * TOKENS_AT_SCALE_1, dtype=np.uint16)
    tokens[499::500] = SEP
    return tokens


def rows_of(scale: int) -> np.ndarray:
    """The corpus cut into finished samples, for formats that store these; uint16 [n, SEQ]."""
    tokens = tokens_of(scale)
    rows = np.empty((len(tokens) // WINDOW, SEQ), np.uint16)
    rows[:, 0], rows[:, -1] = CLS, SEP
    rows[:, 1:-1] = tokens[: len(rows) * WINDOW].reshape(-1, WINDOW)
    return rows


def write_corpus(folder: Path, scale: int) -> None:
    from data_prep.manifest import Manifest
    from data_prep.shards import ShardWriter

    writer = ShardWriter(folder, "train/a/00000", dtype="uint16", split="train", source="a", language="en")
    tokens = tokens_of(scale)
    writer.add_raw(tokens.data, np.full(len(tokens) // 500, 500))
    ids = {"fingerprint": "", "vocabulary_tokens": 30_522, "cls_id": CLS, "sep_id": SEP, "pad_id": 0}
    manifest = Manifest(
        format_version=1, tokenizer=ids, dtype="uint16", request={}, counts={}, shards=(writer.close(),)
    )
    (folder / "manifest.json").write_text(manifest.to_json())


def open_ours(folder: Path, **options) -> Iterator[torch.Tensor]:
    from data_prep.shards import Corpus
    from pipeline.data.loader import DataOptions, Loader

    corpus = Corpus.open(folder)
    loader = Loader(
        corpus, DataOptions(seq_tokens=SEQ, seed=1, **options), global_batch_samples=256, micro_batch_samples=BATCH
    )
    return (batch.input_ids for batch in loader)


def _endless(epoch: Callable[[], Iterable[torch.Tensor]]) -> Iterator[torch.Tensor]:
    while True:
        yield from epoch()


class _Windows(Dataset):
    """The least that a program can do: a memory map, a random permutation, a slice."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens) // WINDOW

    def __getitem__(self, index: int) -> torch.Tensor:
        row = np.empty(SEQ, np.int64)
        row[0], row[-1] = CLS, SEP
        row[1:-1] = self.tokens[index * WINDOW : (index + 1) * WINDOW]
        return torch.from_numpy(row)


def _memmap(folder: Path) -> np.ndarray:
    return np.memmap(folder / "train/a/00000.bin", np.uint16, "r")


def open_memmap(folder: Path) -> Iterator[torch.Tensor]:
    loader = DataLoader(_Windows(_memmap(folder)), batch_size=BATCH, shuffle=True, drop_last=True)
    return _endless(lambda: loader)


def open_memmap_loop(folder: Path) -> Iterator[torch.Tensor]:
    """No DataLoader either: slices copied straight into the batch."""
    tokens = _memmap(folder)

    def epoch() -> Iterable[torch.Tensor]:
        order = np.random.default_rng(1).permutation(len(tokens) // WINDOW) * WINDOW
        for at in range(0, len(order) - BATCH + 1, BATCH):
            ids = np.empty((BATCH, SEQ), np.int64)
            ids[:, 0], ids[:, -1] = CLS, SEP
            for row, start in enumerate(order[at : at + BATCH].tolist()):
                ids[row, 1:-1] = tokens[start : start + WINDOW]
            yield torch.from_numpy(ids)

    return _endless(epoch)


def write_arrow(folder: Path, scale: int) -> None:
    import datasets
    import pyarrow

    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows_of(scale).ravel()), SEQ)
    datasets.Dataset(pyarrow.table({"input_ids": rows})).save_to_disk(str(folder / "data"))


def open_arrow(folder: Path) -> Iterator[torch.Tensor]:
    import datasets

    data = datasets.load_from_disk(str(folder / "data")).with_format("torch", columns=["input_ids"])
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    return _endless(lambda: (batch["input_ids"] for batch in loader))


def write_mds(folder: Path, scale: int) -> None:
    streaming = import_streaming()
    with streaming.MDSWriter(out=str(folder), columns={"input_ids": f"ndarray:uint16:{SEQ}"}) as writer:
        for row in rows_of(scale):
            writer.write({"input_ids": row})


def open_mds(folder: Path) -> Iterator[torch.Tensor]:
    streaming = import_streaming()
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)

    def collate(rows: list[dict]) -> torch.Tensor:
        return torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()

    loader = DataLoader(data, batch_size=BATCH, collate_fn=collate, drop_last=True)
    return _endless(lambda: loader)


def open_megatron(folder: Path) -> Iterator[torch.Tensor]:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(eod=SEP, pad=0, vocab_size=30_522, unique_identifiers={"class": "benchmark"})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ,
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=tempfile.mkdtemp(),
    )
    prefix = str(folder / "train/a/00000")
    tokens = IndexedDataset(prefix)
    documents = np.arange(len(tokens.document_indices) - 1, dtype=np.int32)
    data = GPTDataset(tokens, prefix, documents, None, Split.train, config)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    return _endless(lambda: (batch["tokens"] for batch in loader))


Opener = Callable[[Path], Iterator[torch.Tensor]]
# name: (where its data lie, how they are written, how they are opened, what must be importable)
CONTENDERS: dict[str, tuple[str, Callable[[Path, int], None], Opener, tuple[str, ...]]] = {
    "this loader": ("shards", write_corpus, open_ours, ()),
    "this loader, blocks of 256": ("shards", write_corpus, lambda f: open_ours(f, block_samples=256), ()),
    "this loader, attention in documents": ("shards", write_corpus, lambda f: open_ours(f, attention="document"), ()),
    "memmap, DataLoader": ("shards", write_corpus, open_memmap, ()),
    "memmap, bare loop": ("shards", write_corpus, open_memmap_loop, ()),
    "datasets (Arrow)": ("arrow", write_arrow, open_arrow, ("datasets",)),
    "MosaicML streaming (MDS)": ("mds", write_mds, open_mds, ("streaming",)),
    "Megatron-Core GPTDataset": ("shards", write_corpus, open_megatron, ("megatron.core.datasets.gpt_dataset",)),
}


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def _disk_kb() -> float:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:")) / 1024


def measure(name: str, folder: Path, seconds: float) -> dict[str, float]:
    """Run in a process of its own: opens, then reads for so many seconds, but at least 6,400 samples."""
    _, _, opener, modules = CONTENDERS[name]
    if "streaming" in modules:
        import_streaming()
    for module in ("data_prep.shards", "pipeline.data.loader", *(m for m in modules if m != "streaming")):
        __import__(module)
    before = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    disk_before, began = _disk_kb(), time.perf_counter()
    batches = opener(folder)
    opened = time.perf_counter()
    first = next(batches)
    ready, cpu_before = time.perf_counter(), time.process_time()
    assert first.shape == (BATCH, SEQ) and first.dtype == torch.int64
    read = 0
    while time.perf_counter() - ready < seconds or read < 6400:
        read += len(next(batches))
    return {
        "samples/s": read / (time.perf_counter() - ready),
        "CPU us": (time.process_time() - cpu_before) / read * 1e6,
        "open ms": (opened - began) * 1e3,
        "first ms": (ready - opened) * 1e3,
        "memory MB": _resident_mb("VmHWM") - before,
        "disk KB": (_disk_kb() - disk_before) / read,
    }


def child(name: str, folder: Path, seconds: float) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--seconds", str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def prepare(folder: Path, scale: int, write: Callable[[Path, int], None], *, cold: bool) -> None:
    """Writes what is not there yet, and brings it into the page cache or out of it."""
    if not (folder / "complete").exists():
        write(folder, scale)
        (folder / "complete").touch()
        os.sync()
    for path in filter(Path.is_file, folder.rglob("*")):
        if not cold:
            path.read_bytes()
            continue
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_table(results: dict[tuple[int, str], list[dict[str, float]]], columns: list[str]) -> None:
    """Markdown: the best of the rounds, and the median of the rounds' rates relative to the bare loop's."""
    print("| scale | loader | of bare loop | " + " | ".join(columns) + " |\n|---|---|" + "---:|" * (1 + len(columns)))
    for (scale, name), rounds in results.items():
        loops = results.get((scale, "memmap, bare loop"), [])
        shares = [r["samples/s"] / loop["samples/s"] for r, loop in zip(rounds, loops, strict=False)]
        cells = [f"{statistics.median(shares):.0%}" if shares else "", f"{max(r['samples/s'] for r in rounds):,.0f}"]
        cells += [f"{min(r[column] for r in rounds):.1f}" for column in columns[1:]]
        print(f"| {scale}x | {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "minilm-bench-loader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--seconds", type=float, default=1.0, help="time that each measurement reads")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--results", type=Path, help="add to this JSON-lines file, and print the best of all in it")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder, arguments.seconds)))
        return
    names = [n for n in arguments.only if all(find_spec(module.split(".")[0]) for module in CONTENDERS[n][3])]
    if missing := sorted(set(arguments.only) - set(names)):
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    lines = arguments.results.read_text().splitlines() if arguments.results and arguments.results.exists() else []
    for round_number in range(arguments.rounds):
        for scale in arguments.scales:
            for name in names:
                data, write, _, _ = CONTENDERS[name]
                folder = arguments.folder / f"{data}-{scale}x"
                prepare(folder, scale, write, cold=arguments.cold)
                if got := child(name, folder, 0 if arguments.cold else arguments.seconds):
                    lines.append(json.dumps([scale, name, got]))
        print(f"round {round_number + 1} of {arguments.rounds} done", file=sys.stderr)
    if arguments.results:
        arguments.results.write_text("\n".join(lines) + "\n")
    results: dict[tuple[int, str], list[dict[str, float]]] = {}
    for scale, name, got in map(json.loads, lines):
        results.setdefault((scale, name), []).append(got)
    state = "cold" if arguments.cold else "warm"
    print(f"{os.cpu_count()} processors, {state} page cache; scale 1 = {TOKENS_AT_SCALE_1:,} tokens\n")
    columns = ["samples/s", "CPU us", "open ms", "first ms", "memory MB"]
    print_table(results, columns + ["disk KB"] if arguments.cold else columns)


if __name__ == "__main__":
    main()
