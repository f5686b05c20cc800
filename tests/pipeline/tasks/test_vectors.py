import torch

from pipeline.tasks.vectors import linear_probe, mean_over_tokens, neighbours_in_common, qkv_vectors, ranks
from tests import toy


def test_probe_separates_what_is_separable_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (600,), generator=generator)
    noise = torch.randn(600, 8, generator=generator)
    signal = torch.nn.functional.one_hot(labels, 8) * 6.0 + noise
    half = labels.tolist()[:300], labels.tolist()[300:]
    assert linear_probe(signal[:300], half[0], signal[300:], half[1]) > 0.95
    assert linear_probe(noise[:300], half[0], noise[300:], half[1]) < 0.5


def test_ranks_and_neighbours_of_vectors():
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    own = torch.eye(50, dtype=torch.bool)
    assert ranks(vectors, 3 * vectors, own) == [1] * 50
    assert ranks(vectors, torch.ones(50, 8), own) == [50] * 50  # all as near as the right one: no merit
    three = torch.arange(50) // 3 == torch.arange(17).unsqueeze(1)  # three texts to each of 17
    assert ranks(vectors[::3], vectors, three) == [1] * 17 and ranks(vectors, vectors[::3], three.T)[::3] == [1] * 17
    assert neighbours_in_common(vectors, 2 * vectors + 1) == 1
    other = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert neighbours_in_common(vectors, other) < 0.4


def test_means_are_over_real_tokens_whatever_stands_at_padding():
    qkv = toy.random_qkv(3, 5, 4, dtype=torch.bfloat16)
    whole = qkv_vectors(qkv, None)
    assert whole.shape == (3, 12) and whole.dtype == torch.float32
    assert torch.equal(whole[:, 8:], qkv.value.float().mean(1))
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    spoilt = qkv.key.masked_fill(~mask.unsqueeze(-1), float("nan"))
    means = mean_over_tokens(spoilt, mask)
    expected = [qkv.key[row, :length].float().mean(0) for row, length in enumerate((5, 3, 1))]
    torch.testing.assert_close(means, torch.stack(expected))
    assert torch.equal(mean_over_tokens(spoilt, mask.long()), means)  # as tokenizers give it
