"""Lists of runs trained by one process group, under every DeepSpeed configuration that is shipped or may be written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from pipeline.engine import deepspeed_config
from pipeline.engine.operators import import_deepspeed

WORKER = Path(__file__).parent / "pipeline" / "engine" / "stage_worker.py"
SHIPPED = [name for name in deepspeed_config.shipped_ds_configs() if "nvme" not in name]  # that needs libaio's headers
BF16 = {"bf16": {"enabled": True}}
FP16 = {
    "fp16": {"enabled": True, "initial_scale_power": 12}
}  # no step is skipped to find the scale, little is denormal
OTHERS = {
    **{f"fp32-stage{stage}": {"zero_optimization": {"stage": stage}} for stage in (0, 2, 3)},  # stage 1 is `cpu`
    "bf16-stage1-plain": {**BF16, "zero_optimization": {"stage": 1}},  # the bf16 path without fp32 accumulation
    "fp16-stage1": {**FP16, "zero_optimization": {"stage": 1}},
    "fp16-stage2": {**FP16, "zero_optimization": {"stage": 2}},
}
NAMES = [*SHIPPED, *OTHERS]


def settings(name: str) -> dict:
    """A configuration with micro-batches of two, so that gradients are accumulated, as far as this machine has it."""
    config = json.loads(json.dumps(OTHERS.get(name) or deepspeed_config.read_ds_config(name)))
    config["train_micro_batch_size_per_gpu"] = 2
    if not torch.cuda.is_available() and "offload" in name:  # pinned memory wants a GPU, DeepSpeed's Adam a compiler
        config["zero_force_ds_cpu_optimizer"] = False
        for what in ("offload_optimizer", "offload_param"):
            config["zero_optimization"].get(what, {}).pop("pin_memory", None)
    return config


def precision(name: str) -> str:
    return (
        str(deepspeed_config.compute_dtype(settings(name)))
        .replace("torch.float32", "fp32")
        .replace("torch.bfloat16", "bf16")
        .replace("torch.float16", "fp16")
    )


def supported(name: str) -> bool:
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    return precision(name) != "fp16" or get_accelerator().is_fp16_supported()


RUNNABLE = [name for name in NAMES if supported(name)]


def train(folder: Path, ranks: int, jobs: list[dict]) -> dict[str, int]:
    """Run the jobs on so many ranks; exit codes by run."""
    name = f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    (folder / name).write_text(json.dumps(jobs))
    command = [Path(sys.executable).parent / "torchrun", "--standalone", f"--nproc-per-node={ranks}", WORKER]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "DS_LOG_LEVEL": "error"}
    environment["OMP_NUM_THREADS"] = "1"  # toys: a second thread would only wait for other tests
    process = subprocess.run(
        list(map(str, [*command, folder, name])), env=environment, capture_output=True, text=True, timeout=600
    )
    (folder / f"log-{name}.txt").write_text(process.stdout)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-5000:]
    return json.loads((folder / f"codes-{name}").read_text())
