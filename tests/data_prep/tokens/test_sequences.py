"""Characters beside each other: what the guard trusts has the reference's ids in every sequence of their kinds."""

import itertools
import json
import random

import pytest
import regex
import tokie
from tokenizers import Tokenizer as Backend
from tokenizers import models
from tokenizers.pre_tokenizers import ByteLevel

from data_prep.tokens.guard import CHARACTERS
from data_prep.tokens.tokenizer import Encoder
from tests.data_prep.tokens.exact import assert_exact

FOUR = pytest.param(4, marks=pytest.mark.exhaustive)
MANY = pytest.param(1_000_000, marks=pytest.mark.exhaustive)
WORDS = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


def all_pairs(seed: int) -> Backend:
    """A byte-level BPE whose ids show where text was cut into words.

    Any two bytes that may stand in a word are a token. Which pairs are merged first is random, so that several such
    vocabularies show every cut.
    """
    name = {byte: symbol for byte, symbol in zip(range(256), _symbols(), strict=True)}
    pairs = set()
    for length in (1, 2, 3):
        for sequence in map("".join, itertools.product(CHARACTERS, repeat=length)):
            for word in WORDS.findall(f"a{sequence}") + WORDS.findall(f"{sequence}a"):
                octets = word.encode()
                pairs |= {(name[a], name[b]) for a, b in zip(octets, octets[1:], strict=False)}
    merges = sorted(pairs)
    random.Random(seed).shuffle(merges)
    tokens = [*name.values(), *(a + b for a, b in merges)]
    made = Backend(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return made


def _symbols() -> list[str]:
    """How byte-level BPE writes each byte: printable ones as themselves, the others from U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize("length", [1, 2, 3, FOUR])
@pytest.mark.parametrize("seed", [1, 2])
def test_wherever_words_of_bytes_are_cut(seed, length, tmp_path):
    reference = all_pairs(seed)
    (tmp_path / "tokenizer.json").write_text(reference.to_str())
    fast = tokie.Tokenizer.from_json(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(reference, fast, [], None, mind_spaces=True)
    assert encoder._guard.disagreements(length) == []


@pytest.mark.parametrize("length", [1, 2, 3, FOUR])
def test_every_sequence_with_a_teachers_vocabulary(length, tokenizer):
    assert tokenizer.encoder._guard.disagreements(length) == []


@pytest.mark.parametrize(
    "text",
    [
        "words:\t's and 't in a row of quotes",
        "a page ends\x0b's and another one begins",
        "the end of page one.\n\n\x0cpage two begins",
        "one\x0b\x0btwo, three \x0c four\r\n\x0c five",
        "a tab\t\u00bd1 and a half\t\u4e2d\t\u00e9",
        "l'la d'la o'reilly 'll 'lla we'll we'lla 're 'rea 've 'vea",
        "col\tumn\tcol | a\t|\t- \t-1\t(b)\t\t's",
    ],
)
def test_texts_with_tabs_pages_and_apostrophes(text, tokenizer, own):
    assert_exact(tokenizer, own, [text, f"{text} {text}", f"{text}\n{text}", text * 3])


@pytest.mark.parametrize("count", [10_000, MANY])
def test_random_sequences_and_real_text_with_characters_changed(count, tokenizer, own, real_texts):
    chance = random.Random(3)
    tiles = [
        *CHARACTERS,
        "'s",
        "'ll",
        "'re",
        "\n\n",
        "  ",
        "\t\t",
        "\r\n",
        "word",
        "Ab",
        "12",
        "...",
        "\u2019",
        "\u200b",
    ]
    for start in range(0, count, 10_000):
        texts = ["".join(chance.choices(tiles, k=chance.randrange(4, 40))) for _ in range(min(8000, count - start))]
        for text in chance.sample(real_texts, 2000):
            part = list(text[: chance.randrange(20, 400)])
            for _ in range(chance.randrange(1, 12)):
                part.insert(chance.randrange(len(part)), chance.choice(tiles))
            texts.append("".join(part))
        assert_exact(tokenizer, own, texts)


def test_words_cut_in_an_unknown_way_are_left_to_the_reference(byte_level_teacher):
    settings = json.loads((byte_level_teacher / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[a-z]+|."}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    encoder = Encoder.of(Backend.from_str(json.dumps(settings)), json.dumps(settings))
    assert encoder.versions["fast"] == ""
