"""What strangers hand in: recipes, overrides, DeepSpeed configurations, checkpoints, models, probes, damaged at random.

Everything goes through the functions that users reach. Whatever it is, it ends in a message or in a right result: never
in a traceback, never in running code, never in a file elsewhere. Corpora: tests/data_prep/test_damaged.py.
"""

import contextlib
import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import tomli_w
import torch

from data_prep import durable
from data_prep.errors import UserError, words_of
from pipeline.encoders.models import load_teacher, teacher_config
from pipeline.engine import checkpoint, deepspeed_config, records
from pipeline.recipes import load_recipe
from pipeline.tasks.probe import read_probe
from pipeline.training import preflight
from pipeline.training.run_folder import FinishedRun
from tests import toy
from tests.damage import changed, places
from tests.jobs import settings, train

# fmt: off
WRONG = [None, True, -1, 0, 1.5, 10**18, 10**30, 1e-300, float("inf"), float("nan"), [], [[]], [1, "a"], {}, {"a": 1},
         "", "x", "0x24", "é" * 300, "../..", "a\x00b", "\x1b[31m", "6x384\n", "٦x٣٨٤", "100000x384"]
ABSURD = [
    "optimizer.peak_lr=inf", "optimizer.peak_lr=1e300", "optimizer.eps=nan", "optimizer.eps=1e-300",
    "optimizer.weight_decay=inf", "optimizer.weight_decay=1e300", "optimizer.clip_norm=inf",
    "optimizer.global_batch_samples=1000000000000000000", "optimizer.steps=1\n", f"optimizer.steps=1{'0' * 30}",
    f"optimizer.steps={'9' * 5000}",
    "relations.pairs.qq=inf", "relations.pairs.qq=1e300", "relations.pairs={}", "relations.layers=[]",
    "relations.heads=1000000000",
    "student.shape=0x24", "student.shape=06x24", "student.shape=100000x3840", "student.shape=2000x24",
    "student.heads=7",
    "data.weights={leads-en=inf}", "data.seq_tokens=1000000000", "data.block_samples=1000000000000000000",
    "run.output=", "run.output='a\x00b'", "teacher.layer=99", "logging.hang_seconds=10000000000000",
]
# fmt: on


@pytest.fixture(scope="module")
def world(samples, tmp_path_factory) -> tuple[Path, list[str]]:
    """A toy with one finished run of four steps."""
    folder = tmp_path_factory.mktemp("strangers")
    overrides = [o for o in toy.make(folder, samples.leads()) if not o.startswith(("optimizer.steps", "checkpoint."))]
    overrides += ["optimizer.steps=4", "checkpoint.every_steps=2"]
    train(folder, 1, [dict(run="run", config=settings("zero1"), overrides=overrides)])
    return folder, overrides


@contextlib.contextmanager
def nothing_written(folder: Path):
    before = sorted(str(path) for path in folder.rglob("*"))
    yield
    assert sorted(str(path) for path in folder.rglob("*")) == before


def accepted(function, *arguments, **options) -> bool:
    """Whether it was; a mistake has words, and anything else than a UserError is a failure."""
    try:
        function(*arguments, **options)
        return True
    except (UserError, OSError) as error:
        assert words_of(error).strip()
        return False


def test_recipes_with_wrong_values(world):
    """By the file and by overrides; those that are read are also held against the teacher and the corpus."""
    folder, overrides = world
    recipe, config = load_recipe("demo", [*overrides, f"run.output={folder / 'new'}"]), settings("zero1")
    plain, path = recipe.to_dict(), folder / "stranger.toml"
    path.touch()
    cases = passed = 0
    with nothing_written(folder):
        for place in places(plain):
            for value in WRONG if len(place) > 1 else [None, 1, "x", []]:
                if not place or value is None:
                    continue
                cases += 2
                path.write_bytes(_toml(changed(plain, place, value)))
                if accepted(load_recipe, str(path)):
                    passed += 1
                    accepted(preflight.check, [load_recipe(str(path))], config, world_size=1)
                accepted(load_recipe, "demo", [*overrides, f"{'.'.join(map(str, place))}={value}"])
    assert cases > 1000 and passed < cases / 5


def _toml(table) -> bytes:
    try:
        return tomli_w.dumps(table).encode()
    except (TypeError, ValueError):
        return b"not = = toml"


@pytest.mark.parametrize(
    "text", ["", "[", "run = 1", "\ufeffrun = {}", "run = " + "[" * 5000, "[run]\noutput = 1\noutput = 2"]
)
def test_files_that_are_no_recipes(text, tmp_path):
    (tmp_path / "recipe.toml").write_text(text)
    assert not accepted(load_recipe, str(tmp_path / "recipe.toml"))
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    assert not accepted(load_recipe, str(tmp_path / "recipe.toml"))


@pytest.mark.parametrize("override", ABSURD)
def test_wrong_and_absurd_values_are_refused(override, world):
    folder, overrides = world
    with pytest.raises(UserError):
        recipe = load_recipe("demo", [*overrides, f"run.output={folder / 'new'}", override])
        preflight.check([recipe], settings("zero1"), world_size=1)


def test_text_is_taken_as_it_is_typed(world):
    _, overrides = world
    recipe = load_recipe("demo", [*overrides, "run.output=2026-01-01", "teacher.model=1e5", "data.corpus='a b'"])
    assert (recipe.run.output, recipe.teacher.model, recipe.data.corpus) == ("2026-01-01", "1e5", "a b")
    assert load_recipe("demo", ["run.output=~/run"]).run.output == str(Path.home() / "run")


def test_deepspeed_configurations_with_wrong_values(world):
    folder, _ = world
    cases = passed = 0
    path = folder / "stranger.json"
    path.touch()
    with nothing_written(folder):
        for name in deepspeed_config.shipped_ds_configs():
            config = deepspeed_config.read_ds_config(name)
            for place in places(config):
                for value in WRONG if place else ():
                    cases += 1
                    path.write_text(json.dumps(changed(config, place, value)))
                    passed += accepted(lambda: deepspeed_config.check(deepspeed_config.read_ds_config(str(path))))
    assert cases > 1000 and passed < cases / 2


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimisation": {"stage": 1}},
        {"zero_optimization": {"stage": 1, "overlap_com": True}},
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"stage": "1"}},
        {"zero_optimization": {"stage": True}},
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        {"zero_optimization": None},
        {"bf16": {"enabled": "no"}},
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        {"bf16": True},
        {"elasticity": {"enabled": True}},
        {"curriculum_learning": {"enabled": True}},
        {"checkpoint": {"load_universal": True}},
        {"optimizer": {"type": "Adam"}},
        {"communication_data_type": "fp8"},
        {"communication_data_type": None},
        {"data_types": {"grad_accum_dtype": "int8"}},
        {"data_types": {"grad_accumulation_dtype": "fp32"}},
        {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": 1}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1 << 62}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        {"activation_checkpointing": {"enabled": False}},
        {"prescale_gradients": "false"},
        {"steps_per_print": 0},
        {"aio": {"block_sise": 1}},
        {"wandb": {"enabled": True}} if importlib.util.find_spec("wandb") is None else {"wandb": 1},
        {"train_micro_batch_size_per_gpu": True},
        {"train_micro_batch_size_per_gpu": 10**18},
        {"tensorboard": {"enabled": "perhaps"}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
    ],
)
def test_wrong_deepspeed_configurations_are_refused(config):
    with pytest.raises(UserError):
        config = {"train_micro_batch_size_per_gpu": 2, **config}
        deepspeed_config.check(config)
        deepspeed_config.merge(load_recipe("demo"), config, world_size=1)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "\ufeff{}", "\x00"]
)
def test_files_that_are_no_configurations(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert not accepted(deepspeed_config.read_ds_config, str(tmp_path / "config.json"))


def test_records_of_checkpoints_with_wrong_values(world, tmp_path):
    """A checkpoint is passed over, or its weights are those that were saved."""
    folder, _ = world
    run = shutil.copytree(folder / "run", tmp_path / "run")
    record = run / "checkpoints" / "step-00000004" / records.RECORD
    whole, expected = json.loads(record.read_text()), checkpoint.read_weights(record.parent)
    for place in places(whole):
        for value in WRONG if place and place[0] != "recipe" else ():
            record.write_text(json.dumps(changed(whole, place, value)))
            found = records.why_torn(record.parent, checksums=True)
            assert found is None or isinstance(found, str)
            accepted(records.find, run / "checkpoints", "auto", log=lambda line: None)
            with contextlib.suppress(UserError):
                weights = FinishedRun.open(run).student().state_dict()
                assert all(torch.equal(weights[name], expected[name]) for name in expected) or found


def test_damaged_files_of_checkpoints(world, tmp_path):
    """Cut, flipped or foreign, with a record that fits: refused, and never run."""
    folder, _ = world
    run = shutil.copytree(folder / "run", tmp_path / "run")
    target = run / "checkpoints" / "step-00000004"
    files, chance = {path: path.read_bytes() for path in target.glob("*.pt")}, random.Random(1)
    record = json.loads((target / records.RECORD).read_text())
    for number in range(120):
        path = chance.choice(sorted(files))
        data = bytearray(files[path])
        if number % 3 == 0:
            del data[chance.randrange(len(data)) :]
        elif number % 3 == 1:
            for _ in range(20):  # in the pickle, at the front, and anywhere
                data[chance.randrange(min(len(data), 5000 if number % 2 else len(data)))] ^= 1 << chance.randrange(8)
        else:
            data = bytearray(chance.randbytes(chance.randrange(3000)))
        path.write_bytes(data)
        assert records.why_torn(target, checksums=True)
        assert not accepted(checkpoint.read_weights, target)
        facts = {"bytes": len(data), "sha256": durable.sha256(path)}
        forged = {**record, "files": {**record["files"], path.name: facts}}
        (target / records.RECORD).write_text(json.dumps(forged))
        accepted(lambda: FinishedRun.open(run).student())
        path.write_bytes(files[path])
        (target / records.RECORD).write_text(json.dumps(record))


def test_models_with_wrong_values(world, tmp_path):
    folder, _ = world
    teacher = shutil.copytree(folder / "teacher", tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    numbers = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
        "model_type",
    )
    numbers += ("max_position_embeddings", "hidden_act", "auto_map", "layer_norm_eps", "pad_token_id")
    for name in numbers:
        for value in [*WRONG, ...]:
            other = {**config, name: value} if value is not ... else {k: v for k, v in config.items() if k != name}
            (teacher / "config.json").write_text(json.dumps(other))
            if accepted(teacher_config, str(teacher)) and value not in (10**18, 10**30):
                accepted(load_teacher, str(teacher), layer=2)
    for text in ("", "{", "[]", "null", "7", '{"model_type": "gpt2"}', '{"auto_map": {"AutoConfig": "code.Config"}}'):
        (teacher / "config.json").write_text(text)
        assert not accepted(teacher_config, str(teacher))
    (teacher / "config.json").write_text(json.dumps(config))
    weights, chance = (teacher / "model.safetensors").read_bytes(), random.Random(1)
    for number in range(40):
        data = bytearray(weights[: chance.randrange(len(weights))] if number % 2 else weights)
        for _ in range(0 if number % 2 else 4):
            data[chance.randrange(2000)] ^= 1 << chance.randrange(8)
        (teacher / "model.safetensors").write_bytes(data)
        accepted(load_teacher, str(teacher), layer=2)


def test_probes_of_every_wrong_kind(tmp_path):
    path = tmp_path / "probe.jsonl"
    good = '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n' * 4
    bad = [
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"text": "a"}',
        '{"label": 1}',
        '{"text": 1, "label": 1}',
        "\x00",
        '{"text": null}',
    ]
    for line in bad:
        path.write_text(good + line + "\n")
        assert accepted(read_probe, path, texts=8, seed=1) == (line == ""), line
    path.write_bytes(b"\xff\xfe")
    assert not accepted(read_probe, path, texts=8, seed=1)
    for name in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises((UserError, OSError)):
            read_probe(name, texts=8, seed=1)
