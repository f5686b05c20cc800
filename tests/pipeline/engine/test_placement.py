import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from data_prep.errors import UserError
from pipeline.config import Teacher
from pipeline.encoders.architectures import ARCHITECTURES
from pipeline.engine.placement import choose, count_parameters, weight_files
from tests.pipeline.encoders.test_models import small_config

RANKS = textwrap.dedent(
    """
    import json, sys, torch
    from pathlib import Path
    from launch.status import end_process
    from pipeline.engine import process_group
    from pipeline.config import Teacher
    from pipeline.engine.placement import Placement, start_teacher
    process_group.init_distributed()
    rank = torch.distributed.get_rank()
    results = {}
    for case in json.loads(Path(sys.argv[1]).read_text()):
        settings = Teacher(model=case["model"], layer=case["layer"])
        precision = {} if case["precision"] == "fp32" else {"bf16": {"enabled": True}}
        replica = start_teacher(settings, Placement(kind="replica", reason=""), precision)
        parted = start_teacher(settings, Placement(kind=case["kind"], reason=""), precision)
        ids = torch.randint(5, case["vocabulary"], (3, 37), generator=torch.Generator().manual_seed(rank))
        mask = torch.arange(37)[None, :] < torch.tensor([37, 20, 1])[:, None]
        with torch.no_grad():
            ours, theirs = parted(input_ids=ids, attention_mask=mask), replica(input_ids=ids, attention_mask=mask)
        held = sum(p.ds_tensor.numel() for p in parted.module.parameters())
        result = {
            "same": all(torch.equal(a, b) for a, b in zip(ours, theirs)),
            "types": sorted({str(p.dtype) for m in (parted.module, replica) for p in m.parameters()}),
            "held": held / sum(p.numel() for p in replica.parameters()),
        }
        found = [None, None]
        torch.distributed.all_gather_object(found, result)
        results[case["name"]] = found
        parted.destroy()
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    process_group.leave_process_group()
    end_process(0)
    """
)
KINDS, PRECISIONS = ("zero3", "zero3_cpu"), ("fp32", "bf16")


@pytest.fixture(scope="module")
def real(samples, tmp_path_factory):
    """ZeRO-3 beside the replica: the real teacher, in memory of GPUs or of the host."""
    teacher = dict(model=str(samples.teacher), layer=5, vocabulary=30_000, precision="fp32")
    return compare(tmp_path_factory.mktemp("real"), [dict(name=kind, kind=kind, **teacher) for kind in KINDS])


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """The same of a random teacher of every architecture, in both precisions."""
    folder, cases = tmp_path_factory.mktemp("random"), []
    for model_type in ARCHITECTURES:
        torch.manual_seed(0)
        model = AutoModel.from_config(small_config(model_type))
        model.save_pretrained(folder / model_type)
        small = dict(model=str(folder / model_type), layer=3, vocabulary=model.config.vocab_size, kind="zero3")
        cases += [dict(name=f"{model_type}-{precision}", precision=precision, **small) for precision in PRECISIONS]
    return compare(folder, cases)


def compare(folder: Path, cases: list[dict]) -> dict[str, list[dict]]:
    """What each of two ranks found, by the cases' names."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += [sys.executable, "-c", RANKS, folder / "cases.json", folder / "results.json"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_partitioned_teacher_gives_the_replicas_projections(kind, real):
    """Each of two ranks feeds its own rows."""
    for result in real[kind]:
        assert result["same"] and result["types"] == ["torch.float32"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_of_every_architecture_too(model_type, precision, random):
    """The weights have the precision asked for on any processor."""
    for result in random[f"{model_type}-{precision}"]:
        assert result["same"] and result["types"] == ["torch.bfloat16" if precision == "bf16" else "torch.float32"]


def test_each_rank_holds_its_share_of_a_partitioned_teacher(real):
    shares = [result["held"] for kind in KINDS for result in real[kind]]
    assert all(0.49 < share < 0.56 for share in shares)


def test_auto_decides_by_memory_and_says_why(samples):
    teacher = Teacher(model=str(samples.teacher), layer=6)
    size = count_parameters(teacher) * 4
    expected = [
        (8, 4, "replica"),
        (3, 4, "zero3"),
        (3, 1, "zero3_cpu"),
        (0.5, 4, "zero3_cpu"),
    ]
    for free, ranks, kind in expected:
        placement = choose(teacher, dtype=torch.float32, free_bytes=int(free * size), world_size=ranks)
        assert placement.kind == kind and "M parameters" in placement.reason
    fixed = Teacher(model="anything", layer=1, placement="zero3")
    assert choose(fixed, dtype=torch.float32, free_bytes=0, world_size=1).kind == "zero3"


def test_only_the_layers_that_run_are_counted(samples):
    counts = [count_parameters(Teacher(model=str(samples.teacher), layer=layer)) for layer in (1, 2, 3)]
    assert counts[1] - counts[0] == counts[2] - counts[1] > 0


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot find the safetensors weights"):
        weight_files(str(tmp_path))
