"""What the relation loss is given: memory layouts, padding, masks, document numbers; alike in all implementations."""

import pytest
import torch

from pipeline.relations.loss import relation_loss
from pipeline.relations.qkv import QKV

IMPLEMENTATIONS = ["reference", "chunked", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, POSITIONS, HEADS = 3, 20, 4
NAN, INF = float("nan"), float("inf")


def values(width: int, seed: int) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    return QKV(*(torch.randn(ROWS, POSITIONS, width, generator=generator).to(DEVICE) for _ in range(3)))


def rows_of_a_transposed(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def last_axis_apart(x):
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def every_second_column(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def out_of_something_larger(x):
    wide = torch.zeros(x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3, device=x.device)
    wide[1:, 2:, 3:] = x
    return wide[1:, 2:, 3:]


LAYOUTS = [rows_of_a_transposed, last_axis_apart, every_second_column, out_of_something_larger]


def loss_and_gradients(teacher: QKV, student: QKV, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gradients arrive at contiguous leaves, through whatever views the student is of them."""
    leaves = [x.detach().clone().contiguous().requires_grad_() for x in student]
    layout = options.pop("layout", lambda x: x)
    loss = relation_loss(QKV(*map(layout, teacher)), QKV(*map(layout, leaves)), heads=HEADS, **options)
    return loss.total.detach(), torch.autograd.grad(loss.total, leaves)


def same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout, implementation):
    teacher, student = values(24, 0), values(16, 1)
    assert not layout(student.query).is_contiguous() and torch.equal(layout(student.query), student.query)
    plain = loss_and_gradients(teacher, student, implementation="reference")
    same(loss_and_gradients(teacher, student, implementation=implementation, layout=layout), plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_row_expanded_to_many(implementation):
    row = values(16, 1).query[:1]
    student = [row.expand(ROWS, -1, -1).requires_grad_() for _ in range(3)]
    loss = relation_loss(values(24, 0), QKV(*student), heads=HEADS, implementation=implementation)
    found = torch.autograd.grad(loss.total, student)
    same((loss.total, found), loss_and_gradients(values(24, 0), QKV(*student), implementation="reference"))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("whose", ["teacher", "student", "both"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_padding_holds_does_not_matter(implementation, whose, bad):
    teacher, student = values(24, 0), values(16, 1)
    mask = torch.arange(POSITIONS, device=DEVICE) < torch.tensor([POSITIONS, 7, 1], device=DEVICE)[:, None]
    mask[0, 3] = False  # not only at the end
    clean = loss_and_gradients(teacher, student, mask=mask, implementation="reference")
    for x in (*(teacher if whose != "student" else ()), *(student if whose != "teacher" else ())):
        x[~mask] = bad
    ours = loss_and_gradients(teacher, student, mask=mask, implementation=implementation)
    same(ours, clean)
    assert all((gradient[~mask] == 0).all() for gradient in ours[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_document_numbers_may_be_of_any_size(implementation):
    """Numbers that agree in their lower 32 bits are different documents."""
    teacher, student = values(24, 0), values(16, 1)
    small = torch.arange(POSITIONS, device=DEVICE).div(7, rounding_mode="floor").expand(ROWS, -1).int().clone()
    small[1, -4:] = -1
    large = torch.where(small < 0, -5, small.long() << 32)
    expected = loss_and_gradients(teacher, student, document_ids=small, implementation="reference")
    for ids in (small, small.long(), large, large + (1 << 61) * (large >= 0)):
        same(loss_and_gradients(teacher, student, document_ids=ids, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_of_ones_and_zeros_are_masks(implementation):
    teacher, student = values(24, 0), values(16, 1)
    mask = torch.arange(POSITIONS, device=DEVICE) < torch.tensor([POSITIONS, 7, 1], device=DEVICE)[:, None]
    expected = loss_and_gradients(teacher, student, mask=mask, implementation="reference")
    for dtype in (torch.bool, torch.int64, torch.uint8):
        same(loss_and_gradients(teacher, student, mask=mask.to(dtype), implementation=implementation), expected)
    for name, wrong in (("mask", mask.float()), ("document_ids", mask.float())):
        with pytest.raises(ValueError, match=f"{name} is of type torch.float32; expected booleans or whole numbers"):
            loss_and_gradients(teacher, student, implementation=implementation, **{name: wrong})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "positions"), [(0, 5), (2, 0), (0, 0)])
def test_a_batch_without_positions_has_no_loss(rows, positions, implementation):
    student = [torch.zeros(rows, positions, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    teacher = QKV(*(torch.zeros(rows, positions, 24, device=DEVICE) for _ in range(3)))
    loss = relation_loss(teacher, QKV(*student), heads=HEADS, implementation=implementation)
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0 and set(loss.per_pair) == {"qq", "kk", "vv"}
    assert all(x.grad.shape == x.shape for x in student)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_padding_alone_has_no_loss(implementation):
    mask = torch.zeros(ROWS, POSITIONS, dtype=torch.bool, device=DEVICE)
    loss, gradients = loss_and_gradients(values(24, 0), values(16, 1), mask=mask, implementation=implementation)
    assert float(loss) == 0.0 and not any(gradient.any() for gradient in gradients)
