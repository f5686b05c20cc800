"""Where a long text may be cut so that its pieces have the same token ids as the whole.

A seam is a single space or newline between two letters or digits. Tokenizers that first split their text at whitespace
give both halves the ids they have in one piece; what differs is whether the space belongs to the right half (byte-
level BPE) or to neither (SentencePiece puts its own mark). Whether a tokenizer is of this kind is read from its parts,
and then tried.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SEAM = re.compile(r"(?<=[^\W_])[ \n](?=[^\W_])")
_SPACE_AT_WORD = re.compile(r"\w\s|\s\w")
_WORDS = ("the", "Fox", "a", "12", "été", "中文", "한", "й", "ก", "ال", "x" * 250, "9" * 130)
# Normalizers that look at a few neighbouring characters at most. "Replace" joins runs of spaces; a seam is a single
# one.
_LOCAL_NORMALIZERS = frozenset(
    ("BertNormalizer", "Precompiled", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Replace")
)


@dataclass(frozen=True)
class Seams:
    """How to cut texts for one tokenizer."""

    right_keeps_space: bool

    def cut(self, text: str, piece_characters: int) -> Iterator[str]:
        """Pieces of about `piece_characters`; longer ones where there is no seam."""
        start = 0
        while len(text) - start > 2 * piece_characters:
            seam = _SEAM.search(text, start + piece_characters)
            if seam is None:
                break
            yield text[start : seam.start()]
            start = seam.start() if self.right_keeps_space else seam.end()
        yield text[start:]


def find_seams(settings: dict, encode: Callable[[Sequence[str]], np.ndarray]) -> Seams | None:
    """How texts can be cut for a tokenizer, or None if they cannot.

    Args:
        settings: its tokenizer.json.
        encode: token ids of texts, one after another.
    """
    if not _splits_at_whitespace(settings):
        return None
    pairs = [(left, space, right) for left in _WORDS for space in " \n" for right in _WORDS]
    whole = encode(["".join(pair) for pair in pairs])
    for right_keeps_space in (True, False):
        halves = [half for a, space, b in pairs for half in (a, space + b if right_keeps_space else b)]
        if np.array_equal(encode(halves), whole):
            return Seams(right_keeps_space)
    return None


def _splits_at_whitespace(settings: dict) -> bool:
    """Whether words never share a token, judged by the parts that the tokenizer is built of."""
    splits = any(
        part["type"] in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
        or (part["type"] == "Metaspace" and part.get("split", True))
        or (part["type"] == "ByteLevel" and part.get("use_regex", True))
        for part in parts_of(settings, "pre_tokenizer")[:1]
    )
    across_words = any(_SPACE_AT_WORD.search(token["content"]) for token in settings.get("added_tokens", ()))
    local = {part["type"] for part in parts_of(settings, "normalizer")} <= _LOCAL_NORMALIZERS
    return splits and local and not across_words


def parts_of(settings: dict, name: str) -> list[dict]:
    """The normalizers or pre-tokenizers of a tokenizer.json, a sequence taken apart."""
    part = settings.get(name)
    if not part:
        return []
    return part.get("normalizers") or part.get("pretokenizers") or [part]
