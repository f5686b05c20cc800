"""Licences, languages and data sets, out of what lies beside a teacher and a corpus."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest

from pipeline import provenance
from pipeline.recipes import load_recipe


@pytest.fixture
def teacher(tmp_path):
    (tmp_path / "teacher").mkdir()
    return tmp_path / "teacher"


@pytest.fixture
def corpus():
    def shard(source, language, split="train"):
        return SimpleNamespace(source=source, language=language, split=split, tokens=10)

    shards = (shard("cc100-zh-Hans", "zh-Hans"), shard("cc100-no", "no"), shard("cc100-no", "no"), shard("books", ""))
    shards += (shard("cc100-de", "de", "validation"),)
    sources = [dict(kind="hub", path="wikimedia/wikipedia"), dict(kind="jsonl", path="x.jsonl")]
    return SimpleNamespace(
        fingerprint="of a manifest", manifest=SimpleNamespace(shards=shards, request={"sources": sources})
    )


def of(teacher, corpus, run, fingerprint="one", **data):
    recipe = load_recipe("demo", [f"teacher.model={teacher}"])
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **data))
    run.mkdir(exist_ok=True)
    provenance.record(run, recipe, corpus, fingerprint)
    return provenance.read(run, recipe)


def test_licence_of_the_card_or_of_the_text(teacher, corpus, tmp_path):
    def license_of(**files):
        for path in teacher.iterdir():
            path.unlink()
        for name, text in files.items():
            (teacher / name.replace("_", ".")).write_text(text)
        return of(teacher, corpus, tmp_path / "run", fingerprint=str(files))[0]

    assert license_of().license == ""
    mit = "Permission is hereby granted, free\nof charge, ... The above\ncopyright notice ..."
    assert license_of(LICENSE=mit).license == "mit"
    assert license_of(LICENSE_txt="  Apache License\n   Version 2.0, January 2004").license == "apache-2.0"
    assert license_of(README_md="---\nlicense: cc-by-4.0\n---\n# x", LICENSE=mit).license == "cc-by-4.0"
    assert license_of(README_md="---\nlicense: [mit]\n---\n").license == "mit"
    assert license_of(README_md="# no front matter", COPYING=mit).license == "mit"
    assert license_of(README_md="---\n: [\n---\n", NOTICE="Permission is hereby granted").license == ""
    both = license_of(README_md="---\nlicense: [Apache-2.0, mit]\n---\n")
    assert (both.license, both.license_name) == ("other", "Apache-2.0, mit")
    assert license_of(README_md="---\nlicense: Apache-2.0\n---\n").license == "apache-2.0"
    preamble = "Everyone is permitted to copy and distribute verbatim copies of this license document. " * 5
    later = f"{preamble} GNU Affero General Public License version 3, GNU General Public License version 2"
    for name, title in {
        "gpl-3.0": "GNU GENERAL PUBLIC LICENSE\n  Version 3, 29 June 2007",
        "mpl-2.0": "Mozilla Public License Version 2.0\n=====",
        "lgpl-2.1": "GNU LESSER GENERAL PUBLIC LICENSE\n Version 2.1, February 1999",
        "agpl-3.0": "GNU AFFERO GENERAL PUBLIC LICENSE\n Version 3, 19 November 2007",
        "other": "CC0 1.0 Universal",
    }.items():
        assert license_of(LICENSE=f"{title}\n{later}").license == name  # licences name each other further on
    own = license_of(LICENSE="Only on Tuesdays.")
    assert (own.license, own.license_name, own.license_link) == ("other", "see-file", "LICENSE")
    named = license_of(README_md="---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x.org/y\n---\n")
    assert (named.license, named.license_name, named.license_link) == ("other", "gemma", "https://x.org/y")


def test_languages_and_data_sets_are_those_that_are_sampled(teacher, corpus, tmp_path):
    known, _ = of(teacher, corpus, tmp_path / "run")
    assert known.languages == ("no", "zh") and known.datasets == ("wikimedia/wikipedia",)
    assert known.sources == {"cc100-zh-Hans": 10, "cc100-no": 20, "books": 10}
    known, _ = of(teacher, corpus, tmp_path / "run", weights={"no": 0.0, "zh-Hans": 1.0, "books": 0.0})
    assert known.languages == ("zh",) and known.sources == {"cc100-zh-Hans": 10}


def test_a_later_start_forgets_a_teacher_only_if_it_is_another(teacher, corpus, tmp_path):
    (teacher / "LICENSE").write_text("Apache License, Version 2.0")
    assert of(teacher, corpus, tmp_path / "run")[1] == {"LICENSE": b"Apache License, Version 2.0"}
    (teacher / "LICENSE").unlink()
    known, notices = of(teacher, corpus, tmp_path / "run")
    assert known.license == "apache-2.0" and list(notices) == ["LICENSE"]
    known, notices = of(teacher, corpus, tmp_path / "run", fingerprint="two")
    assert known.license == "" and notices == {}
    assert [path.name for path in (tmp_path / "run" / provenance.FOLDER).iterdir()] == [provenance.RECORD]


def test_a_teacher_in_the_hubs_cache_goes_by_its_id(teacher, corpus, tmp_path):
    for id, name in (("models--FacebookAI--roberta-large", "FacebookAI/roberta-large"), ("models--gpt2", "gpt2")):
        snapshot = tmp_path / "hub" / id / "snapshots" / "722cf37b1afa9454edce342e7895e588b6ff1d59"
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(teacher, snapshot)
        (tmp_path / name.replace("/", "-")).symlink_to(snapshot)
        for given in (snapshot, f"{snapshot}/", tmp_path / name.replace("/", "-")):
            known, _ = of(str(given), corpus, tmp_path / "run")
            assert known.base_model == known.teacher == name


def test_a_teacher_of_the_hub_is_the_base_model(corpus, tmp_path):
    """Nothing is cached and nothing is asked for: the tests are offline."""
    known, _ = of("someone/never-heard-of", corpus, tmp_path / "run")
    assert known.base_model == known.teacher == "someone/never-heard-of" and known.license == ""
    assert json.loads((tmp_path / "run" / provenance.FOLDER / provenance.RECORD).read_text())["base_model"]
