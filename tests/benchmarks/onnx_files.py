"""How near ONNX files are to PyTorch, how large and how fast: for the sample teacher, or any model.

    python tests/benchmarks/onnx_files.py [FOLDER]

The figures of docs/export.md come from here.
"""

import sys
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep import samples  # noqa: E402
from pipeline.shipping import huggingface, onnx_files  # noqa: E402

# What dynamic int8 can be told: one scale a column or a matrix, 7 bits or 8.
VARIANTS = {
    "a scale a column, 7 bits": dict(per_channel=True, reduce_range=True),
    "a scale a column, 8 bits": dict(per_channel=True, reduce_range=False),
    "a scale a matrix, 8 bits": dict(per_channel=False, reduce_range=False),
}


def main(source: Path) -> None:
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        huggingface.write_tokenizer(source, folder, seq_tokens=128)
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        facts = onnx_files.write(model, folder, seq_tokens=128)
        for row in onnx_files.rows(facts):
            print(" | ".join(row))
        print(onnx_files.note(facts))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batch = dict(tokenizer(list(onnx_files.TEXTS), padding=True, truncation=True, return_tensors="pt"))
        wrapped = onnx_files.LastHiddenState(model, tokenizer.model_input_names)
        for name, options in VARIANTS.items():
            path = folder / "variant.onnx"
            quantize_dynamic(folder / onnx_files.FP32, path, weight_type=QuantType.QInt8, **options)
            print(f"{name}: mean cosine {onnx_files.compare(wrapped, path, batch):.4f}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else samples.folder() / samples.TEACHER)
