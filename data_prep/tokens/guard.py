r"""Which texts the fast encoder may encode, so that the ids are those of the reference.

- A code point is trusted once both encoders gave the same ids for it in several contexts. It is tried when it first
  occurs, and remembered, so this costs nothing after the first documents. A text with any other code point is not
  trusted.
- Where a special token is spelled out, such as "[SEP]", the two may differ in the spaces around it: not trusted.
- A very short text may come to nothing, which the two do not express alike: not trusted.
- The pre-tokenizer of byte-level BPE, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\\S)|\s+,
  looks at neighbours, and tokie cuts otherwise around three things, which are not trusted: vertical tabs and form
  feeds, which it does not take for spaces; a tab before an apostrophe or beyond ASCII, which it takes with what
  follows; and an apostrophe with half a contraction behind it ("'la"), if the vocabulary has a token that begins so.

That these are all is tried with every sequence of four of the characters that the expression tells apart, in
tests/data_prep/tokens/test_sequences.py, with a vocabulary that shows every cut, and before the fast encoder is used
with a teacher's own vocabulary, with every sequence of three.

Everything is found in the UTF-8 bytes of many texts at once.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

SEPARATOR = b"\xff"  # never occurs in UTF-8, so it can stand between texts
SHORT_BYTES = 16
_CONTEXTS = ("{0}.", "x {0}", "a{0}b", "é{0}{0}é", "中{0} {0}1")
_UNKNOWN, _TRUSTED, _DISTRUSTED = range(3)

# One or more of each kind of characters that pre-tokenizers tell apart.
CHARACTERS = " \n\t\r\x0b\x0c\x85\u00a0\u2003asl1'._\u00e9\u4e2d\u0301\u00bd"
_AFTER_TAB = re.compile(rb"\t(?=['\x80-\xfe])")
_HALF_CONTRACTIONS = ("'l", "'r", "'v")

Encode = Callable[[Sequence[bytes]], tuple[np.ndarray, np.ndarray]]
"""Texts to their token ids, one text after another, and the number of tokens of each."""


class Guard:
    """Compares two encoders and remembers on what they agree."""

    def __init__(self, fast: Encode, reference: Encode, added_tokens: Sequence[str], spaces: "Spaces | None" = None):
        """Args:
        fast, reference: the two encoders.
        added_tokens: as they are spelled in text.
        spaces: what to mind where neighbours decide how text is cut; None where they do not.
        """
        self._fast, self._reference, self._spaces = fast, reference, spaces
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
        if self._spaces is not None:
            doubtful.append(self._spaces.doubtful_in(data))
        if any(map(len, doubtful)):
            ends = np.cumsum([len(text) + 1 for text in texts])
            trusted[np.searchsorted(ends, np.concatenate(doubtful), side="right")] = False
        return trusted

    def disagreements(self, length: int) -> list[str]:
        """Sequences of so many `CHARACTERS` that are trusted inside of a text and yet encoded in two ways."""
        found = []
        for run in _batches(map("".join, itertools.product(CHARACTERS, repeat=length))):
            texts = [f"a word x{sequence}y and more".encode() for sequence in run]
            alike = same_groups(self._fast(texts), self._reference(texts), 1) | ~self.trusted(texts)
            found += [run[number] for number in np.flatnonzero(~alike)]
        return found

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


class Spaces:
    """Places where tokie cuts otherwise than the pre-tokenizer of byte-level BPE.

    Args:
        has_token: whether the vocabulary has a token.
    """

    def __init__(self, has_token: Callable[[str], bool]):
        self._words = [word.encode() for word in _HALF_CONTRACTIONS if has_token(word)]

    def doubtful_in(self, data: bytes) -> np.ndarray:
        """Positions of them in UTF-8 text."""
        places = [positions_of(byte, data) for byte in b"\x0b\x0c" if byte in data]
        if b"\t" in data:
            places.append(np.array([match.start() for match in _AFTER_TAB.finditer(data)], dtype=np.int64))
        for word in self._words:
            if word in data:
                places.append(np.array([match.start() for match in re.finditer(word, data)], dtype=np.int64))
        return np.concatenate(places) if places else np.zeros(0, dtype=np.int64)


def _batches(texts: Iterable[str], size: int = 1 << 16) -> Iterator[list[str]]:
    texts = iter(texts)
    while run := list(itertools.islice(texts, size)):
        yield run


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
