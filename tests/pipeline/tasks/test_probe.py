import pytest
import torch

from data_prep.errors import UserError
from data_prep.tokens.tokenizer import Tokenizer
from pipeline.tasks.probe import read_probe, rows_of


def test_probe_file_is_split_by_seed_and_checked(samples, tmp_path):
    one, again, other = (read_probe(samples.leads("en"), texts=100, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one.train_texts) == len(one.test_texts) == 50 and not set(one.train_texts) & set(one.test_texts)
    with pytest.raises(UserError, match="there is no probe file"):
        read_probe(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_probe(tmp_path / "bad.jsonl")
    (tmp_path / "few.jsonl").write_text('{"text": "a", "label": 1}\n' * 5)
    with pytest.raises(UserError, match="5 texts with 1 labels"):
        read_probe(tmp_path / "few.jsonl")


def test_texts_become_the_rows_that_the_teachers_own_tokenizer_makes(samples):
    from transformers import AutoTokenizer

    texts = ["A fox.", "", "The quick brown fox jumps over the lazy dog, and then it sleeps."]
    ids, real = rows_of(texts, Tokenizer.load(samples.teacher, encoder="reference"), seq_tokens=12)
    expected = AutoTokenizer.from_pretrained(samples.teacher)(
        texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(real, expected["attention_mask"].bool())
