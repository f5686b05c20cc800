"""Whether cost grows linearly and memory stays flat: 1x, 4x and 16x the text through `minilm prepare`.

    python tests/benchmarks/prepare_scale.py --text leads-en.jsonl --tokenizer DIR [--megabytes 64] [--compress xz]

With `--compress` the input is one compressed file that cannot be split: one thread decompresses, the workers encode.
"""

import argparse
import bz2
import gzip
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from prepare import ROOT, WORKERS, repeat_text

OPENERS = {"gz": gzip.open, "bz2": bz2.open, "xz": lambda path, mode: lzma.open(path, mode, preset=1)}
COMMAND = """
import sys
from pathlib import Path
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
if __name__ == "__main__":
    source = Source(kind="jsonl", path=sys.argv[2])
    request = PrepareRequest(tokenizer=sys.argv[1], sources=(source,), unit_bytes=4 << 20)
    prepare(request, Path(sys.argv[3]), workers=int(sys.argv[4]), show_progress=False)
"""


def peak_bytes_of_children(pid: int, peaks: dict[str, int]) -> None:
    """Notes the largest resident size that each child of a process ever had."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            for line in Path(f"/proc/{child}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peaks[child] = max(peaks.get(child, 0), int(line.split()[1]) * 1024)


def run(tokenizer: str, text: Path, folder: Path) -> tuple[float, float, int]:
    """Wall seconds, processor seconds of all processes, and the largest worker's peak memory in bytes."""
    script = folder / "run.py"
    script.write_text(COMMAND)
    before, start, peaks = os.times(), time.perf_counter(), {}
    words = [sys.executable, str(script), tokenizer, str(text), str(folder / "corpus"), str(WORKERS)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)})
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            try:
                peak_bytes_of_children(process.pid, peaks)
            except (FileNotFoundError, ProcessLookupError):
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"the run failed with code {code}")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, processor, max(peaks.values())


def measure(tokenizer: str, text: Path, folder: Path, rounds: int) -> tuple[float, float, int]:
    """Medians of several runs, and the largest peak."""
    walls, processors, peaks = [], [], []
    for _ in range(rounds):
        shutil.rmtree(folder / "corpus", ignore_errors=True)
        for figures, figure in zip((walls, processors, peaks), run(tokenizer, text, folder), strict=True):
            figures.append(figure)
    return statistics.median(walls), statistics.median(processors), max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--compress", choices=OPENERS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| text MB | wall s | processor s | more text: MB/s wall | MB a processor second | worker's peak MB |")
    print("|---|---|---|---|---|---|")
    earlier = None
    for times in (1, 4, 16):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            text = folder / "text.jsonl"
            megabytes = repeat_text(options.text, text, options.megabytes * times) / 1e6
            if options.compress:
                packed = folder / f"text.jsonl.{options.compress}"
                with OPENERS[options.compress](packed, "wb") as file:
                    file.write(text.read_bytes())
                text = packed
            wall, processor, peak = measure(options.tokenizer, text, folder, options.rounds)
        steady = ("-", "-")
        if earlier:
            more = megabytes - earlier[0]
            steady = f"{more / (wall - earlier[1]):.1f}", f"{more / (processor - earlier[2]):.1f}"
        cells = (f"{megabytes:.0f}", f"{wall:.1f}", f"{processor:.1f}", *steady, f"{peak / 1e6:.0f}")
        print(f"| {' | '.join(cells)} |", flush=True)
        earlier = megabytes, wall, processor


if __name__ == "__main__":
    main()
