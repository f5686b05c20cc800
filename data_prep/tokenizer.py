"""The teacher's tokenizer: exact token ids, whole documents, in batches.

A tokenizer file often carries truncation and padding for its own model's use; both are removed, because a corpus holds
whole documents and cuts its own windows. The fingerprint is taken after that, so that it names what decides the token
ids.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep import durable
from data_prep.errors import UserError


class Encoder:
    """Texts to token ids. Knows no names of special tokens, loads in a moment, and is what workers use."""

    def __init__(self, canonical_json: str):
        from tokenizers import Tokenizer as Backend

        self._json = canonical_json
        self._reference = Backend.from_str(canonical_json)

    @classmethod
    def load(cls, folder: str | Path) -> "Encoder":
        """Opens what `save` wrote."""
        return cls((Path(folder) / "encoder.json").read_text())

    def save(self, folder: Path) -> None:
        """Writes what other processes need to encode alike."""
        durable.write(folder / "encoder.json", self._json)

    def encode_flat(self, texts: Sequence[str], counts: Counter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts one after another, and the number of tokens of each text.

        Args:
            texts: whole documents.
            counts: incremented by what was encoded which way.
        """
        counts = Counter() if counts is None else counts
        encodings = self._reference.encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ids = np.concatenate(
            [np.array(encoding.ids, dtype=np.int32) for encoding in encodings] or [np.zeros(0, np.int32)]
        )
        counts["text_bytes"] += sum(len(text.encode()) for text in texts)
        counts["reference_encoded"] += len(texts)
        return ids, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._reference.decode([int(number) for number in ids], skip_special_tokens=True)


class Tokenizer:
    """The tokenizer of the teacher.

    Attributes:
        fingerprint: sha256 of the canonical tokenizer.json without truncation and padding.
        vocabulary_tokens: number of token ids, added tokens included.
        cls_id, sep_id, pad_id: ids of [CLS]/[SEP]/[PAD], or <s>/</s>/<pad>.
    """

    def __init__(self, hub_tokenizer):
        """Wraps a fast `transformers` tokenizer."""
        self._hub_tokenizer = hub_tokenizer
        settings = json.loads(hub_tokenizer.backend_tokenizer.to_str())
        settings["truncation"] = settings["padding"] = None
        canonical = json.dumps(settings, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        self.encoder = Encoder(canonical)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocabulary_tokens = len(hub_tokenizer)
        self.cls_id = self._special("cls", "bos")
        self.sep_id = self._special("sep", "eos")
        self.pad_id = self._special("pad", "eos")

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Loads the tokenizer of a model folder or hub id.

        Raises:
            UserError: there is no tokenizer at `source`.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source))
        except Exception as error:  # a missing folder, no network, a missing converter: each its own kind
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"no tokenizer could be loaded from {str(source)!r}: {reason}. Expected a Hugging Face model id, or a "
                "folder with tokenizer.json or sentencepiece.bpe.model."
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer of {str(source)!r} has no fast version, which is needed here.")
        return cls(tokenizer)

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
        """Writes a complete Hugging Face tokenizer folder."""
        self._hub_tokenizer.save_pretrained(str(folder))
