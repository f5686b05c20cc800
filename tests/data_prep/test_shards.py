"""The shard format byte by byte, and what opening and verifying a corpus finds."""

import json
import struct

import numpy as np
import pytest

from data_prep import shards
from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from data_prep.shards import Corpus, ShardWriter, read_index, token_dtype

DOCUMENTS = ([5, 6, 7], [8], [9] * 400, [10, 11])


def write_shard(folder, name="train/x/00000", dtype="uint16", documents=DOCUMENTS):
    writer = ShardWriter(folder, name, dtype=dtype, split="train", source="x", language="en")
    for ids in documents:
        writer.add(np.array(ids))
    return writer.close()


@pytest.fixture
def corpus(samples, tmp_path):
    """A corpus of 300 documents in several shards."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(samples.leads().read_text().splitlines()[:300]))
    source = Source.parse(f"jsonl,language=en:{path}")
    request = PrepareRequest(tokenizer=str(samples.teacher), sources=(source,), shard_bytes=20_000)
    return prepare(request, tmp_path / "corpus", workers=0, show_progress=False)


@pytest.mark.parametrize("dtype, code, letter", [("uint16", 8, "H"), ("int32", 4, "i")])
def test_layout_read_with_struct_alone(tmp_path, dtype, code, letter):
    """Follows Megatron-Core's description of its index, not our reader."""
    info = write_shard(tmp_path, dtype=dtype)
    raw = (tmp_path / "train/x/00000.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, dtype_code, sequences, bounds = struct.unpack_from("<QBQQ", raw, 9)
    assert (version, dtype_code, sequences, bounds) == (1, code, 4, 5)
    position = 9 + 8 + 1 + 8 + 8
    lengths = struct.unpack_from("<4i", raw, position)
    pointers = struct.unpack_from("<4q", raw, position + 16)
    documents = struct.unpack_from("<5q", raw, position + 48)
    assert len(raw) == position + 48 + 40
    assert documents == (0, 1, 2, 3, 4)
    tokens = (tmp_path / "train/x/00000.bin").read_bytes()
    assert [
        list(struct.unpack_from(f"<{n}{letter}", tokens, p)) for n, p in zip(lengths, pointers, strict=True)
    ] == list(DOCUMENTS)
    assert (info.documents, info.tokens, info.bytes) == (4, 406, len(tokens))


def test_the_index_is_the_one_that_megatron_core_writes(tmp_path):
    """The bytes that megatron-core 0.16.1 wrote for documents of 3, 1, 400 and 9 tokens, int32."""
    expected = bytes.fromhex(
        "4d4d4944494458000001000000000000000404000000000000000500000000000000"
        "03000000010000009001000009000000"
        "00000000000000000c000000000000001000000000000000500600000000000000000000000000000100000000000000"
        "020000000000000003000000000000000400000000000000"
    )
    write_shard(tmp_path, dtype="int32", documents=[range(n) for n in (3, 1, 400, 9)])
    assert (tmp_path / "train/x/00000.idx").read_bytes() == expected


def test_a_long_index_is_written_in_runs_that_join(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "INDEX_RUN", 3)
    lengths = np.array([5, 1, 2**31 - 1, 7, 1, 1, 2, 9, 4, 3], dtype=np.int32)
    (tmp_path / "long.idx").write_bytes(b"".join(shards.index_chunks(lengths, "int32")))
    index = read_index(tmp_path / "long.idx")
    assert index.lengths.tolist() == lengths.tolist()
    assert index.offsets_bytes.tolist() == [4 * int(lengths[:number].astype(int).sum()) for number in range(10)]
    assert index.document_bounds.tolist() == list(range(11))


def test_an_index_with_several_sequences_a_document_is_read(tmp_path):
    """As Megatron-Core writes it for sentences: document bounds count sequences."""
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    body = struct.pack("<3i", 4, 6, 3) + struct.pack("<3q", 0, 16, 40) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "theirs.idx").write_bytes(header + body)
    index = read_index(tmp_path / "theirs.idx")
    assert index.dtype == np.int32
    assert index.lengths.tolist() == [4, 6, 3]
    assert index.offsets_bytes.tolist() == [0, 16, 40]
    assert index.document_bounds.tolist() == [0, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_core_reads_ours_and_writes_the_same_bytes(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    write_shard(tmp_path, dtype=dtype)
    dataset = IndexedDataset(str(tmp_path / "train/x/00000"))
    assert [dataset[number].tolist() for number in range(len(dataset))] == list(DOCUMENTS)
    assert dataset[0].dtype == np.dtype(dtype)

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"train/x/00000.{suffix}").read_bytes()
        assert (tmp_path / f"theirs.{suffix}").read_bytes() == ours
    assert read_index(tmp_path / "theirs.idx").lengths.tolist() == [len(ids) for ids in DOCUMENTS]


def test_dtype_follows_the_vocabulary():
    assert token_dtype(30_522) == "uint16"
    assert token_dtype(65_499) == "uint16"
    assert token_dtype(65_500) == "int32"
    assert token_dtype(250_002) == "int32"


def test_nothing_appears_before_the_shard_is_closed(tmp_path):
    writer = ShardWriter(tmp_path, "train/x/00000", dtype="int32", split="train", source="x")
    writer.add(np.arange(10))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".partial"]
    writer.abandon()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_open_reads_what_was_written(corpus):
    again = Corpus.open(str(corpus.folder))
    assert again.fingerprint == corpus.fingerprint
    assert again.manifest == corpus.manifest
    shards = again.shards("train")
    assert len(shards) > 2 and again.shards("validation") == ()
    for shard in shards:
        tokens = again.tokens(shard)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
        assert len(tokens) == shard.tokens and tokens[-1] == again.manifest.tokenizer["sep_id"]
        assert again.index(shard).lengths.sum() == shard.tokens
    assert again.verify() == []


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_or_short_shard_is_named(corpus, suffix):
    path = corpus.folder / f"train/x/00001.{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=f"train/x/00001.{suffix}.* has .* bytes, the manifest says"):
        Corpus.open(corpus.folder)
    path.unlink()
    with pytest.raises(UserError, match=f"train/x/00001.{suffix} is missing"):
        Corpus.open(corpus.folder)


def test_a_wrong_header_is_named(corpus):
    path = corpus.folder / "train/x/00001.idx"
    path.write_bytes(b"XX" + path.read_bytes()[2:])
    with pytest.raises(UserError, match="train/x/00001.idx.*wrong header"):
        Corpus.open(corpus.folder)
    with pytest.raises(UserError, match="not a token index"):
        read_index(path)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_verify_finds_one_flipped_bit(corpus, suffix):
    path = corpus.folder / f"train/x/00001.{suffix}"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert Corpus.open(corpus.folder).verify(workers=2) == [f"train/x/00001.{suffix}"]


def test_damaged_manifests(corpus, tmp_path):
    path = corpus.folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99; this program reads 1"):
        Corpus.open(corpus.folder)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="damaged"):
        Corpus.open(corpus.folder)
    path.write_text(json.dumps({**content, "shards": []}))
    with pytest.raises(UserError, match="holds no tokens"):
        Corpus.open(corpus.folder)
    path.unlink()
    with pytest.raises(UserError, match="not a prepared corpus"):
        Corpus.open(corpus.folder)
