"""A tokenizer's folder as files, read without any tokenizer library: whether it is whole and what it was."""

import hashlib
import json
from pathlib import Path

from data_prep.errors import UserError

VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model"),
    *("spiece.model", "spm.model", "tokenizer.model"),
)
LEAST_VOCABULARY = 0.5  # of the embedding table: tables are padded by some percent, never to twice the tokens


def canonical(settings: dict) -> str:
    """The text of a tokenizer.json that its fingerprint is taken of."""
    return json.dumps(settings, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def fingerprint_of(path: Path) -> str:
    """The fingerprint of a tokenizer.json, as `Tokenizer.fingerprint`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        settings = json.loads(path.read_bytes())
        return hashlib.sha256(canonical({**settings, "truncation": None, "padding": None}).encode()).hexdigest()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a tokenizer ({error}). Copy or prepare the corpus again.") from None


def require_unchanged(folder: Path, fingerprint: str) -> None:
    """Refuse the tokenizer of a corpus that does not make the corpus's ids.

    Args:
        folder: `tokenizer/` of the corpus.
        fingerprint: of the corpus's manifest.

    Raises:
        UserError: it is missing, or another one.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing. Copy or prepare the corpus again.")
    if fingerprint_of(path) != fingerprint:
        raise UserError(f"{path} has changed since the corpus was made. Copy or prepare the corpus again.")


def require_vocabulary(folder: Path) -> None:
    """Refuse a folder without a tokenizer's files, for which `transformers` would invent an empty tokenizer.

    What is no folder may be the name of a model on the hub.
    """
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(
            f"the folder {folder} holds no tokenizer: expected one of {', '.join(VOCABULARIES)}. Copy it there from "
            "the teacher."
        )


def require_fitting(folder: Path, vocabulary_tokens: int) -> None:
    """Refuse a tokenizer beside a model of another vocabulary; without a model in `folder` nothing is compared.

    Raises:
        UserError: most of the model's embeddings could never occur.
    """
    try:
        embeddings = json.loads((folder / "config.json").read_bytes())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(embeddings, int) and vocabulary_tokens < LEAST_VOCABULARY * embeddings:
        raise UserError(
            f"the tokenizer in {folder} knows {vocabulary_tokens:,} tokens, the model there has {embeddings:,} "
            "embeddings: the vocabulary is cut short, or another model's. Copy it there from the teacher again."
        )
