"""Token ids are those of the teacher's own tokenizer, however they are made."""

import functools
import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from data_prep.tokens.tokenizer import PIECE_CHARACTERS, Disagreement, Encoder, Tokenizer
from data_prep.tokens.tokenizer_files import fingerprint_of
from tests.data_prep.tokens.exact import assert_exact
from tests.read import files_of

SCRIPTS = (
    "The quick brown fox jumps over the lazy dog; it's 3.14159 miles, isn't it? E-mail: a.b@example.org",
    "Voix ambiguë d’un cœur qui, au zéphyr, préfère les jattes de kiwis. Straße, Łódź, İzmir, naïve, Đà Nẵng",
    "Съешь ещё этих мягких французских булок, да выпей же чаю. Ѓ ѓ Ї ї Ґ ґ ӊ",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Σὲ γνωρίζω ἀπὸ τὴν κόψη τοῦ σπαθιοῦ",
    "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ。カタカナ ｶﾀｶﾅ ①②③ ㍿",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。中华人民共和国 ２０２４年",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. \u1112\u1161\u11ab\u1100\u1173\u11af",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ـ ٱلْحَمْدُ لِلَّهِ \u200fاب\u200e",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले क्\u200dष",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน น้ำ",
    "যে কোনো ভাষায় লেখা। தமிழ் மொழி. తెలుగు ಕನ್ನಡ മലയാളം සිංහල ខ្មែរ မြန်မာ ქართული հայերեն አማርኛ",
    "Emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷",
    "\U0001f9d1\u200d\U0001f680 ½ ﬁ Ⅳ ™ ﷺ \ufffd soft\u00adhyphen zero\u200bwidth no\u00a0break",
    "Z\u0351\u036b\u0343a\u0363\u0306l\u0302g\u0311 combining, e\u0301 e\u0323\u0302, A\u030a, \u212b, \u03d2\u0301",
)


def test_the_fast_encoder_is_in_use(tokenizer):
    assert tokenizer.encoder.versions["fast"].startswith("tokie ")


def test_real_text(tokenizer, own, real_texts):
    assert_exact(tokenizer, own, real_texts)


def test_scripts_alone_and_mixed(tokenizer, own):
    mixed = [f"{a}\n{b}" for a in SCRIPTS for b in SCRIPTS]
    assert_exact(tokenizer, own, [*SCRIPTS, *mixed, "".join(SCRIPTS), *(text.upper() for text in SCRIPTS)])


def test_awkward_texts(tokenizer, own):
    special = ["[SEP]", "[CLS]", "[MASK]", "<s>", "</s>", "<mask>", "<pad>", "##ing", "▁", "\u2581a", "\x00", "\x7f"]
    texts = [
        wrap.format(token)
        for token in special
        for wrap in ("{0}", "some {0} words before and after", "glued{0}glued together here", "{0} {0} \n {0}{0}")
    ]
    blanks = ["", " ", "\n", "\t \n", "\u00a0", "\u200b", "\ufeff", "a", ".", "  a  b  ", "a\r\nb\rc", "x" * 5000]
    runs = [character * count for character in "a-=_!中ก9 \n" for count in (1, 99, 100, 101, 1000)]
    assert_exact(tokenizer, own, [*texts, *blanks, *runs])


def test_random_strings(tokenizer, own):
    rng = random.Random(7)
    blocks = [(start, start + 256) for start in range(0, 0x30000, 256) if not 0xD700 <= start <= 0xE000]

    def text():
        start, stop = rng.choice(blocks)
        own_block = [chr(rng.randrange(start, stop)) for _ in range(rng.randint(1, 12))]
        other = [
            chr(rng.choice((32, 32, 97, 0x301, 0x200D, 0xFE0F, 0x4E2D, rng.randrange(33, 0x590)))) for _ in range(16)
        ]
        mixed = own_block + other
        rng.shuffle(mixed)
        return "".join(mixed)

    assert_exact(tokenizer, own, [text() for _ in range(4000)])


def test_sampled_code_points_in_contexts(tokenizer, own):
    points = [point for point in range(1, 0x110000, 97) if not 0xD800 <= point <= 0xDFFF]
    points += range(0x20, 0x600)
    contexts = ("some words {0} some words", "glued{0}glued to letters", "{0}{0} twice, {0}\u0301 marked 中{0}文")
    assert_exact(tokenizer, own, [context.format(chr(point)) for point in points for context in contexts])


@pytest.mark.parametrize(
    "stride", [pytest.param(16, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.exhaustive)]
)
def test_code_points_in_contexts(stride, tokenizer, own):
    """All of Unicode, or every 16th code point of it."""
    contexts = ("some words {0} some words", "glued{0}glued, 1{0}1", "{0}{0} twice, {0}\u0301e 中{0}文 한{0}글 क{0}्")
    for start in range(0, 0x110000, 0x4000):
        points = [point for point in range(max(1, start), start + 0x4000, stride) if not 0xD800 <= point <= 0xDFFF]
        assert_exact(tokenizer, own, [context.format(chr(point)) for point in points for context in contexts])


def test_documents_with_doubtful_code_points_go_to_the_reference(samples):
    tokenizer = Tokenizer.load(samples.teacher)
    counts = Counter()
    unassigned = "a document with \u0378 an unassigned code point"
    tokenizer.encoder.encode_flat(["a document of plain words", unassigned], counts)
    assert (counts["fast_encoded"], counts["reference_encoded"]) == (1, 1)


class Wrong:
    """A fast encoder whose ids are wrong once a text holds the word."""

    def __init__(self, right, word: bytes):
        self.right, self.word = right, word

    def encode_files(self, paths, **options):
        ids, bounds = self.right.encode_files(paths, **options)
        return ids + (self.word in Path(paths[0]).read_bytes()), bounds


def test_a_difference_in_the_sample_is_noticed(samples):
    encoder = Tokenizer.load(samples.teacher).encoder
    encoder._fast = Wrong(encoder._fast, b"sentence")
    with pytest.raises(Disagreement, match="a sentence that both encode"):
        encoder.encode_flat(["a sentence that both encode"])


def test_work_with_a_difference_is_done_by_the_reference_and_counted(samples, tmp_path, monkeypatch):
    """What comes out is what the reference alone gives; the count is in the manifest."""
    lines = [json.dumps({"text": f"document {number} is of plain words"}) for number in range(40)]
    (tmp_path / "plain.jsonl").write_text("\n".join(lines))
    request = PrepareRequest(tokenizer=str(samples.teacher), sources=(Source.parse(f"jsonl:{tmp_path}/plain.jsonl"),))
    prepare(replace(request, encoder="reference"), tmp_path / "reference", workers=0, show_progress=False)
    load = Encoder.load.__func__

    def load_wrong(cls, folder):
        encoder = load(cls, folder)
        encoder._fast = Wrong(encoder._fast, b"plain")
        return encoder

    monkeypatch.setattr(Encoder, "load", classmethod(load_wrong))
    monkeypatch.setattr("data_prep.work.units._encoder", functools.lru_cache(Encoder.load))
    made = prepare(request, tmp_path / "made", workers=0, show_progress=False)
    assert made.manifest.counts["plain"]["disagreements"] == 1
    ours, theirs = (files_of(tmp_path / name / "train") for name in ("made", "reference"))
    assert ours == theirs and ours


def test_without_the_fast_encoder(samples, real_texts):
    reference = Tokenizer.load(samples.teacher, encoder="reference")
    assert reference.encoder.versions["fast"] == ""
    counts = Counter()
    ids, lengths = reference.encoder.encode_flat(real_texts[:50], counts)
    expected, expected_lengths = Tokenizer.load(samples.teacher).encoder.encode_flat(real_texts[:50])
    assert np.array_equal(ids, expected) and np.array_equal(lengths, expected_lengths)
    assert counts["reference_encoded"] == 50


def test_long_documents_are_cut_without_a_trace(tokenizer, own, real_texts):
    assert tokenizer.encoder._seams is not None
    joiners = (" ", "\n", "\n\n", "  ", ". ")
    long = "".join(text + joiners[number % len(joiners)] for number, text in enumerate(real_texts[::4]))
    assert len(long) > 3 * PIECE_CHARACTERS
    assert_exact(tokenizer, own, ["a short one", long, "", long[: 2 * PIECE_CHARACTERS + 5]])


def test_a_very_long_document_takes_linear_work(samples, real_texts):
    """Eight times the text: eight times the bytes encoded, and the calls made."""
    encoder = Tokenizer.load(samples.teacher).encoder
    base = "\n".join(real_texts)
    encoder.encode_flat([base])

    def work(text):
        counts, calls = Counter(), [0]
        sys.setprofile(
            lambda frame, event, argument: event in ("call", "c_call") and calls.__setitem__(0, calls[0] + 1)
        )
        try:
            encoder.encode_flat([text], counts)
        finally:
            sys.setprofile(None)
        return counts["text_bytes"], calls[0]

    (few_bytes, few_calls), (many_bytes, many_calls) = work(base * 2), work(base * 16)
    assert few_bytes >= 2 * len(base.encode()) and many_bytes < 8 * few_bytes * 1.1
    assert many_calls < 8 * few_calls * 1.5


def test_truncation_and_padding_are_removed(samples):
    tokenizer = Tokenizer.load(samples.teacher)  # its file truncates to 128 and pads
    (ids,) = tokenizer.encode_batch(["word " * 1000])
    assert len(ids) == 1000
    assert len(tokenizer.encode_batch(["word"])[0]) == 1


def test_special_ids_vocabulary_and_decoding(tokenizer, own):
    assert tokenizer.cls_id == own.cls_token_id
    assert tokenizer.sep_id == own.sep_token_id
    assert tokenizer.pad_id == own.pad_token_id
    assert tokenizer.vocabulary_tokens == len(own)
    text = "albedo is the reflecting power of a surface."
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_saved_folder_loads_again_with_the_same_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Saved and loaded, déjà vu."
    assert again(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch([text])[0].tolist()
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    assert fingerprint_of(tmp_path / "tokenizer.json") == tokenizer.fingerprint


def test_encoder_travels_to_other_processes(tokenizer, tmp_path, real_texts):
    tokenizer.encoder.save(tmp_path)
    ids, _ = Encoder.load(tmp_path).encode_flat(real_texts[:20])
    assert np.array_equal(ids, tokenizer.encoder.encode_flat(real_texts[:20])[0])


def test_missing_tokenizer_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no tokenizer could be loaded from.*nothing-here"):
        Tokenizer.load(tmp_path / "nothing-here")
