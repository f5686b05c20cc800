"""Fixtures that all tests share: the real samples."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep import samples as sample_store

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Real text and a real teacher, fetched once and checked."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / sample_store.TEACHER

    @property
    def enwiki(self) -> Path:
        return self.folder / sample_store.ENWIKI

    @property
    def bgwiki(self) -> Path:
        return self.folder / sample_store.BGWIKI

    def leads(self, language: str = "en") -> Path:
        return self.folder / sample_store.LEADS.format(language=language)


@pytest.fixture(scope="session")
def samples() -> Samples:
    return Samples(folder=sample_store.fetch(log=lambda line: None))
