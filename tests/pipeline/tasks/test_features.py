"""Examples as inputs: windows of long ones, words of every kind of tokenizer, places of answers."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.tasks import features, finetune, vectors
from pipeline.tasks.examples import Example, TaskData
from pipeline.tasks.table import find_task
from tests import toy

TEXTS = ["Ada Smith went home to Paris", "the cat sat on the mat", "the nations met in Geneva"] * 20


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    return finetune.load_tokenizer(str(toy.make_teacher(folder, TEXTS)), "tokens")


def byte_level(folder, **settings):
    """As ModernBERT's: no space is set before a text, and the class is no one's in particular."""
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], **names, **settings
    ).save_pretrained(folder)
    return finetune.load_tokenizer(str(folder), "tokens")


def test_words_keep_the_space_before_them(tmp_path, wordpiece):
    words = ("Ada", "Smith", "went", "home")
    for tokenizer in (byte_level(tmp_path), wordpiece):
        (row,) = features.encode(tokenizer, [Example(texts=words, target=(1, 2, 0, 0))], "tokens", 64).rows
        inside = tokenizer(" ".join(words))["input_ids"]
        assert row["input_ids"][-5:] == inside[-5:]


@pytest.mark.parametrize("length", [5, 60, 61, 400])
def test_every_word_of_a_long_example_is_tagged_once(wordpiece, length):
    words = tuple(("cat", "Paris", "unheardof", "\u200b")[i % 4] for i in range(length))
    examples = [Example(texts=words, target=tuple(range(length))), Example(texts=("cat",), target=(7,))]
    made = features.encode(wordpiece, examples, "tokens", 64)
    assert all(len(row["input_ids"]) <= 64 for row in made.rows)
    labels = [label for row in made.rows[:-1] for label in row["labels"] if label != features.IGNORED]
    kept = [i for i in range(length) if i % 4 != 3]  # a word of which nothing is left has no place
    assert sorted(labels) == kept
    output = [np.array(row["labels"]) for row in made.rows]  # a tagger that is always right
    found, _ = features.answers("tokens", output, made, examples)
    assert found == [[i if i % 4 != 3 else None for i in range(length)], [7]]
    begun = [row["labels"] for row in made.rows[:-1]]
    assert all(label == features.IGNORED for labels in begun[1:] for label in labels[1:5])  # nothing to its left


def test_an_answer_is_found_where_the_tokenizer_drops_a_character(wordpiece):
    example = Example(texts=("who?", "the \u200bcat sat"), target=(("\u200bcat", 4),))
    (row,) = features.encode(wordpiece, [example], "span", 64).rows
    assert row["start_positions"] == row["end_positions"] > 0
    assert wordpiece.convert_ids_to_tokens(row["input_ids"][row["start_positions"]]) == "cat"
    cut = features.encode(wordpiece, [Example(texts=("who?", "cat " * 40), target=(("cat", 156),))], "span", 32)
    assert [row["start_positions"] > 0 for row in cut.rows] == [False] * (len(cut.rows) - 1) + [True]


def test_padding_stands_on_the_right_whatever_a_tokenizer_says(tmp_path):
    tokenizer = byte_level(tmp_path, padding_side="left")
    rows = features.encode(
        tokenizer, [Example(texts=("cat",), target=(1,)), Example(texts=("the", "cat"), target=(0, 1))], "tokens", 16
    ).rows
    batch = features.pad(tokenizer, rows)
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
    assert batch["labels"][0, 1] == 1


def test_texts_that_share_a_counterpart_are_all_right(monkeypatch, wordpiece):
    """Three questions to a passage: a model that finds every passage has 1.0, both ways."""
    rows = [Example(texts=(f"question {i}", f"passage {i // 3}"), target=None) for i in range(60)]
    data = TaskData(
        task=find_task("mine:retrieval"),
        labels=(),
        train=[],
        selection=[],
        reported={"test": rows},
        unlabelled=0,
        torn=0,
    )

    def perfect(model, tokenizer, texts, seq_tokens):
        numbers = [int(text.split()[1]) // (3 if text.startswith("q") else 1) for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(numbers), 20).float()

    monkeypatch.setattr(vectors, "embed", perfect)
    monkeypatch.setattr(vectors, "load_encoder", lambda folder: None)
    trial = finetune.Trial(folder="", lr=None, seed=1, max_tokens=64)
    scores = finetune._retrieve(trial, wordpiece, data)["test"]
    assert scores["accuracy_at_1"]["value"] == scores["mrr"]["value"] == 1.0
    assert scores["mrr"]["examples"] == 60 + 20
