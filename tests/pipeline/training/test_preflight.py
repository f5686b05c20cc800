import pytest

from data_prep.errors import UserError
from pipeline.engine.deepspeed_config import read_ds_config
from pipeline.recipes import load_recipe
from pipeline.training.preflight import check, check_against_teacher
from tests import toy


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("relations.heads=40", "does not divide the teacher's hidden size 384"),
        ("student.shape=3x180", "does not divide the student's hidden size 180"),
        ("student.heads=7", "student.heads = 7"),
        ("teacher.layer=7", "has layers 1 to 6"),
        ("data.seq_tokens=1024", "the teacher has 512 positions"),
        ("optimizer.warmup_steps=100000", "exceeds optimizer.steps"),
        ("relations.layers=[[4, 2, 1.0]]", r"must rise and end with .*\[6, 3\]"),
        ("relations.layers=[[4, 3, 1.0], [6, 3, 1.0]]", "must rise"),
    ],
)
def test_what_the_teacher_makes_impossible_is_refused(override, message):
    sizes = dict(layers=6, hidden=384, positions=512)
    check_against_teacher(load_recipe("demo"), **sizes)
    with pytest.raises(UserError, match=message):
        check_against_teacher(load_recipe("demo", [override]), **sizes)


def test_labelled_texts_must_be_usable_and_have_held_out_samples_beside_them(toy_overrides, samples, tmp_path):
    def refused(message, *overrides):
        with pytest.raises(UserError, match=message):
            check([load_recipe("demo", [*toy_overrides, *overrides])], read_ds_config("cpu"), world_size=1)

    refused("logging.probe: there is no probe file .*none", f"logging.probe={tmp_path / 'none'}")
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    refused("logging.probe: .*bad.jsonl, line 2", f"logging.probe={bad}")
    good.write_text('{"text": "a", "label": 1}\n{"text": "b", "topic": 2}\n' * 2)
    check([load_recipe("demo", [*toy_overrides, f"logging.probe={good}"])], read_ds_config("cpu"), world_size=1)
    teacher = next(o for o in toy_overrides if o.startswith("teacher.model=")).partition("=")[2]
    corpus = toy.make_corpus(tmp_path / "corpus", teacher, samples.leads(), documents=50, validation_fraction=0.0)
    refused("has no validation split", f"logging.probe={good}", f"data.corpus={corpus}")


def test_a_student_wider_than_its_teacher_is_refused_before_weights_are_read(toy_overrides):
    for init in ("slice", "pca", "embeddings"):
        recipe = load_recipe("demo", [*toy_overrides, f"student.init={init}", "student.shape=2x96"])
        with pytest.raises(UserError, match=f"student.init = '{init}' needs a student no wider"):
            check([recipe], read_ds_config("cpu"), world_size=1)


def test_folders_on_nvme_must_exist(tmp_path):
    recipe = load_recipe("demo")
    with pytest.raises(UserError, match="offload_param.nvme_path = '/local_nvme': expected a folder that exists"):
        check([recipe], read_ds_config("zero3_nvme"), world_size=1)
    recipe = load_recipe("demo", ["teacher.placement=zero3_nvme", f"teacher.nvme_path={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="teacher.nvme_path = .*none'"):
        check([recipe], read_ds_config("cpu"), world_size=1)
