"""Labelled texts for the linear probe: read from a file of JSON lines, and as rows of tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.tokens.tokenizer import Tokenizer

PROBE_TEXTS = 1200


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """Labelled texts; the first part of a fixed shuffle trains the probe, the rest tests it."""

    train_texts: list[str]
    train_labels: list[int]
    test_texts: list[str]
    test_labels: list[int]
    labels: list[str]


def read_probe(path: Path, *, texts: int = PROBE_TEXTS, seed: int = 1) -> ProbeTask:
    """Read labelled texts and split them in half, in an order that depends on `seed` alone."""
    if not path.is_file():
        raise UserError(f"there is no probe file {path}; expected JSONL lines with `text` and `topic` or `label`")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((row["text"] + "", str(row["label"] if "label" in row else row["topic"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number}: expected an object with `text` and `topic` or `label`") from None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [rows[i] for i in order[:texts]]
    labels = sorted({label for _, label in rows})
    if len(labels) < 2 or len(rows) < 4:
        raise UserError(f"{path} holds {len(rows)} texts with {len(labels)} labels: too few for a probe")
    half = len(rows) // 2
    numbers = [labels.index(label) for _, label in rows]
    return ProbeTask(
        train_texts=[text for text, _ in rows[:half]],
        train_labels=numbers[:half],
        test_texts=[text for text, _ in rows[half:]],
        test_labels=numbers[half:],
        labels=labels,
    )


def rows_of(texts: Sequence[str], tokenizer: Tokenizer, seq_tokens: int) -> tuple[Tensor, Tensor]:
    """Texts as rows [CLS] text [SEP], cut where they are longer.

    Returns:
        Token ids, int64, and which of them are real, bool; [texts, seq_tokens] each.
    """
    ids = torch.full((len(texts), seq_tokens), tokenizer.pad_id)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    for row, tokens in enumerate(tokenizer.encode_batch(texts)):
        whole = [tokenizer.cls_id, *tokens[: seq_tokens - 2].tolist(), tokenizer.sep_id]
        ids[row, : len(whole)] = torch.tensor(whole)
        real[row, : len(whole)] = True
    return ids, real


def majority(labels: list[int]) -> float:
    """Share of the most frequent label."""
    return max(labels.count(label) for label in set(labels)) / len(labels)
