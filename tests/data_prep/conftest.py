"""Teachers' tokenizers of every family, and real text in many scripts."""

import io
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shown():
    """What `minilm inspect` says of a corpus."""
    from rich.console import Console

    from data_prep import report

    def show(corpus, **options) -> str:
        text = io.StringIO()
        report.show(corpus, Console(file=text, width=200, markup=False), **options)
        return text.getvalue()

    return show


def texts_of(path: Path, count: int) -> list[str]:
    """The first texts of a JSONL sample."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(count), strict=False)]


@pytest.fixture(scope="session")
def real_texts(samples) -> list[str]:
    """2,400 short English, French and Spanish articles."""
    return [text for language in ("en", "fr", "es") for text in texts_of(samples.leads(language), 800)]


@pytest.fixture(scope="session")
def byte_level_teacher(real_texts, tmp_path_factory) -> Path:
    """A RoBERTa tokenizer folder (byte-level BPE), trained on the spot."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaTokenizer

    folder = tmp_path_factory.mktemp("roberta")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(real_texts, vocab_size=6000, special_tokens=special, show_progress=False)
    trainer.save_model(str(folder))
    RobertaConfig(vocab_size=6000).save_pretrained(folder)
    RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unigram_teacher(real_texts, tmp_path_factory) -> Path:
    """An XLM-R tokenizer folder with nothing but `sentencepiece.bpe.model`, trained on the spot."""
    import sentencepiece
    from transformers import XLMRobertaConfig

    folder = tmp_path_factory.mktemp("xlmr")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(real_texts),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=6000,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        character_coverage=0.9995,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "sentencepiece.bpe.vocab").unlink()
    XLMRobertaConfig(vocab_size=6002).save_pretrained(folder)
    return folder
