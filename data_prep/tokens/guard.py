"""Which texts the fast encoder may encode, so that the ids are those of the reference.

- A code point is trusted once both encoders gave the same ids for it in several contexts. It is tried when it first
occurs,
  and remembered, so this costs nothing after the first documents. A text with any other code point is not trusted.
- Where a special token is spelled out, such as "[SEP]", the two may differ in the spaces around it: not trusted.
- A very short text may come to nothing, which the two do not express alike: not trusted.

Everything is found in the UTF-8 bytes of many texts at once.
"""

from collections.abc import Callable, Sequence

import numpy as np

SEPARATOR = b"\xff"  # never occurs in UTF-8, so it can stand between texts
SHORT_BYTES = 16
_CONTEXTS = ("{0}.", "x {0}", "a{0}b", "é{0}{0}é", "中{0} {0}1")
_UNKNOWN, _TRUSTED, _DISTRUSTED = range(3)

Encode = Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]]
"""Texts to their token ids, one text after another, and the number of tokens of each."""


class Guard:
    """Compares two encoders and remembers on what they agree."""

    def __init__(self, fast: Encode, reference: Encode, added_tokens: Sequence[str]):
        self._fast, self._reference = fast, reference
        self._added_tokens = tuple(token.encode() for token in added_tokens if token)
        self._trust = np.zeros(0x110000, dtype=np.uint8)
        self.try_code_points(np.arange(128))
        self._doubtful_ascii = bytes(np.flatnonzero(self._trust[:128] == _DISTRUSTED).tolist())

    def trusted(self, texts: Sequence[bytes]) -> np.ndarray:
        """Which texts the fast encoder may encode, as booleans; tries code points that were never seen before."""
        trusted = np.array([len(text) >= SHORT_BYTES for text in texts], dtype=bool)
        data = SEPARATOR.join(texts)
        positions, points = foreign_points(data)
        if len(unknown := points[self._trust.take(points) == _UNKNOWN]):
            self.try_code_points(np.unique(unknown))
        doubtful = [positions[self._trust.take(points) == _DISTRUSTED], self._added_tokens_in(data)]
        doubtful += [positions_of(byte, data) for byte in self._doubtful_ascii if byte in data]
        if any(map(len, doubtful)):
            ends = np.cumsum([len(text) + 1 for text in texts])
            trusted[np.searchsorted(ends, np.concatenate(doubtful), side="right")] = False
        return trusted

    def _added_tokens_in(self, data: bytes) -> np.ndarray:
        """Where special tokens are spelled out."""
        starts = {token[0] for token in self._added_tokens}
        places = [int(place) for byte in starts for place in positions_of(byte, data)]
        return np.array([at for at in places if data.startswith(self._added_tokens, at)], dtype=np.int64)

    def try_code_points(self, points: np.ndarray) -> None:
        """Encodes code points in several contexts both ways, and notes which gave the same ids."""
        texts = [context.format(chr(point)).encode() for point in points for context in _CONTEXTS]
        alike = same_groups(self._fast(texts), self._reference(texts), len(_CONTEXTS))
        self._trust[points] = np.where(alike, _TRUSTED, _DISTRUSTED)


def positions_of(byte: int, data: bytes) -> np.ndarray:
    """Where a byte occurs."""
    return np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == byte)


def foreign_points(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The code points beyond ASCII in UTF-8 text, and the positions of their first bytes.

    Decoding only these leaves most of most texts alone.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    positions = np.flatnonzero(octets >= 0xC0)
    first = octets[positions]
    characters = first != SEPARATOR[0]
    positions, first = positions[characters], first[characters].astype(np.int32)
    tail = [octets.take(positions + offset, mode="clip").astype(np.int32) & 0x3F for offset in (1, 2, 3)]
    two = (first & 0x1F) << 6 | tail[0]
    three = (first & 0x0F) << 12 | tail[0] << 6 | tail[1]
    four = (first & 0x07) << 18 | tail[0] << 12 | tail[1] << 6 | tail[2]
    return positions, np.where(first < 0xE0, two, np.where(first < 0xF0, three, four))


def same_groups(first: tuple, second: tuple, group_texts: int) -> np.ndarray:
    """Which groups of texts have the same ids in two encodings, each given as flat ids and lengths."""
    same = first[1] == second[1]
    ids = [encoded[0][np.repeat(same, encoded[1])] for encoded in (first, second)]
    owner = np.repeat(np.flatnonzero(same), first[1][same])
    same[owner[ids[0] != ids[1]]] = False
    return same.reshape(-1, group_texts).all(axis=1)
