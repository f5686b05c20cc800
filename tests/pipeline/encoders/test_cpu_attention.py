"""Attention inside segments: torch's own without dropout, and with dropout the same for the same random numbers."""

import pytest
import torch

from pipeline.encoders import cpu_attention, unpadded
from pipeline.encoders.cpu_attention import segmented_attention
from pipeline.encoders.models import StudentShape, build_student, load_teacher, teacher_config

SIZES = [7, 1, 12]


def random_inputs(heads=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(heads, sum(SIZES), width, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.requires_grad_() for x in made]


def plain_attention(query, key, value, scale, kept=None, rate=0.0):
    """Segment by segment with whole matrices; `kept` are 0 or 1 for every probability."""
    out = []
    for number, (q, k, v) in enumerate(zip(*(x.split(SIZES, 1) for x in (query, key, value)), strict=True)):
        p = (q @ k.transpose(1, 2) * scale).softmax(-1)
        out.append((p if kept is None else p * kept[number] / (1 - rate)) @ v)
    return torch.cat(out, 1)


def test_without_dropout_it_is_plain_attention():
    inputs = random_inputs()
    out = segmented_attention(*inputs, sizes=SIZES, scale=0.3, dropout=0.0)
    torch.testing.assert_close(out, plain_attention(*inputs, 0.3))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")  # several would note down what they draw in any order
@pytest.mark.parametrize("piece_scores", [1, 60, 10_000])
def test_dropout_drops_probabilities_and_its_gradient_is_right(monkeypatch, piece_scores):
    monkeypatch.setattr(cpu_attention, "_PIECE_SCORES", piece_scores)
    drawn = []
    draw = cpu_attention._kept
    monkeypatch.setattr(cpu_attention, "_kept", lambda *args: drawn.append(draw(*args)) or drawn[-1].clone())
    inputs = random_inputs()
    torch.manual_seed(5)
    out = segmented_attention(*inputs, sizes=SIZES, scale=0.3, dropout=0.25)
    kept = [torch.cat([draws for draws in drawn if draws.shape[-1] == size]) for size in SIZES]
    expected = plain_attention(*inputs, 0.3, kept, 0.25)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    for ours, theirs in zip(grads, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_has_the_asked_rate_and_follows_the_seed():
    inputs = [torch.zeros(8, 256, 4) for _ in range(2)] + [torch.ones(8, 256, 4)]
    torch.manual_seed(1)
    first = segmented_attention(*inputs, sizes=[256], scale=1.0, dropout=0.1)
    second = segmented_attention(*inputs, sizes=[256], scale=1.0, dropout=0.1)
    torch.manual_seed(1)
    again = segmented_attention(*inputs, sizes=[256], scale=1.0, dropout=0.1)
    assert torch.equal(first, again) and not torch.equal(first, second)
    kept = (
        first[..., 0] * 0.9
    )  # share of probabilities kept in each row, whose mean is 0.9 +- 0.3 / sqrt(8 * 256 * 256)
    assert abs(float(kept.mean()) - 0.9) < 0.003
    assert float(kept.std()) == pytest.approx((0.9 * 0.1 / 256) ** 0.5, rel=0.1)


def test_threads_do_not_change_the_numbers():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            inputs = random_inputs()
            torch.manual_seed(2)
            out = segmented_attention(*inputs, sizes=SIZES, scale=0.3, dropout=0.4)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture(scope="module")
def student(samples):
    return build_student(StudentShape.parse("3x24", heads=4), teacher_config(str(samples.teacher)), dropout=0.0)


def batch():
    torch.manual_seed(0)
    ids = torch.randint(1000, 2000, (3, 24))
    mask = torch.arange(24) < torch.tensor([24, 9, 1])[:, None]
    documents = torch.arange(24).div(8, rounding_mode="floor").expand(3, -1)
    return ids, mask, documents


def gradients(student, mask, documents):
    student.zero_grad()
    ids, *_ = batch()
    keep = 1.0 if mask is None else mask[..., None]
    outputs = student(ids, mask, document_ids=documents)
    sum((x * keep).square().sum() for x in outputs).backward()
    return [x.detach() * keep for x in outputs], [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("in_documents", [False, True])
def test_running_without_padding_changes_nothing(student, monkeypatch, padded, in_documents):
    _, mask, documents = batch()
    mask, documents = mask if padded else None, documents if in_documents else None
    without = gradients(student, mask, documents)
    monkeypatch.setattr(unpadded, "is_possible", lambda *_: False)
    with_padding = gradients(student, mask, documents)
    for ours, theirs in zip(without[0] + without[1], with_padding[0] + with_padding[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradient(student):
    _, mask, _ = batch()
    expected = gradients(student, mask, None)[1]
    student.backbone.gradient_checkpointing_enable()
    try:
        got = gradients(student, mask, None)[1]
    finally:
        student.backbone.gradient_checkpointing_disable()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_model_keeps_its_own_attention_afterwards(student, samples, tmp_path):
    ids, mask, _ = batch()
    before = student.config._attn_implementation
    student(ids, mask)
    assert student.config._attn_implementation == before
    student.backbone.save_pretrained(tmp_path)
    assert "minilm" not in (tmp_path / "config.json").read_text()
    assert load_teacher(str(samples.teacher), layer=1)(ids, mask).query.shape == (3, 24, 384)
