import dataclasses
import re

import pytest

from data_prep.errors import UserError
from pipeline import recipes
from pipeline.config import Recipe
from pipeline.engine.records import differences
from pipeline.recipes import load_recipe, load_recipes, shipped_recipes, write_recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_survive_writing(name, tmp_path):
    recipe = load_recipe(name)
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe


def test_overrides_take_toml_values_and_plain_words(tmp_path):
    overrides = ["optimizer.peak_lr=3e-4", "run.output=/data/a b", "relations.pairs.qk=0.5", "student.shape=6x384"]
    recipe = load_recipe("demo", overrides)
    assert recipe.optimizer.peak_lr == 3e-4
    assert recipe.run.output == "/data/a b"
    assert recipe.relations.pairs["qk"] == 0.5 and recipe.relations.pairs["qq"] == 1.0
    assert recipe.student.shape == "6x384"


def test_strings_are_filled_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH_FOLDER", "/scratch")
    assert load_recipe("demo", ["run.output=${SCRATCH_FOLDER}/run"]).run.output == "/scratch/run"
    monkeypatch.setenv("MINILM_HOME", str(tmp_path))
    assert load_recipe("demo").data.corpus == f"{tmp_path}/demo/corpus"
    with pytest.raises(UserError, match="NO_SUCH_NAME"):
        load_recipe("demo", ["run.output=${NO_SUCH_NAME}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.peak_learning_rate=1", "optimizer.peak_learning_rate: there is no such key"),
        ("optimiser.peak_lr=1", "optimiser: there is no such key"),
        ("optimizer.steps=many", "optimizer.steps: .*integer.*'many'"),
        ("optimizer.steps=1.5", "optimizer.steps: .*integer"),
        ("optimizer.steps=0", "optimizer.steps: .*greater than 0"),
        ("student.shape=tiny", "student.shape: "),
        ("relations.pairs.qx=1.0", "relations.pairs.qx"),
        ("student.dropout=1.0", "student.dropout: .*less than 1"),
        ("optimizer.schedule=constant", "optimizer.schedule: .*'linear' or 'cosine'"),
        ("peak_lr=1", "is not section.key=value"),
        ("optimizer.peak_lr", "is not section.key=value"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("demo", [override])


def test_missing_key_and_missing_file_are_named(tmp_path):
    text = (recipes.RECIPES / "demo.toml").read_text().replace("layer = 6", "")
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match="teacher.layer: is missing"):
        load_recipe(str(tmp_path / "mine.toml"))
    with pytest.raises(UserError, match="no recipe 'demmo': .*demo"):
        load_recipe("demmo")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(UserError, match="is not a TOML file"):
        load_recipe(str(tmp_path / "broken.toml"))


def test_only_what_decides_the_weights_counts_as_another_recipe():
    recipe = load_recipe("demo")
    same = load_recipe("demo", ["run.output=/elsewhere", "checkpoint.every_steps=7", "logging.probe=texts.jsonl"])
    other = load_recipe("demo", ["optimizer.peak_lr=0.5"])
    assert same.fingerprint() == recipe.fingerprint() != other.fingerprint()
    assert differences(other.learned(), recipe.learned()) == [
        f"optimizer.peak_lr: 0.5 here, {recipe.optimizer.peak_lr} there"
    ]


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("demo").optimizer.steps = 3
    assert isinstance(load_recipe("demo"), Recipe)


def test_what_varies_becomes_a_run_of_each_combination():
    recipes = load_recipes(
        ["demo"], ["run.output=/s"], ["teacher.layer=4,6", "relations.pairs={qq = 1.0, kk = 2.0},{vv=1.0}"]
    )
    assert [(r.teacher.layer, r.relations.pairs) for r in recipes] == [
        (layer, pairs) for layer in (4, 6) for pairs in ({"qq": 1.0, "kk": 2.0}, {"vv": 1.0})
    ]
    assert recipes[0].run.output == "/s/teacher.layer=4,relations.pairs={qq = 1.0, kk = 2.0}"
    assert len({recipe.run.output for recipe in recipes}) == 4
    assert load_recipes(["demo"]) == [load_recipe("demo")]


def test_several_recipes_under_one_output_get_folders_of_their_own():
    names = ["roberta-large-12x384", "roberta-large-6x384"]
    recipes = load_recipes(names, ["run.output=/s", "data.corpus=c"], ["optimizer.peak_lr=3e-4"])
    assert [recipe.run.output for recipe in recipes] == [f"/s/{name}/optimizer.peak_lr=3e-4" for name in names]


@pytest.mark.parametrize(
    "vary", ["teacher.layer", "teacher.layer=", "layer=1,2", "teacher.layer=1,1", "teacher.layer=1,,2", "run.seed=1,2"]
)
def test_what_cannot_vary_is_said(vary):
    with pytest.raises(UserError, match=re.escape(f"--vary {vary!r}")):
        load_recipes(["demo"], [], [vary])
