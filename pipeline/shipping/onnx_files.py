"""The student as ONNX files, in fp32 and in dynamic int8, each compared with PyTorch before it is handed over.

    onnx/model.onnx             fp32
    onnx/model_quantized.onnx   weights in int8, one scale a column; activations are quantized while it runs

Both take what the tokenizer gives, in any number of rows and positions, and return `last_hidden_state`.
"""

import contextlib
import inspect
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FP32, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"
PYTORCH, NAMES = "PyTorch fp32", {FP32: "ONNX fp32", INT8: "ONNX int8"}
FP32_TOLERANCE = 1e-4  # largest difference of a number of the last hidden state, whose numbers are of the size of one
INT8_TOLERANCE = 0.95  # lowest mean cosine of a token's last hidden state
_ONE_FILE = 1 << 30  # weights beyond that lie in a file of their own: an ONNX file holds two gigabytes
_RUNS, _SECONDS = 9, 20.0
TEXTS = (
    "The exported model computes what the trained one did.",
    "A sentence.",
    "Rain fell on the harbour all night; by morning the boats, the nets and the men who slept beside them were wet.",
    "1, 2, 3: naïve façade, Москва, 東京!",
)


def require() -> None:
    """Refuse where the libraries are missing, before anything is made."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--onnx needs {error.name}, which is not installed: pip install 'minilmv2-deepspeed[onnx]'"
        ) from None


def write(backbone: "PreTrainedModel", folder: Path, *, seq_tokens: int) -> dict[str, Any]:
    """Write both files into `onnx/` of a folder with the model's tokenizer, compare and time them.

    Args:
        backbone: in fp32 and eval mode.
        folder: the exported one.
        seq_tokens: the longest text.

    Returns:
        For the card: see `rows`.

    Raises:
        RuntimeError: the fp32 file does not compute what the model does.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = dict(padding=True, truncation=True, max_length=seq_tokens, return_tensors="pt")
    batches = [dict(tokenizer(list(TEXTS), **texts)), *(dict(tokenizer([text], **texts)) for text in TEXTS[:2])]
    model = LastHiddenState(backbone, [n for n in tokenizer.model_input_names if n in _inputs_of(backbone)]).eval()
    (folder / "onnx").mkdir()
    with _quiet():
        _export(model, batches[0], folder / FP32)
        _quantize(folder / FP32, folder / INT8)
    files = {name: _Session(folder / name, model.names) for name in NAMES}
    difference = max(_compare(model, files[FP32], batch, _largest_difference) for batch in batches)
    if not difference <= FP32_TOLERANCE:
        raise RuntimeError(f"{FP32} differs from the model by {difference:.2g}; allowed are {FP32_TOLERANCE:g}")
    cosine = compare(model, folder / INT8, batches[0])
    runners: dict[str, Callable] = {PYTORCH: model} | {NAMES[name]: file for name, file in files.items()}
    shapes = [(1, min(32, seq_tokens)), (8, min(128, seq_tokens))]
    facts = {
        "difference": difference,
        "cosine": cosine,
        "int8": cosine >= INT8_TOLERANCE,
        "threads": torch.get_num_threads(),
        "bytes": {PYTORCH: 4 * backbone.num_parameters()} | {NAMES[name]: _bytes(folder / name) for name in NAMES},
        "milliseconds": {f"{b} x {s}": _latency(runners, backbone.config.vocab_size, b, s) for b, s in shapes},
    }
    if not facts["int8"]:
        for path in folder.glob(f"{INT8}*"):
            path.unlink()
    return facts


def rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines of a table: size, latency of a batch (rows x tokens), and how far from PyTorch."""
    batches = facts["milliseconds"]
    head = ("", "MB", *(f"{batch} tokens, ms" for batch in batches), "from PyTorch")
    apart = {
        NAMES[FP32]: f"at most {facts['difference']:.1e} in a number",
        NAMES[INT8]: f"mean cosine of a token's vector {facts['cosine']:.4f}",
    }
    lines = [head]
    for name in (PYTORCH, *NAMES.values()):
        if name != NAMES[INT8] or facts["int8"]:
            size = f"{facts['bytes'][name] / 1e6:.1f}"
            lines.append((name, size, *(f"{batch[name]:.1f}" for batch in batches.values()), apart.get(name, "")))
    return lines


def files(facts: dict[str, Any]) -> list[str]:
    """Names of those that were handed over."""
    return [FP32, INT8] if facts["int8"] else [FP32]


def note(facts: dict[str, Any]) -> str:
    """What to know about the table."""
    text = f"Median of up to {_RUNS} runs on the exporting machine's CPU, {facts['threads']} threads, taking turns."
    if not facts["int8"]:
        text += (
            f" There is no int8 file: its mean cosine with PyTorch was {facts['cosine']:.4f}, and "
            f"{INT8_TOLERANCE} is the least that is handed over."
        )
    return text


def compare(model: "LastHiddenState", path: Path, batch: dict[str, Tensor]) -> float:
    """Mean cosine between a real token's last hidden state as the model gives it and as an ONNX file does."""
    return _compare(model, _Session(path, model.names), batch, _mean_cosine)


class LastHiddenState(nn.Module):
    """An encoder with tensors in and a tensor out."""

    def __init__(self, backbone: "PreTrainedModel", names: list[str]) -> None:
        super().__init__()
        self.backbone, self.names = backbone, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.backbone(**dict(zip(self.names, inputs, strict=True))).last_hidden_state


class _Session:
    """An ONNX file, called as the model is."""

    def __init__(self, path: Path, names: list[str]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = names

    def __call__(self, *inputs: Tensor) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}
        return torch.from_numpy(self._session.run(["last_hidden_state"], given)[0])


def _inputs_of(backbone: "PreTrainedModel") -> set[str]:
    return set(inspect.signature(backbone.forward).parameters)


@torch.no_grad()
def _export(model: LastHiddenState, batch: dict[str, Tensor], path: Path) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    torch.onnx.export(
        model,
        tuple(batch[name] for name in model.names),
        path,
        dynamo=True,
        verbose=False,
        input_names=model.names,
        output_names=["last_hidden_state"],
        dynamic_shapes=(tuple({0: "batch", 1: "sequence"} for _ in model.names),),
        external_data=size > _ONE_FILE,
    )


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    is_large = source.stat().st_size < sum(path.stat().st_size for path in source.parent.iterdir())
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # 7 bits: with 8, sums overflow on processors without VNNI
        use_external_data_format=is_large,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell about their own inner life."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def _compare(model: LastHiddenState, file: _Session, batch: dict[str, Tensor], measure: Callable) -> float:
    """`measure` of the real tokens' last hidden states, of the model and of the file."""
    inputs = [batch[name] for name in model.names]
    real = batch["attention_mask"].bool()
    return measure(model(*inputs)[real], file(*inputs)[real])


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _mean_cosine(ours: Tensor, theirs: Tensor) -> float:
    return torch.cosine_similarity(ours, theirs, dim=-1).mean().item()


@torch.no_grad()
def _latency(runners: dict[str, Callable], vocabulary: int, batch: int, seq_tokens: int) -> dict[str, float]:
    """Milliseconds of a batch of full rows; all take turns, the first is a warm-up."""
    ids = torch.randint(5, vocabulary, (batch, seq_tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    names = runners[PYTORCH].names
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    started = time.perf_counter()
    for run in range(_RUNS + 1):
        if run > 3 and time.perf_counter() - started > _SECONDS:
            break
        for name, runner in runners.items():
            began = time.perf_counter()
            runner(*(inputs[wanted] for wanted in names))
            if run:
                seconds[name].append(time.perf_counter() - began)
    return {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()}


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
