"""What `minilm plan` says, against real models and against itself; no GPU, hub, weights or corpus."""

import json
import sys
from unittest.mock import patch

import pytest
from transformers import AutoModel

from launch import cli
from pipeline import devices
from pipeline.encoders.models import load_teacher
from pipeline.engine import deepspeed_config
from pipeline.planning import rates, request
from pipeline.planning.models import KNOWN_TEACHERS, models_of, sizes_of
from pipeline.planning.plan import Machines, Planner
from pipeline.recipes import load_recipe, shipped_recipes
from pipeline.training.build import fresh_student

H100 = rates.of_device("h100-sxm", devices.named("h100-sxm"), half=True, network=50e9)
TINY = ["student.shape=2x48", "student.heads=4", "relations.heads=12", "data.seq_tokens=32", "teacher.layer=2"]


@pytest.fixture(scope="module")
def planner():
    return Planner([load_recipe("bert-base-6x384", ["data.seq_tokens=128", "teacher.layer=2", "student.shape=3x192"])])


def machines(nodes=1, gpus=1, own=H100):
    return Machines(nodes=nodes, gpus_per_node=gpus, rates=own)


def test_parameters_are_those_of_real_models(samples):
    recipe = load_recipe("demo", [f"teacher.model={samples.teacher}", "teacher.layer=4"])
    models, teacher, student = models_of(recipe), load_teacher(str(samples.teacher), layer=4), fresh_student(recipe)
    assert models.known_from == "its folder"
    assert models.teacher_parameters == sum(p.numel() for p in teacher.parameters())
    assert models.student_parameters == sum(p.numel() for p in student.parameters())
    assert models.trained == [p.numel() for p in student.parameters() if p.requires_grad]
    assert sum(models.trained) + models.frozen_parameters == models.student_parameters
    whole = AutoModel.from_pretrained(samples.teacher, add_pooling_layer=False)
    assert models.whole_teacher == sum(p.numel() for p in whole.parameters())


def test_teachers_of_all_shipped_recipes_are_known(samples):
    """The table of sizes: by the published numbers of parameters, and the sample teacher's by its own configuration."""
    published = {"bert-base-uncased": 109, "bert-large-uncased": 334, "roberta-large": 354, "xlm-roberta-large": 559}
    for name in shipped_recipes():
        recipe = load_recipe(name)
        teacher = recipe.teacher.model.rpartition("/")[2]
        assert teacher in KNOWN_TEACHERS
        if teacher in published:
            config, known_from = sizes_of(recipe)
            assert "table" in known_from or "cache" in known_from
            embeddings = (config.vocab_size + config.max_position_embeddings) * config.hidden_size
            layers = 12 * config.hidden_size**2 * config.num_hidden_layers
            assert (embeddings + layers) / 1e6 == pytest.approx(published[teacher], rel=0.01)
    real, _ = sizes_of(load_recipe("demo", [f"teacher.model={samples.teacher}"]))
    kind, sizes = KNOWN_TEACHERS["all-MiniLM-L6-v2"]
    assert real.model_type == kind and {key: getattr(real, key) for key in sizes} == sizes


def test_trimmed_vocabularies_count():
    recipe = load_recipe("bert-base-6x384", TINY)
    whole, trimmed = models_of(recipe), models_of(recipe, vocabulary=10_000)
    assert whole.student_parameters - trimmed.student_parameters == (30_522 - 10_000) * 48


def test_more_of_anything_takes_more(planner):
    config = deepspeed_config.read_ds_config("zero1")

    def option(ranks=8, name="zero1", placement="replica", micro=8, **others):
        chosen = {**deepspeed_config.read_ds_config(name), "train_micro_batch_size_per_gpu": micro}
        return planner.option(name, chosen, placement, machines(gpus=ranks), **others)

    parts = {ranks: option(ranks).memory.device for ranks in (1, 2, 8)}
    assert parts[1]["optimizer"] == pytest.approx(2 * parts[2]["optimizer"], rel=1e-4)
    assert parts[2]["optimizer"] == pytest.approx(4 * parts[8]["optimizer"], rel=1e-4)
    trained = sum(planner.students[0].trained)
    assert parts[1]["optimizer"] == 12 * trained
    assert option(micro=32).memory.device["gradients"] == 6 * trained  # where the update is not the fullest moment
    assert option(micro=4).memory.total < option(micro=8).memory.total < option(micro=16).memory.total
    assert option(placement="zero3").memory.device["teacher"] > 0
    assert option(name="zero2").memory.device["gradients"] < option().memory.device["gradients"]
    offloaded = option(name="zero2_offload").memory
    assert offloaded.device["optimizer"] == 0 and offloaded.host["optimizer"] >= 12 * trained // 8
    again = planner.option("own", {**config, "activation_checkpointing": {}}, "replica", machines(gpus=8))
    assert again.memory.device["activations"] < option(micro=32).memory.device["activations"]
    for found in (option(), offloaded and option(name="zero3")):
        assert found.memory.total == max(found.memory.phases.values())


def test_bytes_on_the_wire_are_those_of_the_configurations_page(planner):
    """ds_configs/README.md: measured bytes a trained parameter, of two ranks and two micro-batches."""
    trained = sum(planner.students[0].trained)
    whole = planner.students[0].student_parameters
    for name, numbers in {"zero0": 4.0, "zero1": 5.0, "zero2": 9.0}.items():
        config = {**deepspeed_config.read_ds_config(name), "train_micro_batch_size_per_gpu": 64}
        option = planner.option(name, config, "replica", machines(gpus=2))
        assert option.config["gradient_accumulation_steps"] == 2
        assert option.step.wire_bytes == pytest.approx(numbers * trained, rel=0.01)
    assert planner.option("zero1", config, "replica", machines()).step.wire_bytes == 0
    assert whole > trained


def test_a_plan_holds_together(planner, tmp_path):
    plan = planner.plan(machines(nodes=4, gpus=8))
    assert plan.chosen.name == "zero1" and plan.chosen.placement == "replica"
    times = {point.ranks: point.step and point.step.total for point in plan.curve}
    assert times[512] is None and times[1] > times[8] > times[32]
    assert times[1] / times[256] < 100  # a global batch of 256: what does not shrink binds
    assert plan.curve[8].step.binds != "computing"
    totals, step = plan.totals, plan.chosen.step
    assert totals.seconds > 400_000 * step.total and totals.gpu_hours == pytest.approx(totals.seconds * 32 / 3600)
    assert totals.tokens == 400_000 * 256 * 128
    written = planner.written(plan.chosen)
    deepspeed_config.check(written)
    assert deepspeed_config.merge(planner.recipe, written, world_size=32)["train_micro_batch_size_per_gpu"] == 8
    slow = planner.plan(machines(own=rates.of_device("l4", devices.named("l4"), half=True, network=1e9)))
    assert slow.chosen.step.total > 5 * planner.plan(machines()).chosen.step.total


def test_students_side_by_side_share_the_teachers_pass():
    recipe = load_recipe("bert-base-6x384", TINY)
    config = deepspeed_config.read_ds_config("zero1")
    one, three = (Planner([recipe] * count).option("zero1", config, "replica", machines()) for count in (1, 3))
    assert three.step.seconds["teacher"] == one.step.seconds["teacher"]
    assert three.step.seconds["backward"] == pytest.approx(3 * one.step.seconds["backward"])
    assert three.memory.device["teacher"] == one.memory.device["teacher"]
    assert three.memory.device["optimizer"] == 3 * one.memory.device["optimizer"]
    assert one.step.flops < three.step.flops < 3 * one.step.flops


def test_every_configuration_that_ships_can_be_planned():
    planner = Planner([load_recipe("bert-base-6x384", TINY)])
    for name in deepspeed_config.shipped_ds_configs():
        option = planner.option(name, deepspeed_config.read_ds_config(name), "replica", machines(gpus=2))
        assert option.fits and option.step.total > 0, name


def test_devices_have_plausible_figures():
    for key, device in devices.DEVICES.items():
        assert 50 <= device.tera <= 3000 and 100 <= device.bandwidth <= 10_000 and device.source, key
        assert devices.recognised(f"NVIDIA {device.words}") is device
    peaks = [devices.named(key).tera for key in ("h100-sxm", "h100-nvl", "h100-pcie")]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3


def test_the_command(tmp_path, capsys):
    base = ["plan", "--recipe", "bert-base-6x384", *TINY, "--gpu", "h100-sxm"]
    files = [tmp_path / name for name in ("curve.svg", "ds.json", "plan.json")]
    asked = ["--plot", files[0], "--write", files[1], "--json", files[2], "--price", "2", "--text", "16GB"]
    said = run(capsys, 0, *base, "--gpus-per-node", "8", *asked)
    assert "zero1" in said.out and "at 2 a GPU-hour" in said.out and "days on one core" in said.out
    assert files[0].read_text().startswith("<svg") and "backward" in files[0].read_text()
    values = json.loads(files[2].read_text())
    assert values["chosen"]["fits"] and values["totals"]["cost"] == pytest.approx(2 * values["totals"]["gpu_hours"])
    deepspeed_config.check(json.loads(files[1].read_text()))
    refused = {
        ("--gpu", "h1000"): "known are gb300",
        ("--gpus-per-node", "3"): "cannot be shared evenly by 3 ranks",
        ("--plot", "a.png"): "ends in .svg",
        ("--text", "much"): "is no size",
        ("--vocabulary", "1000000"): "has 30,522 tokens",
        ("relations.heads=7",): "does not divide",
        ("--recipe", "bert-large-6x384"): "cannot train side by side",
        ("--ds-config", "zero9"): "there is no DeepSpeed configuration",
        ("teacher.model=nobody/nothing",): "nobody/nothing",
        ("--gpu", "l4", "--ds-config", "zero1", "student.shape=4x9600"): "no configuration fits",
    }
    for words, expected in refused.items():
        assert expected in run(capsys, 2, *base, *words).err, words
    assert not (tmp_path / "a.png").exists()


def test_this_machine_is_measured():
    recipe = load_recipe("bert-base-6x384", [*TINY, "optimizer.global_batch_samples=4"])
    with patch.object(rates, "MEASURED_SECONDS", 0.01):
        _, plan = request.plan_for([recipe], gpu="cpu", gpus_per_node=2)
    assert plan.chosen.name == "cpu" and plan.machines.rates.is_cpu
    assert plan.machines.rates.products > 1e8 and plan.chosen.step.total > 0


def run(capsys, code, *arguments):
    with patch.object(sys, "argv", ["minilm", *map(str, arguments)]):
        if code:
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == code
        else:
            cli.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said
