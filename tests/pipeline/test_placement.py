import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from pipeline.config import Teacher
from pipeline.placement import choose, count_parameters, weight_files

RANKS = textwrap.dedent(
    """
    import json, sys, torch
    from pipeline import engine
    from pipeline.config import Teacher
    from pipeline.placement import Placement, start_teacher
    kind, model = sys.argv[1:3]
    engine.init_distributed()
    settings = Teacher(model=model, layer=5)
    replica = start_teacher(settings, Placement(kind="replica", reason=""), {})
    parted = start_teacher(settings, Placement(kind=kind, reason=""), {})
    ids = torch.randint(1000, 30000, (3, 37), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    mask = torch.arange(37)[None, :] < torch.tensor([37, 20, 1])[:, None]
    with torch.no_grad():
        ours, theirs = parted(input_ids=ids, attention_mask=mask), replica(input_ids=ids, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), kind
    held = sum(p.ds_tensor.numel() for p in parted.module.parameters())
    whole = sum(p.numel() for p in replica.parameters())
    shares = [None, None]
    torch.distributed.all_gather_object(shares, held / whole)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"held": shares}), flush=True)
    torch.distributed.destroy_process_group()
    """
)


@pytest.mark.parametrize("kind", ["zero3", "zero3_cpu"])
def test_partitioned_teacher_gives_the_replicas_projections(kind, samples, port):
    """Each of two ranks feeds its own rows, and holds about half of the weights."""
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node=2", f"--master-port={port}", "--no-python"]
    command += [sys.executable, "-c", RANKS, kind, samples.teacher]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-4000:]
    (line,) = [line for line in process.stdout.splitlines() if '"held"' in line]
    assert all(0.49 < share < 0.56 for share in json.loads(line)["held"])


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
