"""A toy to train in seconds: a random teacher of a few thousand weights, its own tokenizer, a corpus of real text."""

import json
from pathlib import Path

from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source

HIDDEN, LAYERS, HEADS, POSITIONS = 48, 3, 4, 64
SIX_STEPS = [  # overrides that make the demo recipe a matter of seconds: six steps of eight samples of 32 tokens
    "data.seq_tokens=32",
    "student.init=random",
    "optimizer.global_batch_samples=8",
    "optimizer.steps=6",
    "optimizer.warmup_steps=2",
    "checkpoint.every_steps=3",
    "logging.every_steps=1",
    "logging.validation_samples=16",
]


def make_teacher(folder: Path, texts: list[str], *, model_type: str = "bert", seed: int = 0, **extra) -> Path:
    """A random model of an architecture with a WordPiece tokenizer trained on the texts; a folder as the hub has it."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import AutoConfig, AutoModel, BertTokenizerFast

    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=400, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=POSITIONS)
    tokenizer.save_pretrained(folder)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    sizes |= dict(intermediate_size=2 * HIDDEN, max_position_embeddings=POSITIONS, pad_token_id=tokenizer.pad_token_id)
    sizes |= dict(initializer_range=0.3)  # relations that are far from uniform, so that there is something to learn
    torch.manual_seed(seed)
    AutoModel.from_config(AutoConfig.for_model(model_type, **(sizes | extra))).save_pretrained(folder)
    return folder


def make_corpus(
    folder: Path, tokenizer: Path, texts: Path, documents: int = 200, validation_fraction: float = 0.1
) -> Path:
    """A corpus of the first documents of a JSONL file, a tenth of them held out."""
    request = PrepareRequest(
        tokenizer=str(tokenizer),
        sources=(Source.parse(f"jsonl,language=en:{texts}"),),
        validation_fraction=validation_fraction,
        limit_documents=documents,
    )
    prepare(request, folder, workers=0, show_progress=False)
    return folder


def first_texts(texts: Path, count: int = 200) -> list[str]:
    with texts.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(count), lines, strict=False)]


def make(folder: Path, texts: Path) -> list[str]:
    """Teacher and corpus in a folder; the overrides that make the demo recipe train the toy."""
    teacher = make_teacher(folder / "teacher", first_texts(texts))
    corpus = make_corpus(folder / "corpus", teacher, texts)
    return [
        f"teacher.model={teacher}",
        f"data.corpus={corpus}",
        f"teacher.layer={LAYERS}",
        "student.shape=2x24",
        "student.heads=4",
        "relations.heads=6",
        *SIX_STEPS,
    ]


def random_qkv(rows, positions, hidden, *, dtype=None, scale=1.0, seed=0, requires_grad=False, device="cpu"):
    """Queries, keys and values [rows, positions, hidden] of normal numbers, in fp64 if nothing else is asked for."""
    import torch

    from pipeline.relations.qkv import QKV

    generator = torch.Generator().manual_seed(seed)
    made = (scale * torch.randn(rows, positions, hidden, generator=generator, dtype=torch.float64) for _ in range(3))
    return QKV(*(x.to(device, dtype or torch.float64).requires_grad_(requires_grad) for x in made))
