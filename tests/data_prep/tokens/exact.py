"""The comparison that all tests of token ids end in."""

import numpy as np


def assert_exact(tokenizer, own, texts):
    expected = own(list(texts), add_special_tokens=False)["input_ids"]
    actual = tokenizer.encode_batch(texts)
    assert all(array.dtype == np.int32 for array in actual)
    differing = [
        text[:80] for text, ids, wanted in zip(texts, actual, expected, strict=True) if ids.tolist() != list(wanted)
    ]
    assert not differing
