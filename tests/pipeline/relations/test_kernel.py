"""The Triton kernels against the fp64 reference: in the interpreter without a GPU, compiled on one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from pipeline.relations import kernel as relation_kernel
from pipeline.relations.kernel import blocks_for, tile_bytes
from pipeline.relations.loss import PAIRS, relation_loss
from pipeline.relations.qkv import QKV
from tests import toy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_qkv(rows, positions, hidden, dtype, **options) -> QKV:
    return toy.random_qkv(rows, positions, hidden, dtype=dtype, device=DEVICE, **options)


# Largest error of the total (relative) and of a gradient (relative to the largest one). The kernel sums in fp32, but
# rounds probabilities to the inputs' type before they meet the keys.
TOLERANCE = {torch.float32: (1e-5, 2e-5), torch.float16: (1e-5, 3e-3), torch.bfloat16: (1e-5, 2e-2)}


def compare(teacher: QKV, student: QKV, tolerance: tuple[float, float], **options) -> None:
    """Triton's losses and gradients against the reference in fp64 on the very same (rounded) inputs."""
    results = []
    for implementation, cast in (("triton", lambda x: x.detach()), ("reference", lambda x: x.detach().double())):
        inputs = QKV(*(cast(x).requires_grad_() for x in student))
        loss = relation_loss(QKV(*map(cast, teacher)), inputs, implementation=implementation, **options)
        assert loss.total.isfinite()
        results.append((loss, torch.autograd.grad(loss.total, inputs, allow_unused=True)))
    (got, got_grads), (expected, expected_grads) = results
    total = float(expected.total.detach())
    scale = max(total, 1e-2)  # below it a sum of logarithms has lost its digits
    assert abs(float(got.total.detach()) - total) <= tolerance[0] * scale
    for pair, value in expected.per_pair.items():
        assert abs(float(got.per_pair[pair]) - float(value)) <= tolerance[0] * scale
    for ours, theirs in zip(got_grads, expected_grads, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            assert (ours.double() - theirs).abs().max() <= tolerance[1] * max(float(theirs.abs().max()), 1e-6)


def batch(name: str, rows: int, positions: int):
    """Mask and document numbers of a kind of batch."""
    real = torch.arange(positions) < torch.tensor([positions, positions // 3, 1, 0])[:rows, None]
    documents = torch.arange(positions).div(5, rounding_mode="floor").expand(rows, -1).contiguous()
    masks = {"full": (None, None), "padded": (real, None), "documents": (None, documents), "both": (real, documents)}
    return [None if x is None else x.to(DEVICE) for x in masks[name]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width, student_width", [(16, 6), (4, 8), (64, 32), (5, 64)])
def test_head_widths_and_types(width, student_width, dtype):
    teacher, student = random_qkv(1, 40, 2 * width, dtype), random_qkv(1, 40, 2 * student_width, dtype, seed=1)
    compare(teacher, student, TOLERANCE[dtype], heads=2, pairs={"qq": 1.0, "kv": 0.5})


@pytest.mark.parametrize("kind", ["full", "padded", "documents", "both"])
@pytest.mark.parametrize("positions", [1, 63, 130])
def test_lengths_padding_and_documents(positions, kind):
    mask, documents = batch(kind, 4, positions)
    teacher, student = random_qkv(4, positions, 10, torch.float32), random_qkv(4, positions, 6, torch.float32, seed=1)
    options = dict(heads=1, pairs={"qk": 1.0}, mask=mask, document_ids=documents)
    compare(teacher, student, TOLERANCE[torch.float32], **options)


def test_lengths_that_fill_their_blocks():
    teacher, student = random_qkv(1, 128, 16, torch.float32), random_qkv(1, 128, 8, torch.float32, seed=1)
    compare(teacher, student, TOLERANCE[torch.float32], heads=1, pairs={"vv": 1.0})


def test_all_pairs_with_weights():
    teacher, student = random_qkv(1, 20, 12, torch.float32), random_qkv(1, 20, 9, torch.float32, seed=1)
    pairs = {pair: 0.5 + i for i, pair in enumerate(PAIRS)}
    compare(teacher, student, TOLERANCE[torch.float32], heads=3, pairs=pairs)


@pytest.mark.parametrize("kind", ["full", "both"])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_scores(scale, kind):
    mask, documents = batch(kind, 3, 70)
    teacher = random_qkv(3, 70, 8, torch.float32, scale=scale)
    student = random_qkv(3, 70, 8, torch.float32, scale=scale, seed=1)
    compare(teacher, student, (1e-4, 1e-4), heads=1, pairs={"qk": 1.0}, mask=mask, document_ids=documents)


def test_keys_and_values_that_share_storage():
    fused = random_qkv(2, 30, 36, torch.float32).query
    student = QKV(*random_qkv(2, 30, 24, torch.float32, seed=1).query.chunk(3, dim=-1))
    teacher = QKV(*fused.chunk(3, dim=-1))
    assert not teacher.key.is_contiguous()
    compare(teacher, student, TOLERANCE[torch.float32], heads=2)


def test_teacher_and_student_of_different_types():
    teacher, student = random_qkv(1, 20, 8, torch.bfloat16), random_qkv(1, 20, 8, torch.float32, seed=1)
    compare(teacher, student, TOLERANCE[torch.float32], heads=2)


def test_without_gradient():
    teacher, student = random_qkv(2, 33, 8, torch.float32), random_qkv(2, 33, 8, torch.float32, seed=1)
    loss, expected = (relation_loss(teacher, student, heads=2, implementation=x) for x in ("triton", "reference"))
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, expected.total, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["full", "padded", "documents", "both"])
def test_real_sizes_on_a_gpu(dtype, kind):
    mask, documents = batch(kind, 4, 512)
    teacher, student = random_qkv(4, 512, 768, dtype), random_qkv(4, 512, 384, dtype, seed=1)
    compare(teacher, student, TOLERANCE[dtype], heads=48, mask=mask, document_ids=documents)


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu():
    teacher, student = random_qkv(8, 512, 768, torch.bfloat16), random_qkv(8, 512, 384, torch.bfloat16, seed=1)
    student = QKV(*(x.requires_grad_() for x in student))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    relation_loss(teacher, student, heads=48).total.backward()
    matrix_bytes = 8 * 48 * 512 * 512 * 4
    assert torch.cuda.max_memory_allocated() - before < matrix_bytes / 4


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from pipeline.relations import kernel

def compile(function, block, capability, width, walked, **constants):
    # The estimate by which blocks are chosen must not be below what the compiler takes.
    constants |= dict(zip(("ROWS", "KEYS"), block)) | dict(DT=width, DS=width, PT=width, PS=width)
    constants |= dict(EVEN=False, WHOLE=False, GROUPED=True, PRECISION="ieee")
    kinds = dict.fromkeys(("xt", "yt", "xs", "ys"), "*bf16") | dict.fromkeys(("groups", "lengths"), "*i32")
    ends = ("top_of_t", "top_of_s", "part_t", "part_s")
    kinds |= dict.fromkeys(("dx", "dy", "row_scale", *ends, "divergence"), "*fp32")
    kinds |= dict.fromkeys(("scale_t", "scale_s", "gradient_scale"), "fp32") | dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    source = ASTSource(function, {name: kinds.get(name, "i32") for name in names},
                       constexprs={name: constants[name] for name in names if name in constants})
    options = dict(num_stages=kernel._STAGES, enable_fp_fusion=True)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    kept = block[1 - block.index(walked)] if block[0] != block[1] else block[0]
    estimate = kernel.tile_bytes(2 * width * 2, kept, walked)
    print(function.__name__, capability, width, binary.metadata.shared, estimate)
    assert binary.asm["cubin"] and binary.metadata.shared <= 1.02 * estimate + 2048

for capability in (80, 90):
    for width in (16, 128):
        rows, columns = kernel._ROWS_BLOCKS[0], kernel._COLUMNS_BLOCKS[0]
        compile(kernel._rows_kernel, rows, capability, width, rows[1], GRADIENT=True)
        compile(kernel._columns_kernel, columns, capability, width, columns[0])
"""


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper_without_a_gpu(tmp_path):
    root = Path(__file__).parents[3]
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]


def test_scores_shifted_with_one_rounding_or_with_two(monkeypatch):
    """A compiler may or may not fuse product and sum: with scores of 10^9 the gradients must be right either way."""
    teacher, student = (random_qkv(2, 70, 8, torch.float32, scale=1e4, seed=seed) for seed in (0, 1))
    compare(teacher, student, (1e-4, 1e-6), heads=1, pairs={"qk": 1.0})
    if DEVICE == "cpu":
        handle = interpreter.TensorHandle
        plain = staticmethod(lambda x, y, z: handle(np.float32(x.data * y.data) + z.data, z.dtype.scalar))
        monkeypatch.setattr(interpreter.interpreter_builder, "create_fma", plain, raising=False)
        compare(teacher, student, (1e-4, 1e-6), heads=1, pairs={"qk": 1.0})


@pytest.mark.parametrize(
    ("widths", "dtype", "shared_kib", "blocks"),
    [
        ((16, 8), torch.bfloat16, 227, ((64, 64), (64, 128))),
        ((128, 128), torch.bfloat16, 227, ((64, 64), (64, 128))),
        ((256, 128), torch.bfloat16, 227, ((64, 64), (64, 64))),
        ((128, 128), torch.bfloat16, 99, ((32, 32), (32, 64))),
        ((64, 64), torch.float32, 99, ((32, 32), (32, 64))),
        ((256, 256), torch.float32, 99, None),
        ((4096, 4096), torch.float32, 227, None),
    ],
)
def test_blocks_fit_into_the_shared_memory_of_the_device(widths, dtype, shared_kib, blocks):
    teacher, student = ((torch.empty(1, 1, 2 * width, dtype=dtype),) * 3 for width in widths)
    found = blocks_for(teacher, student, 2, shared_kib << 10)
    assert (found is None) == (blocks is None)
    if found is None:
        return
    tile = sum(widths) * dtype.itemsize
    (rows, row_keys), (columns, column_keys) = found
    assert tile * (rows + 3 * row_keys) <= shared_kib << 10 and tile * (column_keys + 3 * columns) <= shared_kib << 10
    assert found == blocks


def test_estimate_of_shared_memory_is_what_the_compiler_takes():
    """165 KB for the columns kernel at widths of 128 in bf16, 247 KB at 256 and 128, as compiled for sm_90."""
    for widths, itemsize, compiled in (((128, 128), 2, 165e3), ((256, 128), 2, 247e3), ((64, 64), 4, 165e3)):
        assert tile_bytes(sum(widths) * itemsize, kept=128, walked=64) == pytest.approx(compiled, rel=0.02)


SMALLER = [pytest.param(block, marks=pytest.mark.slow) for block in ((32, 32), (16, 16))]


@pytest.mark.parametrize("columns_block", [(64, 64), *SMALLER])
def test_smaller_blocks_give_the_same(columns_block, monkeypatch):
    monkeypatch.setattr(relation_kernel, "_COLUMNS_BLOCKS", (columns_block,))
    monkeypatch.setattr(relation_kernel, "_ROWS_BLOCKS", ((16, 32),))
    mask, documents = batch("both", 3, 70)
    teacher, student = (random_qkv(3, 70, 12, torch.float32, seed=seed) for seed in (0, 1))
    compare(teacher, student, TOLERANCE[torch.float32], heads=3, mask=mask, document_ids=documents)
