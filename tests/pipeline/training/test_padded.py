"""Rows that are padded: what is counted are real tokens, by any number of ranks, and over stops."""

import json

import pytest
import torch

from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from data_prep.shards import Corpus
from pipeline.data.loader import Loader
from pipeline.recipes import load_recipe
from pipeline.training.build import data_options
from pipeline.training.metrics import read_metrics
from tests import toy
from tests.jobs import settings, train


def test_tokens_are_real_ones_by_any_ranks_and_over_stops(samples, tmp_path):
    texts = [f"a short text of the number {number} " + "and more " * (number % 7) for number in range(300)]
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    overrides = [word for word in toy.make(tmp_path, samples.leads()) if not word.startswith("data.corpus")]
    source = Source.parse(f"jsonl:{tmp_path / 'short.jsonl'}")
    prepare(PrepareRequest(tokenizer=str(tmp_path / "teacher"), sources=(source,)), tmp_path / "short", workers=0)
    overrides += [f"data.corpus={tmp_path / 'short'}", "data.packing=none", "logging.every_steps=4"]
    overrides += ["checkpoint.every_steps=3", "logging.validate_every_steps=0"]
    job = dict(config=settings("cpu"), overrides=overrides)
    codes = train(
        tmp_path, 2, [dict(job, run="whole"), dict(job, run="stopped", stop_at_step=3), dict(job, run="stopped")]
    )
    assert set(codes.values()) == {0}

    recipe = load_recipe("demo", [*overrides, f"run.output={tmp_path}"])
    rows = recipe.optimizer.global_batch_samples
    batches = iter(Loader(Corpus.open(recipe.data.corpus), data_options(recipe), global_batch_samples=rows,
                          micro_batch_samples=rows, rank=0, world_size=1, samples_seen=0))  # fmt: skip
    real = torch.tensor([int(next(batches).attention_mask.sum()) for _ in range(6)]).cumsum(0).tolist()
    assert real[-1] < 0.8 * 6 * rows * recipe.data.seq_tokens
    for run in ("whole", "stopped"):
        records = read_metrics(tmp_path / run, "train")
        assert [(r["step"], r["tokens_seen"]) for r in records] == [(s, real[s - 1]) for s in (3, 4, 6)]
    one_step = next(record for record in read_metrics(tmp_path / "whole", "train") if record["step"] == 4)
    assert one_step["tokens_per_second"] * one_step["seconds"]["total"] == pytest.approx(real[3] - real[2])
