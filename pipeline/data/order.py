"""Which sample comes k-th, as a pure function of (seed, k).

Training order needs no state beyond one integer when three functions can be evaluated anywhere, in any order:

* `Mixture.locate`: sample number k -> (source, ordinal within the source). The sources hang as leaves on a binary
  tree. A node that has handed out x samples has given `floor((x * left + total / 2) / total)` of them to its left
  child, so the count of every source after any k is a closed form, less than two samples from its exact share.
* ordinal -> (epoch, position): a source of n samples starts over after n, on its own, so that a small one repeats while
  a large one is still in its first epoch.
* `permute`: position -> sample, a keyed bijection of [0, n): a Feistel network on the two digits of a mixed-radix
  number whose range hardly exceeds n, with cycle walking (a value outside [0, n) is sent through again until it falls
  inside). Each (seed, source, epoch) has its own key. `unpermute` runs it backwards.

Everything is vectorised over sample numbers and every size or key may itself be an array, one entry a sample.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

# Small networks mix slowly: below this size every ordering, not only every pair of places, should be equally likely.
_SMALL_SIZE = 256
_ROUNDS, _ROUNDS_IF_SMALL = 8, 24
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_HALF = np.uint64(32)
# Products of two counts below this limit stay inside int64.
_WEIGHT_LIMIT = 1 << 31
# Blocks whose samples are shuffled together by `block_permute`: the working set of the page cache, in blocks.
BLOCKS_TOGETHER = 32


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64: every output bit depends on every input bit; uint64 -> uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int | np.ndarray) -> np.ndarray:
    """One 64-bit key from a list of integers (or arrays of integers, broadcast); the order of the parts matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        word = np.asarray(part & _WORD if isinstance(part, int) else part).astype(np.uint64)
        key = _mix((key ^ word) + np.uint64(_GOLDEN))
    return key


def permute(positions: np.ndarray, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Sends positions through the bijection of [0, size) that `key` names.

    Args:
        positions: integers in [0, size), any shape.
        size: number of elements, below 2**62; a scalar or one per position.
        key: uint64 from `derive_key`, of one element or one per position.
    """
    return _walk(_words(positions), _words(size), key, forward=True)


def unpermute(samples: np.ndarray, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """The inverse of `permute`: at which position a sample comes."""
    return _walk(_words(samples), _words(size), key, forward=False)


def _words(values: int | np.ndarray) -> np.ndarray:
    return np.atleast_1d(np.asarray(values)).astype(np.uint64)


def _walk(values: np.ndarray, size: np.ndarray, key: np.ndarray, *, forward: bool) -> np.ndarray:
    """Through the network and, cycle walking, again until the value falls into [0, size); int64."""
    small = size < _SMALL_SIZE
    if small.any() and not small.all():
        out = np.empty(values.shape, np.int64)
        for part in (np.flatnonzero(small), np.flatnonzero(~small)):
            at = key if key.size == 1 else key[part]
            out[part] = _walk(values[part], size[part], at, forward=forward)
        return out
    rounds = _ROUNDS_IF_SMALL if small[0] else _ROUNDS
    # The high digit's base is even, so that odd permutations are reachable too.
    high = _ceil_sqrt(size)
    high += high & np.uint64(1)
    low = (size + high - np.uint64(1)) // high
    values = _feistel(values, high, low, key, rounds, forward)
    while (outside := np.flatnonzero(values >= size)).size:
        bases = [a if a.size == 1 else a[outside] for a in (high, low, key)]
        values[outside] = _feistel(values[outside], *bases, rounds, forward)
    return values.astype(np.int64)


def _ceil_sqrt(limit: np.ndarray) -> np.ndarray:
    root = np.sqrt(limit.astype(np.float64)).astype(np.uint64)
    return root + (root * root < limit)


def _feistel(
    values: np.ndarray, high: np.ndarray, low: np.ndarray, key: np.ndarray, rounds: int, forward: bool
) -> np.ndarray:
    """Adds a keyed hash of one digit to the other, modulo its base, alternately; a bijection of [0, high * low)."""
    left, right = values // low, values % low
    for step in range(rounds) if forward else reversed(range(rounds)):
        base, other = (high, right) if step % 2 == 0 else (low, left)
        hashed = _mix((other + np.uint64((step + 1) * _GOLDEN & _WORD)) ^ key)
        shift = ((hashed >> _HALF) * base) >> _HALF
        if not forward:
            shift = base - shift
        if step % 2 == 0:
            left = _wrap(left + shift, base)
        else:
            right = _wrap(right + shift, base)
    return left * low + right


def _wrap(x: np.ndarray, base: np.ndarray) -> np.ndarray:
    """x modulo base for x < 2 * base; below the base the difference wraps around to something huge."""
    return np.minimum(x, x - base)


def block_permute(positions: np.ndarray, size: int | np.ndarray, key: np.ndarray, block_samples: int) -> np.ndarray:
    """A bijection of [0, size) that stays local: it visits blocks of neighbours, `BLOCKS_TOGETHER` blocks at a time.

    Blocks come in random order; the samples of each group of blocks are shuffled together. So at any moment only
    `BLOCKS_TOGETHER * block_samples` neighbouring samples are in play, which read-ahead and the page cache turn into
    sequential reads. The price: samples that are far apart in the corpus meet in a batch only if their blocks do. The
    last, incomplete block always comes at the end of an epoch.
    """
    group_samples = BLOCKS_TOGETHER * block_samples
    group, within = np.divmod(np.atleast_1d(np.asarray(positions, np.int64)), group_samples)
    first = group * group_samples
    within = permute(within, np.minimum(group_samples, size - first), derive_key(key, group))
    block, offset = np.divmod(first + within, block_samples)
    whole = np.broadcast_to(np.asarray(size, np.int64) // block_samples, block.shape)
    moved = np.flatnonzero(block < whole)
    if moved.size:
        at = key if key.size == 1 else key[moved]
        block[moved] = permute(block[moved], whole[moved], at)
    return block * block_samples + offset


def temperature_weights(sizes: Sequence[int], alpha: float) -> list[float]:
    """p_i ~ n_i^alpha: 1 keeps natural proportions, 0 makes all equal (XLM-R samples its languages with 0.3)."""
    powers = [float(n) ** alpha if n else 0.0 for n in sizes]
    total = sum(powers)
    return [p / total for p in powers]


def integer_weights(weights: Sequence[float | int]) -> list[int]:
    """Weights as integers whose sum is below 2**31: exact for small integers, else to about one part in 10**9.

    Natural proportions (numbers of samples) stay exact, so that after as many samples as the corpus has, every source
    has been seen exactly once.
    """
    total = sum(weights)
    if all(float(w).is_integer() for w in weights):
        divisor = gcd(*(int(w) for w in weights)) or 1
        exact = [int(w) // divisor for w in weights]
        if sum(exact) < _WEIGHT_LIMIT:
            return exact
    scale = (_WEIGHT_LIMIT - len(weights) - 1) / total
    return [max(1, int(w * scale)) if w > 0 else 0 for w in weights]


def _given_left(handed_out: np.ndarray, left: np.ndarray, total: np.ndarray) -> np.ndarray:
    """How many of a node's first samples went to its left child: floor((x * left + total / 2) / total), no overflow."""
    rounds, rest = np.divmod(handed_out, total)
    return rounds * left + (rest * left + total // 2) // total


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources interleaved in fixed proportions; build it with `Mixture.of`.

    Attributes:
        weights: integer weight of each source; 0 leaves a source out.
        left, total: weight of the left child and of the whole, per inner node; node 0 is the root.
        children: [nodes, 2]; an inner node's number, or ~source for a leaf.
    """

    weights: tuple[int, ...]
    left: np.ndarray
    total: np.ndarray
    children: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[float | int]) -> "Mixture":
        """A Huffman tree over the sources: heavy sources sit near the root, where the rounding is finest."""
        whole = integer_weights(weights)
        heap = [(weight, source, ~source) for source, weight in enumerate(whole) if weight]
        heapq.heapify(heap)
        merged: list[tuple[int, int, int, int]] = []  # left weight, total, children; numbered in order of creation
        while len(heap) > 1:
            (light, age, first), (heavy, _, second) = heapq.heappop(heap), heapq.heappop(heap)
            merged.append((heavy, light + heavy, second, first))
            heapq.heappush(heap, (light + heavy, age, len(merged) - 1))
        # The root was made last; numbering backwards makes it node 0.
        last = len(merged) - 1
        rows = [(w, t, *(last - c if c >= 0 else c for c in pair)) for w, t, *pair in reversed(merged)]
        table = np.array(rows, np.int64).reshape(-1, 4)
        return cls(weights=tuple(whole), left=table[:, 0], total=table[:, 1], children=table[:, 2:])

    @property
    def _root(self) -> int:
        return 0 if len(self.total) else ~next(s for s, w in enumerate(self.weights) if w)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample number, and how many samples of that source came before it; both int64."""
        ordinal = np.atleast_1d(np.asarray(samples, np.int64)).copy()
        node = np.full(ordinal.shape, self._root, np.int64)
        while (inner := np.flatnonzero(node >= 0)).size:
            at, x = node[inner], ordinal[inner]
            left, total = self.left[at], self.total[at]
            before = _given_left(x, left, total)
            goes_left = _given_left(x + 1, left, total) > before
            ordinal[inner] = np.where(goes_left, before, x - before)
            node[inner] = self.children[at, np.where(goes_left, 0, 1)]
        return ~node, ordinal

    def counts(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples come from each source; int64 [sources]."""
        counts = np.zeros(len(self.weights), np.int64)
        stack = [(self._root, samples)]
        while stack:
            node, x = stack.pop()
            if node < 0:
                counts[~node] = x
                continue
            before = int(_given_left(np.int64(x), self.left[node], self.total[node]))
            stack += [(int(self.children[node, 0]), before), (int(self.children[node, 1]), x - before)]
        return counts
