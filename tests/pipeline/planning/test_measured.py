"""A plan beside what real runs need and take on this machine's processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.planning import rates
from pipeline.planning.plan import Machines, Planner
from pipeline.recipes import load_recipe
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[3]
SHAPES = {
    "deep": ["student.shape=6x384", "student.feed_forward=1536", "data.seq_tokens=128"],
    "long": ["student.shape=3x192", "data.seq_tokens=256", "optimizer.global_batch_samples=64"],
    "heavy": ["student.shape=4x768", "student.feed_forward=3072", "data.seq_tokens=64"],
}
STAGES = (1, 2, 3)
RANKS = 2


def overrides(samples, corpus: Path, shape: str) -> list[str]:
    own = ["student.init=random", *SHAPES[shape]]  # a student may be wider than its teacher
    return [f"teacher.model={samples.teacher}", f"data.corpus={corpus}", *own]


def ds_config(stage: int) -> dict:
    return {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": stage}}


@pytest.mark.exhaustive
def test_memory_is_what_runs_need(samples, corpus_folder, tmp_path):
    """Three shapes at three stages on two ranks: within a tenth of the peak of their second step (docs/plan.md)."""
    ratios = {}
    for shape in SHAPES:
        for stage in STAGES:
            folder = tmp_path / f"{shape}-{stage}"
            ratios[shape, stage] = planned_to_needed(folder, ds_config(stage), overrides(samples, corpus_folder, shape))
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_memory_is_what_a_run_needs(samples, corpus_folder, tmp_path):
    ratio = planned_to_needed(tmp_path / "job", ds_config(1), overrides(samples, corpus_folder, "long"))
    assert 0.9 <= ratio <= 1.1


def planned_to_needed(folder: Path, config: dict, overrides: list[str]) -> float:
    """Planned bytes of a rank over those of a real run in processes of its own.

    The allocator is told to hand freed memory back, so that the peak is that of tensors that are held at one time.
    """
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"config": config, "overrides": overrides}))
    worker = Path(__file__).with_name("memory_worker.py")
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", f"--master-port={free_port()}"]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", "65536"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *launcher, worker, folder]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    peak = json.loads((folder / "peak.json").read_text())
    here = Machines(nodes=1, gpus_per_node=RANKS, rates=on_a_cpu())
    planned = Planner([load_recipe("demo", overrides)]).option("own", config, "replica", here).memory.total
    print(f"{folder.name}: {planned / 2**20:.0f} MiB planned, {peak / 2**20:.0f} MiB needed")
    return planned / peak


def on_a_cpu() -> rates.Rates:
    """Any figures: only that it is a CPU counts."""
    names = ("products", "bandwidth", "exponentials", "link", "network", "in_cache")
    return rates.Rates(name="cpu", memory=1 << 40, source="", masks=1.0, **dict.fromkeys(names, 1.0))
