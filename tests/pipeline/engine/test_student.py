import json

import pytest
import torch

from data_prep.errors import UserError
from pipeline.engine import deepspeed_config
from pipeline.engine.operators import import_deepspeed
from pipeline.engine.student import learning_rate_factor, parameter_groups
from pipeline.recipes import load_recipe, shipped_recipes


@pytest.mark.parametrize("recipe", shipped_recipes())
@pytest.mark.parametrize("name", deepspeed_config.shipped_ds_configs())
def test_every_recipe_loads_with_every_ds_config(recipe, name):
    recipe = load_recipe(recipe, ["run.output=out", "data.corpus=corpus"])
    merged = deepspeed_config.merge(recipe, deepspeed_config.read_ds_config(name), world_size=2)
    micro, accumulation = merged["train_micro_batch_size_per_gpu"], merged["gradient_accumulation_steps"]
    assert micro * accumulation * 2 == merged["train_batch_size"] == recipe.optimizer.global_batch_samples
    deepspeed = import_deepspeed()
    parsed = deepspeed.DeepSpeedConfig({**merged, "train_batch_size": micro * accumulation})  # this process is one rank
    assert parsed.zero_config.stage == deepspeed_config.zero_stage(merged)
    assert parsed.gradient_clipping == recipe.optimizer.clip_norm
    expected = torch.float32 if name == "cpu" else torch.bfloat16
    assert deepspeed_config.compute_dtype(merged) == expected


@pytest.mark.parametrize(
    ("largest", "ranks", "batch", "micro"),
    [(16, 2, 32, 16), (16, 1, 32, 16), (5, 2, 32, 4), (64, 4, 32, 8), (3, 3, 21, 1)],
)
def test_micro_batch_is_the_largest_that_divides_the_share(largest, ranks, batch, micro):
    recipe = load_recipe("demo", [f"optimizer.global_batch_samples={batch}"])
    merged = deepspeed_config.merge(recipe, {"train_micro_batch_size_per_gpu": largest}, world_size=ranks)
    assert merged["train_micro_batch_size_per_gpu"] == micro
    assert micro * merged["gradient_accumulation_steps"] * ranks == batch


def test_uneven_global_batch_is_refused():
    with pytest.raises(UserError, match="32 cannot be shared evenly by 3 ranks"):
        deepspeed_config.merge(load_recipe("demo"), deepspeed_config.read_ds_config("cpu"), world_size=3)


@pytest.mark.parametrize("key", ["train_batch_size", "optimizer", "scheduler", "gradient_clipping"])
def test_a_knob_set_on_both_sides_is_refused(key):
    with pytest.raises(UserError, match=key):
        deepspeed_config.merge(load_recipe("demo"), {"train_micro_batch_size_per_gpu": 8, key: 1}, world_size=1)


def test_optimizer_state_on_nvme_is_refused_because_it_cannot_be_resumed():
    config = deepspeed_config.read_ds_config("zero3_nvme")
    config["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "nvme_path": "."}
    with pytest.raises(UserError, match='could not resume. Use "cpu"'):
        deepspeed_config.merge(load_recipe("demo"), config, world_size=1)


def test_bad_ds_configs_are_named(tmp_path):
    with pytest.raises(UserError, match="no DeepSpeed configuration 'zero9'.*zero3_offload"):
        deepspeed_config.read_ds_config("zero9")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        deepspeed_config.read_ds_config(str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="no JSON object"):
        deepspeed_config.read_ds_config(str(tmp_path / "list.json"))
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu"):
        deepspeed_config.merge(load_recipe("demo"), {}, world_size=1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_rises_then_falls_to_zero(schedule):
    overrides = [f"optimizer.schedule={schedule}", "optimizer.steps=100", "optimizer.warmup_steps=10"]
    options = load_recipe("demo", overrides).optimizer
    factors = [learning_rate_factor(step, options) for step in range(101)]
    assert all(a < b for a, b in zip(factors[:10], factors[1:11], strict=True))
    assert factors[10] == 1.0 and max(factors) == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[100] == pytest.approx(0.0, abs=1e-12)


def test_norms_biases_and_frozen_weights_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    model[2].requires_grad_(False)
    decaying, others = parameter_groups(model, 0.01)
    assert [p.shape for p in decaying["params"]] == [(4, 4)] and decaying["weight_decay"] == 0.01
    assert len(others["params"]) == 3 and others["weight_decay"] == 0.0


def test_fp16_at_stage_0_is_refused():
    """DeepSpeed 0.19 divides a gradient by the scale that its loss never had."""
    config = {"train_micro_batch_size_per_gpu": 8, "fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    with pytest.raises(UserError, match="fp16 at ZeRO stage 0"):
        deepspeed_config.merge(load_recipe("demo"), config, world_size=1)
    config["zero_optimization"]["stage"] = 1
    deepspeed_config.merge(load_recipe("demo"), config, world_size=1)
