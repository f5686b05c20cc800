"""Which recipes may train side by side, and from which step on."""

import os
import shutil

import pytest

from data_prep.errors import UserError
from data_prep.shards import Corpus
from pipeline.engine import deepspeed_config, records
from pipeline.recipes import load_recipe, load_recipes, shipped_recipes
from pipeline.training import company, run_folder

CPU = deepspeed_config.read_ds_config("cpu")


def test_students_of_one_teacher_may_differ_in_what_is_their_own():
    vary = ["student.shape=2x96,3x192", "relations.heads=12,24", "teacher.layer=3,6", "optimizer.peak_lr=1e-3,2e-3"]
    recipes = load_recipes(["demo"], [], vary)
    company.check(recipes, CPU)
    assert len(recipes) == 16 and company.teacher_layers(recipes) == (3, 6)
    assert company.names(recipes)[0] == "student.shape=2x96,relations.heads=12,teacher.layer=3,optimizer.peak_lr=1e-3"


@pytest.mark.parametrize("teacher", ["bert-base", "bert-large", "roberta-large", "xlmr-large"])
def test_published_students_of_a_teacher_train_side_by_side(teacher):
    names = [name for name in shipped_recipes() if name.startswith(teacher)]
    assert len(names) >= 2
    company.check(load_recipes(names), CPU)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.seed=2", "run.seed: 1 in recipe 1, 2 in recipe 2"),
        ("data.seq_tokens=32", "data.seq_tokens: 64 in recipe 1, 32 in recipe 2"),
        ("optimizer.steps=9", "optimizer.steps: 300 in recipe 1, 9 in recipe 2"),
        ("teacher.model=other", "teacher.model: "),
        ("checkpoint.every_steps=7", "checkpoint.every_steps: 150 in recipe 1, 7 in recipe 2"),
        ("data.weights={a=1.0}", "data.weights: None in recipe 1, {'a': 1.0} in recipe 2"),
    ],
)
def test_what_they_do_not_share_is_said(override, said):
    pair = [load_recipe("demo"), load_recipe("demo", ["run.output=/other", override])]
    with pytest.raises(UserError, match="cannot train side by side") as error:
        company.check(pair, CPU)
    assert said in str(error.value)


@pytest.mark.parametrize("output", ["/runs/a", "/runs/a/b", "/runs"])
def test_each_run_needs_a_folder_of_its_own(output):
    pair = [
        load_recipe("demo", [f"run.output={folder}", f"student.shape={2 + i}x192"])
        for i, folder in enumerate(["/runs/a", output])
    ]
    with pytest.raises(UserError, match="each needs its own"):
        company.check(pair, CPU)


def test_each_student_logs_and_swaps_into_a_folder_of_its_own(tmp_path):
    config = deepspeed_config.read_ds_config("zero3_nvme") | {
        "csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "me"}
    }
    config["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    recipes = load_recipes(["demo"], [], ["student.shape=2x96,3x192"])
    made = company.ds_configs(recipes, config, world_size=1, names=company.names(recipes))
    assert [c["csv_monitor"]["job_name"] for c in made] == ["me/student.shape=2x96", "me/student.shape=3x192"]
    folders = [c["zero_optimization"]["offload_param"]["nvme_path"] for c in made]
    assert folders == [str(tmp_path / "student.shape=2x96"), str(tmp_path / "student.shape=3x192")]
    with pytest.raises(UserError, match="wandb knows one run a process"):
        company.check(recipes, config | {"wandb": {"enabled": True}})


@pytest.fixture
def two(runs, corpus_folder, tmp_path):
    """Two runs with whole checkpoints at steps 3 and 6, their recipes, and their corpus."""
    # Links: files are taken away here, and none is written into.
    folders = [shutil.copytree(runs.unbroken, tmp_path / name, copy_function=os.link) for name in ("a", "b")]
    recipes = [load_recipe(str(f / "recipe.toml"), [f"run.output={f}"]) for f in folders]
    return folders, recipes, Corpus.open(corpus_folder)


def lose(folder, step):
    (folder / "checkpoints" / records.tag_of(step) / records.RECORD).unlink()


def steps_of(found):
    return [record and record.step for record in found]


def test_all_go_on_from_the_newest_step_that_is_whole_in_all(two):
    folders, recipes, corpus = two
    assert steps_of(company.find_checkpoints(recipes, corpus, "auto")) == [6, 6]
    lose(folders[1], 6)  # a kill while the second was saved
    assert steps_of(company.find_checkpoints(recipes, corpus, "auto")) == [3, 3]
    assert steps_of(company.find_checkpoints(recipes, corpus, "3")) == [3, 3]
    with pytest.raises(UserError, match="step 6 cannot be used"):
        company.find_checkpoints(recipes, corpus, "6")


def test_runs_further_apart_than_a_kill_leaves_them_are_named(two):
    folders, recipes, corpus = two
    shutil.rmtree(folders[1] / "checkpoints")
    with pytest.raises(UserError, match="do not stand at one step") as error:
        company.find_checkpoints(recipes, corpus, "auto")
    assert f"{folders[0]}: step 6" in str(error.value) and f"{folders[1]}: no checkpoint" in str(error.value)
    shutil.rmtree(folders[0] / "checkpoints" / "step-00000006")  # a kill in the first save of all
    assert steps_of(company.find_checkpoints(recipes, corpus, "auto")) == [None, None]


def test_a_run_that_gave_up_is_left_out_of_company_only(two):
    folders, recipes, _ = two
    run_folder.mark_ended(folders[0], step=6, reason="not finite")
    assert company.still_running(recipes) == [1]
    assert company.still_running(recipes[:1]) == [0]
