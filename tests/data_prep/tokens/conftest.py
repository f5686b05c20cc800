"""A teacher of every family of tokenizers, its tokenizer as it is here and as transformers gives it."""

import pytest
from transformers import AutoTokenizer

from data_prep.tokens.tokenizer import Tokenizer

FAMILIES = ("wordpiece", "byte_level", "unigram")


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request, samples):
    folders = {"wordpiece": lambda: samples.teacher}
    get = folders.get(request.param) or (lambda: request.getfixturevalue(f"{request.param}_teacher"))
    return get()


@pytest.fixture(scope="module")
def tokenizer(teacher):
    return Tokenizer.load(teacher)


@pytest.fixture(scope="module")
def own(teacher):
    """The teacher's tokenizer as transformers gives it."""
    return AutoTokenizer.from_pretrained(teacher)
