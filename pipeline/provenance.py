"""Where a student comes from: its teacher's name and licence, its corpus's languages and data sets.

Taken down when training starts, in `provenance/` of the run's folder, because the teacher and the corpus may be gone
when the student is exported.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pydantic

from data_prep import durable
from data_prep.errors import UserError
from data_prep.shards import Corpus
from pipeline.config import Recipe

FOLDER, RECORD = "provenance", "provenance.json"
_NOTICES = re.compile(r"(?i)(licen[cs]e|notice|copying)([.-][a-z0-9.-]+)?")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\][0-9a-f]+$")  # a folder of the hub's own cache

# What the hub calls a licence, and phrases that its text begins with, all of them: further on licences name each other.
_TITLE_CHARACTERS = 400
_TITLES = (
    ("apache-2.0", ("apache license", "version 2.0")),
    ("agpl-3.0", ("gnu affero general public license", "version 3")),
    ("lgpl-3.0", ("gnu lesser general public license", "version 3")),
    ("lgpl-2.1", ("gnu lesser general public license", "version 2.1")),
    ("gpl-3.0", ("gnu general public license", "version 3")),
    ("gpl-2.0", ("gnu general public license", "version 2")),
    ("mpl-2.0", ("mozilla public license", "version 2.0")),
    ("cc-by-nc-sa-4.0", ("attribution-noncommercial-sharealike 4.0",)),
    ("cc-by-nc-4.0", ("attribution-noncommercial 4.0",)),
    ("cc-by-sa-4.0", ("attribution-sharealike 4.0",)),
    ("cc-by-4.0", ("attribution 4.0 international",)),
)
# The same for licences without a title; the phrases may stand anywhere.
_TEXTS = (
    ("bsd-3-clause", ("redistribution and use in source and binary forms", "neither the name")),
    ("bsd-2-clause", ("redistribution and use in source and binary forms",)),
    ("mit", ("permission is hereby granted, free of charge", "the above copyright notice")),
)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of a student's origin; empty where nothing is.

    Attributes:
        teacher: id on the hub, or name of the local folder.
        teacher_fingerprint: of its configuration and weights.
        base_model: id on the hub; empty for a local folder, unless it is one of the hub's cache.
        license: of the teacher, as the hub calls it; empty if neither its card nor its folder says.
        license_name, license_link: for licences that the hub has no name for.
        languages: of the sources that are sampled, as ISO 639 codes.
        datasets: ids on the hub.
        sources: name -> tokens of each source that is sampled.
        notices: names of the teacher's own LICENSE and NOTICE files, which lie beside the record.
        corpus_fingerprint: of its manifest.
    """

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="forbid")

    teacher: str
    teacher_fingerprint: str = ""
    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    sources: dict[str, int]
    notices: tuple[str, ...] = ()
    corpus_fingerprint: str = ""


_SCHEMA = pydantic.TypeAdapter(Provenance)


def record(run: Path, recipe: Recipe, corpus: Corpus, teacher_fingerprint: str) -> None:
    """Write down where the student of a run comes from.

    What an earlier start of the same run knew of the same teacher, and this one does not see, stays.

    Args:
        run: its folder.
        recipe, corpus: of the run.
        teacher_fingerprint: what the teacher is.
    """
    known, notices = _gather(recipe, corpus, teacher_fingerprint)
    before = _read_record(run)
    if before and not known.license and before.teacher_fingerprint == teacher_fingerprint:
        kept = ("license", "license_name", "license_link", "notices")
        known = Provenance(**{**asdict(known), **{name: getattr(before, name) for name in kept}})
        notices = {}
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in (*known.notices, RECORD):
            path.unlink()  # another teacher's
    for name, content in notices.items():
        durable.write(folder / name, content)
    durable.write(folder / RECORD, json.dumps(asdict(known), indent=1, ensure_ascii=False) + "\n")


def read(run: Path, recipe: Recipe) -> tuple[Provenance, dict[str, bytes]]:
    """What a run has taken down, and the teacher's LICENSE and NOTICE by name.

    A run of an earlier version has taken nothing down: then what is still there to be seen.

    Raises:
        UserError: the record is damaged, or one of the files is missing.
    """
    recorded = _read_record(run)
    if recorded is None:
        try:
            corpus = Corpus.open(recipe.data.corpus)
        except (UserError, OSError):
            corpus = None
        return _gather(recipe, corpus, "")
    try:
        return recorded, {name: (run / FOLDER / name).read_bytes() for name in recorded.notices}
    except OSError as error:
        raise UserError(
            f"{error.filename} is missing, which {run / FOLDER / RECORD} names: copy the run again"
        ) from None


def fingerprints(run: Path) -> tuple[str, str]:
    """Of a run's teacher and corpus; empty where it has not taken them down."""
    recorded = _read_record(run)
    return (recorded.teacher_fingerprint, recorded.corpus_fingerprint) if recorded else ("", "")


def _read_record(run: Path) -> Provenance | None:
    path = run / FOLDER / RECORD
    if not path.is_file():
        return None
    try:
        recorded = _SCHEMA.validate_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): copy the run again, or move it away") from None
    if unsafe := [name for name in recorded.notices if not _NOTICES.fullmatch(name)]:
        raise UserError(f"{path} is damaged: it names the file {unsafe[0]!r}")
    return recorded


def _gather(recipe: Recipe, corpus: Corpus | None, fingerprint: str) -> tuple[Provenance, dict[str, bytes]]:
    model = recipe.teacher.model
    folder, is_local = _teacher_folder(model)
    notices = _read_notices(folder) if folder else {}
    known = dict(zip(("license", "license_name", "license_link"), _license(folder, notices), strict=True))
    if corpus is not None:
        known |= _of_corpus(recipe, corpus)
    base = _hub_id(model, is_local)
    teacher = base or (Path(model).expanduser().resolve().name if is_local else model)
    known |= dict(teacher=teacher, base_model=base, teacher_fingerprint=fingerprint, notices=tuple(notices))
    return Provenance(**{"sources": {}, **known}), notices


def _hub_id(model: str, is_local: bool) -> str:
    """The id of a teacher that is named by it, or by a folder of the hub's cache; empty for any other folder."""
    if is_local:
        snapshot = _SNAPSHOT.search(str(Path(model).expanduser().resolve()))
        return snapshot["id"].replace("--", "/") if snapshot else ""
    return model if _HUB_ID.fullmatch(model) else ""


def _teacher_folder(model: str) -> tuple[Path | None, bool]:
    """Folder with the teacher's card and licence, if it is to be had; and whether it is a local one."""
    local = Path(model).expanduser()
    if local.is_dir():
        return local, True
    if os.path.isabs(local) or model.startswith((".", "~")):
        return None, True
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model, allow_patterns=["README.md", "LICEN[CS]E*", "NOTICE*", "COPYING*"])
    except Exception:  # no network, nothing cached, gated: each its own kind; a licence is worth no run
        return None, False
    return Path(found), False


def _read_notices(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.iterdir() if _NOTICES.fullmatch(path.name) and path.is_file())
    return {path.name: path.read_bytes() for path in paths}


def _license(folder: Path | None, notices: dict[str, bytes]) -> tuple[str, str, str]:
    """The hub's name of a licence, and name and link of one that it has no name for: of the card, or of the text."""
    card = _front_matter(folder / "README.md") if folder else {}
    given = card.get("license")
    if isinstance(given, list) and given:
        given, card = (given[0], card) if len(given) == 1 else ("other", {"license_name": ", ".join(map(str, given))})
    given = given.lower() if isinstance(given, str) else ""
    if given and given != "unknown":
        other = [str(card.get(name) or "") for name in ("license_name", "license_link")]
        return (given, *other) if given == "other" else (given, "", "")
    texts = {name: content for name, content in notices.items() if not name.lower().startswith("notice")}
    for content in texts.values():
        words = " ".join(content.decode("utf-8", "replace").lower().split())
        for rows, part in ((_TITLES, words[:_TITLE_CHARACTERS]), (_TEXTS, words)):
            for name, phrases in rows:
                if all(phrase in part for phrase in phrases):
                    return name, "", ""
    return ("other", "see-file", next(iter(texts))) if texts else ("", "", "")


def _front_matter(card: Path) -> dict:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except Exception:  # no card, or no YAML in it
        return {}


def _of_corpus(recipe: Recipe, corpus: Corpus) -> dict:
    """Languages, data sets and tokens of the sources that the recipe samples."""
    weights, tokens, languages = recipe.data.weights, {}, set()
    for shard in corpus.manifest.shards:
        weight = 1 if weights is None else weights.get(shard.source, weights.get(shard.language, 1))
        if shard.split == "train" and weight:
            tokens[shard.source] = tokens.get(shard.source, 0) + shard.tokens
            languages |= {_iso(shard.language)} if shard.language else set()
    asked = corpus.manifest.request.get("sources", ())
    hub = {source["path"] for source in asked if source.get("kind") == "hub" and not Path(source["path"]).exists()}
    return dict(
        languages=tuple(sorted(languages)),
        datasets=tuple(sorted(hub)),
        sources=tokens,
        corpus_fingerprint=corpus.fingerprint,
    )


def _iso(language: str) -> str:
    """`zh-Hans` and `bn_rom` are scripts of `zh` and `bn`; `simple` English is English."""
    code = re.split(r"[-_]", language.lower())[0]
    return "en" if code == "simple" else code
