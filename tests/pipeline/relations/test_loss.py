"""The relation loss: against the equations written out by hand, and each implementation against the reference."""

import math
import sys

import pytest
import torch

from data_prep.errors import UserError
from pipeline.relations.loss import PAIRS, relation_loss
from pipeline.relations.qkv import QKV
from tests.toy import random_qkv

IMPLEMENTATIONS = ["chunked"]
ALL_PAIRS = {pair: 0.5 + 0.25 * i for i, pair in enumerate(PAIRS)}
# Largest difference from the fp64 reference, relative to the largest value or gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def evaluate(teacher, student, **options):
    """Total, losses by pair, and gradients."""
    loss = relation_loss(teacher, student, **options)
    gradients = torch.autograd.grad(loss.total, student, allow_unused=True)
    return loss.total.detach(), loss.per_pair, gradients


def by_hand(teacher: QKV, student: QKV, heads: int, pairs, lengths) -> float:
    """The paper's equations for right-padded rows, one head and one row at a time."""
    total = 0.0
    for pair, weight in pairs.items():
        for row, length in enumerate(lengths):
            for head in range(heads):
                probabilities = []
                for qkv in (teacher, student):
                    d = qkv.query.shape[-1] // heads
                    x, y = (qkv["qkv".index(name)][row, :length, head * d : (head + 1) * d] for name in pair)
                    probabilities.append(torch.softmax(x @ y.T / math.sqrt(d), dim=-1))
                p, q = probabilities
                total += weight * float((p * (p / q).log()).sum()) / (heads * length * len(lengths))
    return total


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_loss_is_the_papers(implementation):
    teacher, student = random_qkv(2, 7, 24), random_qkv(2, 7, 12, seed=1)
    lengths = [7, 4]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    loss = relation_loss(teacher, student, heads=3, pairs=ALL_PAIRS, mask=mask, implementation=implementation)
    assert float(loss.total) == pytest.approx(by_hand(teacher, student, 3, ALL_PAIRS, lengths), rel=1e-10)
    for pair, value in loss.per_pair.items():
        assert float(value) == pytest.approx(by_hand(teacher, student, 3, {pair: 1.0}, lengths), rel=1e-10)


def batches():
    """Name -> (positions, mask, document numbers) with odd shapes, gaps, empty rows and single positions."""
    some = torch.rand(4, 37, generator=torch.Generator().manual_seed(3)) > 0.4
    some[2] = False
    some[3] = torch.arange(37) == 5
    documents = torch.arange(37).div(7, rounding_mode="floor").expand(4, -1).clone()
    scattered = torch.randint(0, 5, (4, 37), generator=torch.Generator().manual_seed(4))
    return {
        "full": (37, None, None),
        "one position": (1, None, None),
        "gaps, an empty row, a single position": (37, some, None),
        "documents": (37, None, documents),
        "documents with padding": (37, some, documents),
        "negative document numbers": (37, None, documents.masked_fill(~some, -1)),
        "documents in pieces": (37, None, scattered),
        "nothing real": (5, torch.zeros(4, 5, dtype=torch.bool), None),
    }


@pytest.mark.parametrize("batch", batches())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_agree_with_the_reference(implementation, batch):
    positions, mask, documents = batches()[batch]
    teacher = random_qkv(4, positions, 30)
    student = random_qkv(4, positions, 12, seed=1, requires_grad=True)
    options = dict(heads=6, pairs=ALL_PAIRS, mask=mask, document_ids=documents)
    expected = evaluate(teacher, student, **options, implementation="reference")
    check_close(evaluate(teacher, student, **options, implementation=implementation), expected, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, teacher_hidden, student_hidden", [(2, 128, 64), (4, 32, 20), (1, 7, 5)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_precision(implementation, heads, teacher_hidden, student_hidden, dtype):
    teacher = random_qkv(2, 33, teacher_hidden, dtype=dtype)
    student = random_qkv(2, 33, student_hidden, seed=1, dtype=dtype, requires_grad=True)
    exact = QKV(*(x.detach().double().requires_grad_() for x in student))
    expected = evaluate(QKV(*(x.double() for x in teacher)), exact, heads=heads, implementation="reference")
    got = evaluate(teacher, student, heads=heads, implementation=implementation)
    assert all(g.dtype == dtype for g in got[2])
    check_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_extreme_scores_stay_finite_and_right(implementation, scale):
    teacher = random_qkv(2, 19, 8, scale=scale, dtype=torch.float32)
    student = random_qkv(2, 19, 8, scale=scale, seed=1, dtype=torch.float32, requires_grad=True)
    exact = QKV(*(x.detach().double().requires_grad_() for x in student))
    options = dict(heads=2, pairs=ALL_PAIRS)
    got = evaluate(teacher, student, **options, implementation=implementation)
    assert all(x.isfinite().all() for x in (got[0], *got[2]))
    expected = evaluate(QKV(*(x.double() for x in teacher)), exact, **options, implementation="reference")
    check_close(got, expected, 1e-4)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_common_parts_of_the_keys_do_no_harm(implementation, offset):
    teacher = random_qkv(1, 16, 8)
    student = random_qkv(1, 16, 8, seed=1)
    shifted = QKV(student.query, student.key + offset, student.value)
    options = dict(heads=2, pairs={"qk": 1.0}, implementation=implementation)
    loss = relation_loss(teacher, student, **options).total
    torch.testing.assert_close(relation_loss(teacher, shifted, **options).total, loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_gradcheck(implementation):
    teacher = random_qkv(2, 5, 6)
    student = random_qkv(2, 5, 4, seed=1, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])

    def loss(*qkv):
        return relation_loss(
            teacher,
            QKV(*qkv),
            heads=2,
            pairs=ALL_PAIRS,
            mask=mask,
            document_ids=documents,
            implementation=implementation,
        ).total

    assert torch.autograd.gradcheck(loss, tuple(student))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_perfect_student_has_no_loss_and_no_gradient(implementation):
    teacher = random_qkv(2, 11, 12)
    student = QKV(*(x.clone().requires_grad_() for x in teacher))
    total, per_pair, gradients = evaluate(teacher, student, heads=3, pairs=ALL_PAIRS, implementation=implementation)
    assert abs(total) < 1e-14 and all(abs(value) < 1e-14 for value in per_pair.values())
    assert all(g.abs().max() < 1e-15 for g in gradients)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_total_is_the_weighted_sum_and_backward_scales(implementation):
    teacher, student = random_qkv(2, 9, 12), random_qkv(2, 9, 6, seed=1, requires_grad=True)
    loss = relation_loss(teacher, student, heads=3, pairs=ALL_PAIRS, implementation=implementation)
    torch.testing.assert_close(loss.total, sum(ALL_PAIRS[pair] * value for pair, value in loss.per_pair.items()))
    once = torch.autograd.grad(loss.total, student, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss.total, student)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_without_gradient_the_value_is_the_same(implementation):
    teacher, student = random_qkv(2, 9, 12), random_qkv(2, 9, 6, seed=1, requires_grad=True)
    expected = relation_loss(teacher, student, heads=3, implementation=implementation).total
    with torch.no_grad():
        loss = relation_loss(teacher, student, heads=3, implementation=implementation).total
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_blocks_give_what_one_block_gives(implementation, monkeypatch):
    from pipeline.relations import blocks as relation_blocks

    teacher, student = random_qkv(2, 23, 24), random_qkv(2, 23, 12, seed=1, requires_grad=True)
    expected = evaluate(teacher, student, heads=6, implementation="reference")
    for scores in (1, 30, 200, 5000):
        monkeypatch.setattr(relation_blocks, "_BLOCK_SCORES", scores)
        check_close(evaluate(teacher, student, heads=6, implementation=implementation), expected, 1e-12)


def test_mistakes_are_explained():
    teacher, student = random_qkv(2, 9, 12), random_qkv(2, 9, 6)
    with pytest.raises(UserError, match="4 relation heads do not divide the student's hidden size 6"):
        relation_loss(teacher, student, heads=4)
    with pytest.raises(UserError, match="unknown relation pairs"):
        relation_loss(teacher, student, heads=3, pairs={"qx": 1.0})
    with pytest.raises(UserError, match="unknown relation pairs"):
        relation_loss(teacher, student, heads=3, pairs={})
    with pytest.raises(UserError, match="unknown implementation"):
        relation_loss(teacher, student, heads=3, implementation="magic")
    with pytest.raises(ValueError, match="mask"):
        relation_loss(teacher, student, heads=3, mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="student"):
        relation_loss(teacher, random_qkv(2, 8, 6), heads=3)


def check_close(got, expected, tolerance: float) -> None:
    """Totals, losses by pair and gradients within `tolerance`, relative to the largest of their kind."""
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=tolerance, atol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for pair, value in expected[1].items():
        torch.testing.assert_close(got[1][pair].double(), value.double(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(got[2], expected[2], strict=True):
        bound = tolerance * max(float(theirs.abs().max()), 1e-12)
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit_and_keep_their_number(threads):
    before = torch.get_num_threads()
    teacher, student = random_qkv(3, 40, 24), random_qkv(3, 40, 12, seed=1, requires_grad=True)
    mask = torch.arange(40) < torch.tensor([40, 9, 0])[:, None]
    try:
        torch.set_num_threads(1)
        alone = evaluate(teacher, student, heads=6, mask=mask, implementation="chunked")
        torch.set_num_threads(threads)
        together = evaluate(teacher, student, heads=6, mask=mask, implementation="chunked")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0])
    assert all(torch.equal(a, b) for a, b in zip(alone[2], together[2], strict=True))


def test_without_triton_auto_works_and_asking_for_it_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pipeline.relations.kernel", raising=False)
    teacher, student = random_qkv(2, 9, 12), random_qkv(2, 9, 6)
    assert relation_loss(teacher, student, heads=3).total.isfinite()
    with pytest.raises(UserError, match="needs the package triton"):
        relation_loss(teacher, student, heads=3, implementation="triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_needs_a_gradient_gets_one(implementation):
    teacher, student = random_qkv(2, 9, 12), random_qkv(2, 9, 6, seed=1)
    key = student.key.clone().requires_grad_()
    loss = relation_loss(
        teacher, QKV(student.query, key, student.value), heads=3, pairs={"qk": 1.0}, implementation=implementation
    )
    loss.total.backward()
    assert key.grad.abs().max() > 0 and student.query.grad is None
