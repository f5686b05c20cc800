"""The loader on corpora of very many shards: sparse files of the sizes that the manifest promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.manifest import Manifest, ShardInfo
from data_prep.shards import index_chunks

SHARD_TOKENS, SHARD_DOCUMENTS, SOURCES = 10_000_000, 20_000, 100

# Prints how many files were opened, and the megabytes, after: opening the corpus, building the loader, reading 40
# batches. In a process of its own, because memory is measured.
MEASURE = """
import json, os, sys
from itertools import islice
from pathlib import Path
from data_prep.shards import Corpus
from pipeline.data.loader import DataOptions, Loader

def resident_mb(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) / 1024

before, opened, marks = resident_mb("VmRSS"), [0], []
sys.addaudithook(lambda event, arguments: event == "open" and opened.__setitem__(0, opened[0] + 1))
corpus = Corpus.open(sys.argv[1])
marks.append(opened[0])
options = DataOptions(seq_tokens=512, seed=1, temperature_alpha=0.3)
loader = Loader(corpus, options, global_batch_samples=64, micro_batch_samples=32)
marks.append(opened[0])
shapes = {tuple(batch.input_ids.shape) for batch in islice(loader, 40)}
marks.append(opened[0])
files = len(os.listdir("/proc/self/fd"))
loader.close()
samples = int(loader.sample_set.sizes.sum())
grown = resident_mb("VmHWM") - before
print(json.dumps({"opened": marks, "mb": grown, "files": files, "samples": samples, "shapes": list(shapes)}))
"""


def write_sparse_corpus(folder: Path, shards: int) -> int:
    """A corpus of `shards` shards of `SHARD_TOKENS` tokens; returns the tokens. Takes next to no disk."""
    head = next(index_chunks([], "uint16"))[:18] + SHARD_DOCUMENTS.to_bytes(8, "little")
    head += (SHARD_DOCUMENTS + 1).to_bytes(8, "little")
    infos = []
    for number in range(shards):
        source = f"cc100-{number % SOURCES:02}"
        path = f"train/{source}/{number // SOURCES:05}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        for suffix, content, size in (
            ("bin", b"", 2 * SHARD_TOKENS),
            ("idx", head, len(head) + 20 * SHARD_DOCUMENTS + 8),
        ):
            with open(folder / f"{path}.{suffix}", "wb") as file:
                file.write(content)
                file.truncate(size)
        infos.append(
            ShardInfo(
                path=path,
                split="train",
                source=source,
                language=source[-2:],
                documents=SHARD_DOCUMENTS,
                tokens=SHARD_TOKENS,
                bytes=2 * SHARD_TOKENS,
                bin_sha256=f"{number:064x}",
                idx_sha256=f"{number:064x}",
            )
        )
    tokenizer = {"fingerprint": "f", "vocabulary_tokens": 30_522, "cls_id": 101, "sep_id": 102, "pad_id": 0}
    manifest = Manifest(
        format_version=1, tokenizer=tokenizer, dtype="uint16", request={}, counts={}, shards=tuple(infos)
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return shards * SHARD_TOKENS


@pytest.mark.parametrize("shards", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_start_and_memory_hardly_depend_on_the_size_of_the_corpus(tmp_path, shards):
    tokens = write_sparse_corpus(tmp_path, shards)
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    opened, built, read = found["opened"]
    assert found["samples"] == shards * (SHARD_TOKENS // 510)
    assert found["samples"] * 510 > 0.99 * tokens
    assert opened < shards + 100, "a corpus is opened by its manifest and the head of each index"
    assert built - opened < 20, "a loader is built from the manifest alone"
    assert found["mb"] < 200
    assert found["shapes"] == [[32, 512]]
    assert found["files"] < 400, "shards are kept open without bound"
    assert read - built < 60 * 32 + 100, "a row takes one file, read ahead or not"
