"""Commands on text and corpora; none of them imports torch."""

import sys
from pathlib import Path

import click

from launch.commands.console import console


def _do_without_torch() -> None:
    """Let this process never import torch, which transformers does for nothing wherever it is: seconds and memory."""
    sys.modules.setdefault("torch", None)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder; $MINILM_HOME/samples by default.")
def samples(out: Path | None) -> None:
    """Fetch the sample teacher and texts (120 MB), or make sure that they are whole.

    \b
    Example:
      minilm samples
    """
    from data_prep import samples as store

    store.fetch(out)


@click.command()
@click.option("--tokenizer", help="The teacher: its tokenizer makes the tokens.")
@click.option("--source", "source_texts", multiple=True, metavar="KIND[,OPTION=VALUE]:PATH", help="May be repeated.")
@click.option("--corpus", type=click.Path(path_type=Path), help="A TOML file with tokenizer, options and sources.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the corpus.")
@click.option("--validation", type=float, help="Share of documents held out, chosen by their hash.  [default: 0]")
@click.option("--min-tokens", type=int, help="Drop shorter documents.  [default: 1]")
@click.option("--limit", type=int, help="At most so many documents of each source.")
@click.option("--shard-bytes", metavar="SIZE", help="Size of a shard, such as 500MB.  [default: 1GB]")
@click.option("--on-bad-record", type=click.Choice(["stop", "skip"]), help="skip counts them.  [default: stop]")
@click.option("--encoder", type=click.Choice(["auto", "reference"]), help="reference is slow.  [default: auto]")
@click.option(
    "--workers",
    type=int,
    help="Processes (0: the command's own), or tasks at a time.  [default: all cores; 0 for little input]",
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--ray-address", help="Ray cluster to join; RAY_ADDRESS or a new local one by default.")
def prepare(out, source_texts, corpus, shard_bytes, workers, engine, ray_address, **options) -> None:
    """Turn text into token shards. Killed at any moment, the same command goes on.

    \b
    Kinds of source, with the options they take:
      wikipedia   dumps (.xml.bz2), or Parquet with a column `text`
      bookcorpus  a folder of one .txt a book, or Parquet with a sentence a row
      cc100       xx.txt.xz, a shard folder for each language
      jsonl, parquet, text, hub   field=, language=, name=, documents=file|paragraph|line, config=, split=
    \b
    Examples:
      minilm prepare --tokenizer runs/samples/all-MiniLM-L6-v2 --out runs/corpus --validation 0.02 \\
          --source wikipedia:runs/samples/enwiki-sample.xml.bz2 --source jsonl:runs/samples/leads-en.jsonl
      minilm prepare --tokenizer xlm-roberta-large --out /data/cc100-tokens --source 'cc100:/data/cc100/*.txt.xz'
      minilm prepare --corpus corpus.toml --out /data/corpus --engine ray
    """
    _do_without_torch()
    from data_prep.prepare import prepare as run
    from data_prep.request import request_from

    options["shard_bytes"] = shard_bytes
    request = request_from(corpus, source_texts, **options)
    made = run(request, out, workers=workers, engine=engine, ray_address=ray_address)
    shards = made.manifest.shards
    click.echo(f"{out}: {sum(s.documents for s in shards):,} documents, {sum(s.tokens for s in shards):,} tokens")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Decode N documents (corpus).")
@click.option("--verify", is_flag=True, help="Read every byte and compare checksums.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of lengths and languages, .svg (corpus).")
def inspect(path: Path, sample: int | None, verify: bool, plot: Path | None) -> None:
    """Say what is in a corpus or in a run.

    \b
    Examples:
      minilm inspect runs/demo/corpus
      minilm inspect runs/demo/corpus --verify --sample 3 --plot corpus.svg
      minilm inspect runs/demo/run --verify
    """
    _do_without_torch()
    if sample or plot or (path / "manifest.json").is_file() or (path / ".work").is_dir():
        from data_prep import report as corpus_report
        from data_prep.shards import Corpus

        corpus_report.show(Corpus.open(path), console(), sample=sample, verify=verify, plot=plot)
    else:
        from pipeline.results import report as run_report

        run_report.show(path, console(), verify=verify)
