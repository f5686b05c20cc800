"""How much text is kept of Wikipedia's articles, how clean and how fast, beside other cleaners, in one run.

    python tests/benchmarks/wikipedia.py runs/samples/enwiki-sample.xml.bz2 [--python /path/to/python] [--rounds 3]

Every cleaner gets the wikitext of the same articles, already out of the XML, in one process; the median of the rounds'
processor time counts. Peers that this Python, or that of --python, does not have are left out by name: mwparserfromhell
(`strip_code`), gensim (`filter_wiki`), wikitextparser (`plain_text`), wikiextractor (`Extractor.clean_text`).

Residue is what a reader would stumble over: markup and the traces of what was taken out.
"""

import argparse
import bz2
import json
import re
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESIDUE = {
    "markup": r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|'''|''|</?[a-z]+[^<>]*>|&[a-z]+;|^[|!].*$|\b(?:File|Image|Category):",
    "holes": r" [,.;:](?=\s)|\( |\(\)|\(\s*[,;]|, ,| \)",
}


def articles(dump: Path) -> list[str]:
    """The wikitext of a dump's articles."""
    pages = re.findall(rb"<page>.*?</page>", bz2.decompress(dump.read_bytes()), re.DOTALL)
    roots = [ElementTree.fromstring(page) for page in pages]
    kept = [root for root in roots if root.findtext("ns") == "0" and root.find("redirect") is None]
    return [root.findtext("revision/text") or "" for root in kept]


def ours():
    sys.path.insert(0, str(ROOT))
    from data_prep.readers.wikitext import clean

    return clean


def mwparserfromhell():
    import mwparserfromhell

    return lambda text: mwparserfromhell.parse(text).strip_code()


def gensim():
    from gensim.corpora.wikicorpus import filter_wiki

    return filter_wiki


def wikitextparser():
    import wikitextparser

    return lambda text: wikitextparser.parse(text).plain_text()


def wikiextractor():
    from wikiextractor.extract import Extractor

    return lambda text: "\n".join(Extractor("1", "1", "", "", text).clean_text(text))


CLEANERS = {
    "this project": ours,
    "mwparserfromhell": mwparserfromhell,
    "gensim": gensim,
    "wikitextparser": wikitextparser,
    "wikiextractor": wikiextractor,
}


def measure(name: str, texts: list[str], rounds: int) -> dict[str, float]:
    clean, seconds, made = CLEANERS[name](), [], []
    for _ in range(rounds):
        began = time.process_time()
        made = [clean(text) for text in texts]
        seconds.append(time.process_time() - began)
    whole = "\n".join(made)
    words = len(re.findall(r"\w+", whole))
    residue = {kind: len(re.findall(p, whole, re.MULTILINE | re.IGNORECASE)) for kind, p in RESIDUE.items()}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    per_thousand = {kind: 1000 * count / words for kind, count in residue.items()}
    return {"mb_per_second": megabytes / statistics.median(seconds), "words": words, **per_thousand}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("--python", default=sys.executable, help="that has the peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=CLEANERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, articles(options.dump), options.rounds)))
        return
    print(f"{'cleaner':18} {'MB/s':>6} {'words':>9} {'markup':>8} {'holes':>8}   (residue per 1,000 words)")
    for name in CLEANERS:
        python = sys.executable if name == "this project" else options.python
        rounds = str(options.rounds if name == "this project" else 1)
        command = [python, __file__, str(options.dump), "--measure", name, "--rounds", rounds]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name:18} left out: {done.stderr.strip().splitlines()[-1]}")
            continue
        got = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:18} {got['mb_per_second']:6.2f} {got['words']:9,} {got['markup']:8.2f} {got['holes']:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
