"""The teacher's tokenizer: exact token ids of whole documents, fast.

A tokenizer file often carries truncation and padding for its own model's use; both are removed, because a corpus holds
whole documents and cuts its own windows. The fingerprint is taken after that, so that it names what decides the ids.

The reference is `tokenizers`, the library that runs the teacher's own file. Most documents are encoded by `tokie`, many
times faster, where `guard` knows that the ids are the same. Of the documents encoded so, a sample is encoded by both;
where they differ, all of that piece of work is encoded by the reference. To the reference alone is left a tokenizer
that tokie cannot read, that cuts text into words in a way not known here, or for which tokie gives other ids for a few
lines in many scripts or for any sequence of three characters that matter.

Documents too long to be encoded in little memory are cut at seams: a single space or newline between two letters or
digits, where both halves encode as they would in one piece. This is tried for the tokenizer at hand before it is used.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep import durable
from data_prep.errors import UserError, first_line
from data_prep.tokens import tokenizer_files
from data_prep.tokens.guard import SEPARATOR, Guard, Spaces
from data_prep.tokens.seams import Seams, find_seams, parts_of

PIECE_CHARACTERS = 1 << 16
PIECES_AT_A_TIME = 64  # bounds the encoders' memory
CHECK_EVERY = 1024  # one document in so many is encoded by both
_PROBES = (
    "The quick (brown) fox, it's 3.5 metres -- nearly!\tSee https://example.org/a_b?c=d\n\n  the lazy dog's back.",
    "À l'école, naïve façade œuvre; straße İstanbul Łódź; cafe\u0301 Việt",
    "Москва — столица; Αθήνα τέλος",
    "中文字符。日本語カタカナ 한국어 ไทยภาษา",
    "مرحبا بكم שלום नमस्ते 🙂👨\u200d👩 ½ ① Ａ",
    "##ing ▁a ＜mask＞ [ｍａｓｋ] " + "x" * 250 + " " + "9" * 130,
)


# Ways of cutting text into words for which the guard is known to be right.
_KNOWN_CUTS = frozenset(("BertPreTokenizer", "Metaspace", "Whitespace", "WhitespaceSplit", "ByteLevel"))


class Disagreement(Exception):
    """The two encoders gave a text different ids; the message begins as the text does."""


class Encoder:
    """Texts to token ids. Knows no names of special tokens, loads in a moment, and is what workers use.

    Attributes:
        versions: the libraries that make the ids, for the manifest; "fast" is "" when tokie cannot be used.
    """

    def __init__(self, reference, fast, added_tokens: Sequence[str], seams: Seams | None, mind_spaces: bool = False):
        """Args:
        reference: a `tokenizers.Tokenizer` without truncation and padding.
        fast: the `tokie.Tokenizer` of the same file, or None.
        added_tokens: as they are spelled in text.
        seams: how long texts may be cut; None if the tokenizer must see them whole.
        mind_spaces: words are cut as in byte-level BPE, see `guard.Spaces`.
        """
        self._reference, self._fast, self._seams, self._mind_spaces = reference, fast, seams, mind_spaces
        self._added_tokens = tuple(added_tokens)
        if self._fast is not None and not self._agree([probe.encode() for probe in _PROBES]):
            self._fast = None
        self.versions = {
            "reference": f"tokenizers {importlib.metadata.version('tokenizers')}",
            "fast": f"tokie {importlib.metadata.version('tokie')}" if self._fast is not None else "",
        }
        spaces = Spaces(lambda token: reference.token_to_id(token) is not None) if mind_spaces else None
        self._guard = self._fast and Guard(self._encode_fast, self._encode_by_reference, self._added_tokens, spaces)

    @classmethod
    def of(cls, reference, canonical: str, mode: str = "auto") -> "Encoder":
        """Args:
        reference: a `tokenizers.Tokenizer` without truncation and padding.
        canonical: its tokenizer.json.
        mode: "auto", or "reference" to do without tokie.
        """
        settings = json.loads(canonical)
        added = [token["content"] for token in settings.get("added_tokens", ())]
        settings.pop("model")  # a large vocabulary: tens of megabytes as Python objects
        plain = cls(reference, None, added, None)
        seams = find_seams(settings, lambda texts: plain.encode_flat(texts)[0])
        cuts = {part["type"] for part in parts_of(settings, "pre_tokenizer")}
        fast = _read_fast(canonical) if mode == "auto" and cuts <= _KNOWN_CUTS else None
        encoder = cls(reference, fast, added, seams, mind_spaces="ByteLevel" in cuts)
        if encoder._guard and encoder._guard.disagreements(3):
            return encoder.by_reference()
        return encoder

    @classmethod
    def load(cls, folder: str | Path) -> "Encoder":
        """Opens what `save` wrote, in little time and memory: large vocabularies never become Python objects."""
        from tokenizers import Tokenizer as Backend

        folder = Path(folder)
        settings = json.loads((folder / "encoder.json").read_bytes())
        fast = None
        if settings["is_fast"]:
            import tokie

            fast = tokie.Tokenizer.from_file(str(folder / "fast.tkz"))
        seams = Seams(**settings["seams"]) if settings["seams"] else None
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        return cls(backend, fast, settings["added_tokens"], seams, settings["mind_spaces"])

    def save(self, folder: Path) -> None:
        """Writes what other processes need to encode alike."""
        durable.write(folder / "tokenizer.json", self._reference.to_str())
        if self._fast is not None:
            self._fast.save(str(folder / "fast.tkz"))
        settings = {
            "is_fast": self._fast is not None,
            "added_tokens": self._added_tokens,
            "seams": self._seams and asdict(self._seams),
            "mind_spaces": self._mind_spaces,
        }
        durable.write(folder / "encoder.json", json.dumps(settings))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._reference.decode([int(number) for number in ids], skip_special_tokens=True)

    def by_reference(self) -> "Encoder":
        """One that does without the fast encoder."""
        return Encoder(self._reference, None, self._added_tokens, self._seams)

    def encode_flat(self, texts: Sequence[str], counts: Counter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts one after another, and the number of tokens of each text.

        Args:
            texts: whole documents.
            counts: incremented by what was encoded which way.

        Raises:
            Disagreement: a sampled document is encoded differently by the two encoders.
        """
        counts = Counter() if counts is None else counts
        encoded = [] if texts else [self._encode_pieces([], counts)]
        for is_long, group in itertools.groupby(texts, lambda text: len(text) > 2 * PIECE_CHARACTERS):
            if is_long and self._seams is not None:
                encoded += [self._encode_long(text, counts) for text in group]
            else:
                encoded.append(self._encode_pieces(list(group), counts))
        ids, lengths, trusted = encoded[0] if len(encoded) == 1 else map(np.concatenate, zip(*encoded, strict=True))
        counts["fast_encoded"] += int(trusted.sum())
        counts["reference_encoded"] += int((~trusted).sum())
        return ids, lengths

    def _encode_long(self, text: str, counts: Counter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One text, some pieces of it at a time."""
        pieces, encoded = self._seams.cut(text, PIECE_CHARACTERS), []
        while run := list(itertools.islice(pieces, PIECES_AT_A_TIME)):
            encoded.append(self._encode_pieces(run, counts))
        ids = np.concatenate([part[0] for part in encoded])
        return ids, np.array([len(ids)]), np.array([all(part[2].all() for part in encoded)])

    def _encode_pieces(self, texts: Sequence[str], counts: Counter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, lengths, and which texts went the fast way."""
        encoded = [text.encode() for text in texts]
        counts["text_bytes"] += sum(map(len, encoded))
        trusted = self._guard.trusted(encoded) if self._guard else np.zeros(len(texts), dtype=bool)
        ids, lengths = self._encode_each(encoded, trusted)
        if (nothing := trusted & (lengths <= 1)).any():
            trusted &= ~nothing
            ids, lengths = self._encode_each(encoded, trusted)
        self._check_sample(encoded, ids, lengths, trusted, counts)
        return ids, lengths, trusted

    def _encode_each(self, texts: Sequence[bytes], trusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encodes each text its own way and lays the ids in the order of the texts."""
        if trusted.all():
            return self._encode_fast(texts)
        if not trusted.any():
            return self._encode_by_reference(texts)
        lengths = np.zeros(len(texts), dtype=np.int64)
        sides = []
        for chosen, encode in ((trusted, self._encode_fast), (~trusted, self._encode_by_reference)):
            side_ids, side_lengths = encode([texts[number] for number in np.flatnonzero(chosen)])
            lengths[chosen] = side_lengths
            sides.append((chosen, side_ids))
        ids = np.empty(int(lengths.sum()), dtype=np.int32)
        for chosen, side_ids in sides:
            ids[np.repeat(chosen, lengths)] = side_ids
        return ids, lengths

    def _encode_by_reference(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._reference.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        arrays = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        return np.concatenate(arrays or [np.zeros(0, dtype=np.int32)]), lengths

    def _encode_fast(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """One call for all texts: through a file in memory, the only way into tokie that makes no Python lists."""
        lengths = np.zeros(len(texts), dtype=np.int64)
        filled = np.array([len(text) > 0 for text in texts], dtype=bool)  # tokie passes over empty texts
        descriptor, path = _memory_file()
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(SEPARATOR.join(filter(None, texts)))
            ids, bounds = self._fast.encode_files([path], separator=SEPARATOR, add_special_tokens=False)
        finally:
            os.close(descriptor)
        if len(bounds) != filled.sum() + 1:
            raise RuntimeError(f"tokie returned {len(bounds) - 1} documents for {filled.sum()}")
        lengths[filled] = np.diff(bounds.astype(np.int64))
        return ids.astype(np.int32, copy=False), lengths

    def _agree(self, texts: Sequence[bytes]) -> bool:
        pairs = zip(self._encode_fast(texts), self._encode_by_reference(texts), strict=True)
        return all(np.array_equal(fast, reference) for fast, reference in pairs)

    def _check_sample(self, texts, ids, lengths, trusted, counts: Counter) -> None:
        numbers = np.flatnonzero(trusted)[::CHECK_EVERY]
        ends = np.cumsum(lengths)
        for number in numbers:
            expected, _ = self._encode_by_reference([texts[number]])
            if not np.array_equal(ids[ends[number] - lengths[number] : ends[number]], expected):
                raise Disagreement(texts[number].decode()[:60])
        counts["encoded_twice"] += len(numbers)


def _read_fast(canonical_json: str):
    """tokie's reading of a tokenizer file, or None if it cannot read it."""
    try:
        import tokie
    except ImportError:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(canonical_json)
        file.flush()
        try:
            return tokie.Tokenizer.from_json(file.name)
        except Exception:  # whatever it cannot read, the reference can
            return None


def _memory_file() -> tuple[int, str]:
    """A file in memory: descriptor and path."""
    descriptor = os.memfd_create("texts")
    return descriptor, f"/proc/self/fd/{descriptor}"


class Tokenizer:
    """The tokenizer of the teacher.

    Attributes:
        fingerprint: sha256 of the canonical tokenizer.json without truncation and padding.
        vocabulary_tokens: one more than the highest token id, added tokens included.
        cls_id, sep_id, pad_id: ids of [CLS]/[SEP]/[PAD], or <s>/</s>/<pad>.
        unknown_id: id of [UNK] or <unk>; -1 where every text has tokens.
    """

    def __init__(self, hub_tokenizer, encoder: str = "auto"):
        """Wraps a fast `transformers` tokenizer; `encoder` is "auto", or "reference" to do without tokie."""
        self._mode = encoder
        self._hub_tokenizer = hub_tokenizer
        self._reference = hub_tokenizer.backend_tokenizer
        self._truncation, self._padding = self._reference.truncation, self._reference.padding
        self._take_whole_texts()
        settings = json.loads(self._reference.to_str())
        self._canonical = tokenizer_files.canonical(settings)
        self.fingerprint = hashlib.sha256(self._canonical.encode()).hexdigest()
        self.vocabulary_tokens = max(len(hub_tokenizer), 1 + max(hub_tokenizer.get_vocab().values(), default=0))
        self.cls_id = self._special("cls", "bos")
        self.sep_id = self._special("sep", "eos")
        self.pad_id = self._special("pad", "eos")
        unknown = hub_tokenizer.unk_token_id
        self.unknown_id = -1 if unknown is None else unknown

    @classmethod
    def load(cls, source: str | Path, encoder: str = "auto") -> "Tokenizer":
        """Loads the tokenizer of a model folder or hub id.

        Raises:
            UserError: there is no tokenizer at `source`, or one without a vocabulary, or another model's.
        """
        from transformers import AutoTokenizer

        tokenizer_files.require_vocabulary(Path(source))
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except Exception as error:  # a missing folder, no network, a missing converter: each its own kind
            reason = first_line(error)
            raise UserError(
                f"no tokenizer could be loaded from {str(source)!r}: {reason.rstrip('.')}. Expected a Hugging Face "
                "model id, or a folder with tokenizer.json or sentencepiece.bpe.model."
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer of {str(source)!r} has no fast version, which is needed here.")
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            raise UserError(
                f"the tokenizer of {str(source)!r} knows its special tokens alone: its vocabulary is missing. Expected "
                "tokenizer.json, vocab.txt or sentencepiece.bpe.model beside the model."
            )
        tokenizer_files.require_fitting(Path(source), len(tokenizer))
        return cls(tokenizer, encoder)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """What does the encoding; made at the first use."""
        return Encoder.of(self._reference, self._canonical, self._mode)

    def _special(self, *roles: str) -> int:
        for role in roles:
            number = getattr(self._hub_tokenizer, f"{role}_token_id", None)
            if number is not None:
                return number
        raise UserError(f"the tokenizer has no {roles[0]} token, which marks the edges of documents or windows.")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of whole texts, int32, without special tokens."""
        ids, lengths = self.encoder.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.encoder.decode(ids)

    def save(self, folder: Path) -> None:
        """Writes a complete Hugging Face tokenizer folder, truncation and padding as they were."""
        if self._truncation:
            self._reference.enable_truncation(**self._truncation)
        if self._padding:
            self._reference.enable_padding(**self._padding)
        try:
            self._hub_tokenizer.save_pretrained(str(folder))
        finally:
            self._take_whole_texts()

    def _take_whole_texts(self) -> None:
        self._reference.no_truncation()
        self._reference.no_padding()
