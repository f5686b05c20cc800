"""What the library sentence-transformers looks for beside a model: mean pooling, and the longest text.

Written in the form that all of its versions read, so that it need not be installed where a student is exported.
"""

import json
from pathlib import Path

from data_prep import durable

_POOLING = "1_Pooling"


def write(folder: Path, *, hidden: int, seq_tokens: int) -> None:
    """Let `SentenceTransformer(folder)` give the mean of the last hidden state over the tokens of a text.

    Args:
        folder: with the model and its tokenizer.
        hidden: width of the last hidden state.
        seq_tokens: longer texts are cut.
    """
    modes = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": _POOLING, "type": "sentence_transformers.models.Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": seq_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        f"{_POOLING}/config.json": {
            "word_embedding_dimension": hidden,
            "pooling_mode_mean_tokens": True,
            **{f"pooling_mode_{mode}": False for mode in modes},
        },
    }
    (folder / _POOLING).mkdir()
    for name, content in files.items():
        durable.write(folder / name, json.dumps(content, indent=2) + "\n")
