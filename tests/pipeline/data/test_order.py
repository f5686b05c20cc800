"""The order's arithmetic: bijections, uniformity, proportions."""

from itertools import permutations

import numpy as np
import pytest

from pipeline.data.order import (
    BLOCKS_TOGETHER,
    Mixture,
    block_permute,
    derive_key,
    integer_weights,
    permute,
    temperature_weights,
    unpermute,
)


def chi_square_deviation(counts: np.ndarray) -> float:
    """Pearson's statistic of counts that should be equal, in standard deviations from its mean (normal for many)."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [*range(1, 66), 997, 1024, 4095, 65_537, 300_000])
def test_permute_is_a_bijection_and_unpermute_its_inverse(size):
    key = derive_key(5, size)
    shuffled = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(shuffled), np.arange(size))
    assert np.array_equal(unpermute(shuffled, size, key), np.arange(size))


def test_permute_handles_sizes_beyond_any_corpus():
    size = 2**61 - 1
    positions = np.array([0, 1, 2**32, size - 1])
    shuffled = permute(positions, size, derive_key(1))
    assert ((shuffled >= 0) & (shuffled < size)).all()
    assert np.array_equal(unpermute(shuffled, size, derive_key(1)), positions)


def test_permute_with_a_size_and_key_for_each_position_equals_one_by_one():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 10**9, 300), np.arange(1, 101) ** 2, rng.integers(1, 300, 100)])
    positions = rng.integers(0, sizes)
    keys = derive_key(3, np.arange(500))
    together = permute(positions, sizes, keys)
    alone = [int(permute(positions[i], int(sizes[i]), keys[i : i + 1])[0]) for i in range(500)]
    assert together.tolist() == alone
    assert np.array_equal(unpermute(together, sizes, keys), positions)


def test_permute_touches_only_what_it_is_asked_for():
    """Cutting the request in pieces changes nothing: there is no hidden state."""
    key = derive_key(9)
    whole = permute(np.arange(10_000), 10_000, key)
    pieces = [permute(np.arange(at, at + 250), 10_000, key) for at in range(0, 10_000, 250)]
    assert np.array_equal(whole, np.concatenate(pieces))


@pytest.mark.parametrize("size", [10, 33, 256])
def test_every_sample_is_equally_likely_at_every_position(size):
    keys = 200 * size
    counts = np.zeros((size, size), np.int64)
    for position in range(size):
        landed = permute(np.full(keys, position), np.full(keys, size), derive_key(77, np.arange(keys)))
        counts[position] = np.bincount(landed, minlength=size)
    # Rows and columns are tied (each sums to the number of keys), which takes 2 * size - 1 degrees of freedom.
    assert abs(chi_square_deviation(counts)) < 5


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_every_ordering_of_a_tiny_source_is_equally_likely(size):
    keys = 40_000
    rows = np.stack(
        [permute(np.full(keys, p), np.full(keys, size), derive_key(8, np.arange(keys))) for p in range(size)], axis=1
    )
    counts = np.array([(rows == ordering).all(axis=1).sum() for ordering in permutations(range(size))])
    assert counts.sum() == keys
    assert chi_square_deviation(counts) < 5


@pytest.mark.parametrize("size", [48, 100, 256])
def test_every_pair_of_samples_is_equally_likely_at_a_pair_of_positions(size):
    keys = 10 * size * size
    key = derive_key(21, np.arange(keys))
    for one, other in ((0, 1), (3, size // 2), (size - 1, 0)):
        pair = permute(np.full(keys, one), size, key) * size + permute(np.full(keys, other), size, key)
        counts = np.bincount(pair, minlength=size * size).reshape(size, size)
        assert not np.diag(counts).any(), "two positions got the same sample"
        assert abs(chi_square_deviation(counts[~np.eye(size, dtype=bool)])) < 5


def test_neighbours_are_separated_evenly():
    """Where the next sample lies, seen from this one: every distance equally often."""
    size = 100_000
    shuffled = permute(np.arange(size), size, derive_key(4))
    distances = np.bincount(np.diff(shuffled) % size * 500 // size, minlength=500)
    assert abs(chi_square_deviation(distances)) < 5
    correlation = np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(size)


def test_epochs_and_seeds_share_no_structure():
    size, epochs = 20_000, 6
    orders = [permute(np.arange(size), size, derive_key(seed, 0, epoch)) for seed in (0, 1) for epoch in range(epochs)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two independent shuffles agree in one place on average; their difference takes every value equally.
            assert (one == other).sum() < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(size)
            assert abs(chi_square_deviation(np.bincount((one - other) % size * 200 // size, minlength=200))) < 5


def test_keys_depend_on_every_part_and_on_their_order():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (2**63, 0), (2**64 - 2, 0)]
    assert len({int(derive_key(*p)[0]) for p in parts}) == len(parts)


@pytest.mark.parametrize("size", [1, 5, 99, 100, 101, 10_000])
@pytest.mark.parametrize("block", [1, 7, 100])
def test_block_permute_is_a_bijection(size, block):
    drawn = block_permute(np.arange(size), size, derive_key(2, size), block)
    assert np.array_equal(np.sort(drawn), np.arange(size))


def test_block_permute_keeps_reads_local_and_shuffles_inside():
    size, block = 100_000, 50
    drawn = block_permute(np.arange(size), size, derive_key(2), block)
    group = drawn[: BLOCKS_TOGETHER * block]
    assert len(np.unique(group // block)) == BLOCKS_TOGETHER
    assert len(np.unique(group[:block] // block)) > BLOCKS_TOGETHER / 3, "the blocks of a group are not mixed"
    assert np.ptp(group) > size / 2, "the blocks of a group are neighbours"


def test_block_permute_of_several_sources_at_once_equals_one_by_one():
    sizes = np.array([10, 10, 5000, 5000, 77])
    positions = np.array([3, 9, 0, 4999, 76])
    keys = derive_key(6, np.arange(5))
    together = block_permute(positions, sizes, keys, 16)
    alone = [int(block_permute(positions[i], int(sizes[i]), keys[i : i + 1], 16)[0]) for i in range(5)]
    assert together.tolist() == alone


def mixtures() -> list[list[float]]:
    rng = np.random.default_rng(1)
    random = [list(rng.random(n) ** 6) for n in (2, 3, 7, 40, 100)]
    return [[1], [1, 1], [1, 1, 1], [0, 3, 0, 1], [0.7, 0.2, 0.1], [10**9, 1], [1e-9, 1.0], *random]


@pytest.mark.parametrize("weights", mixtures(), ids=len)
def test_every_prefix_of_the_mixture_is_within_two_samples_of_exact(weights):
    mixture = Mixture.of(weights)
    source, ordinal = mixture.locate(np.arange(20_000))
    taken = source[:, None] == np.arange(len(weights))
    counts = np.cumsum(taken, axis=0)
    exact = np.arange(1, 20_001)[:, None] * np.array(weights) / np.sum(weights)
    assert np.abs(counts - exact).max() < 2
    assert np.array_equal(ordinal, (counts[np.arange(20_000), source] - 1))
    for k in (0, 1, 17, 20_000):
        assert mixture.counts(k).tolist() == taken[:k].sum(axis=0).tolist()


def test_counts_are_exact_after_each_whole_period():
    weights = [12, 5, 30, 1, 9]
    mixture = Mixture.of(weights)
    for periods in (1, 2, 10**12):
        assert mixture.counts(periods * sum(weights)).tolist() == [w * periods for w in weights]


def test_mixture_far_into_training_costs_and_errs_no_more():
    weights = [0.5, 0.3, 0.2]
    start = 10**15
    mixture = Mixture.of(weights)
    source, ordinal = mixture.locate(np.arange(start, start + 1000))
    assert np.abs(np.bincount(source) - np.array(weights) * 1000).max() < 3
    before = mixture.counts(start)
    assert all(ordinal[source == s].min() == before[s] for s in range(3))
    exact = np.array(mixture.weights) / sum(mixture.weights)
    assert np.abs(before - start * exact).max() < 2


def test_a_source_of_weight_zero_never_comes():
    source, _ = Mixture.of([0, 2.5, 0, 1.5]).locate(np.arange(100))
    assert set(source.tolist()) == {1, 3}


def test_temperature_flattens_sizes():
    sizes = [10_000, 100]
    assert temperature_weights(sizes, 1.0) == pytest.approx([10_000 / 10_100, 100 / 10_100])
    assert temperature_weights(sizes, 0.5) == pytest.approx([10 / 11, 1 / 11])
    assert temperature_weights([10_000, 100, 0], 0.0) == [0.5, 0.5, 0.0]


def test_weights_become_integers_without_losing_a_source():
    assert integer_weights([6, 9, 0]) == [2, 3, 0]
    assert integer_weights([1e-12, 1.0])[0] == 1
    large = integer_weights([3 * 10**12 + 1, 10**12])
    assert sum(large) < 2**31
    assert large[0] / large[1] == pytest.approx(3, rel=1e-8)


def test_the_order_is_the_same_in_every_version():
    """A run that is resumed by a later version must go on in the same order: these numbers may never change."""
    assert derive_key(1, 2, 3).tolist() == [15020427595393229491]
    assert permute(np.arange(10), 10, derive_key(7)).tolist() == [5, 4, 0, 7, 8, 2, 9, 6, 1, 3]
    large = permute(np.arange(5), 1_000_000, derive_key(7))
    assert large.tolist() == [251040, 980830, 623928, 728748, 829086]
    blocks = block_permute(np.arange(6), 1000, derive_key(7), 4)
    assert blocks.tolist() == [67, 36, 608, 998, 999, 852]
    source, ordinal = Mixture.of([5, 3, 1]).locate(np.arange(9))
    assert source.tolist() == [0, 1, 0, 1, 0, 2, 0, 1, 0]
    assert ordinal.tolist() == [0, 0, 1, 1, 2, 0, 3, 2, 4]
