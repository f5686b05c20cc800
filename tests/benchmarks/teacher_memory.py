"""Memory that one rank needs for its teacher: a replica against ZeRO-3 pieces, at 1, 2 and 4 ranks.

Expected: a replica takes 2 bytes a parameter (bf16) on every rank; ZeRO-3 takes 2 / ranks bytes, and while it runs the
largest layer whole. Random weights of the named sizes; every measurement runs in fresh processes.

    python tests/benchmarks/teacher_memory.py            # 300 M parameters
    python tests/benchmarks/teacher_memory.py --large    # 1 B as well
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"0.3 B": dict(hidden_size=1024, num_hidden_layers=24), "1.0 B": dict(hidden_size=1792, num_hidden_layers=25)}
RANK = """
import gc, json, os, sys, torch, psutil
from pipeline.engine import process_group
from pipeline.config import Teacher
from pipeline.engine.placement import Placement, start_teacher
kind, model, layer, nvme = sys.argv[1:5]
process_group.init_distributed()
def private():
    gc.collect()
    torch.distributed.barrier()
    return psutil.Process().memory_full_info().uss
before = private()
settings = {"bf16": {"enabled": True}}
where = Placement(kind=kind, reason="")
teacher = start_teacher(Teacher(model=model, layer=int(layer), nvme_path=nvme), where, settings)
held = private() - before
ids = torch.randint(1000, 20000, (1, 64))
with torch.no_grad():
    teacher(input_ids=ids)
after = private() - before
rows = [None] * torch.distributed.get_world_size()
torch.distributed.all_gather_object(rows, [held / 2**20, after / 2**20])
if torch.distributed.get_rank() == 0:
    print("MEASURED", json.dumps([max(column) for column in zip(*rows)]), flush=True)
torch.distributed.destroy_process_group()
"""


def save_teacher(folder: Path, size: dict[str, int]) -> int:
    """A BERT of random weights in bf16; returns its parameters."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **size, num_attention_heads=size["hidden_size"] // 64, intermediate_size=4 * size["hidden_size"]
    )
    model = BertModel(config, add_pooling_layer=False).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def measure(kind: str, model: Path, layer: int, ranks: int, nvme: Path | None) -> tuple[float, float]:
    """MiB a rank: after loading, and after a forward pass; the largest over the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "torchrun", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    command += ["--no-python", sys.executable, "-c", RANK, kind, model, layer, nvme]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("MEASURED")]
    return tuple(json.loads(line.removeprefix("MEASURED")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="1 B parameters as well; 4 ranks need 16 GiB")
    parser.add_argument("--nvme", type=Path, help="a folder on a fast disk: that placement as well (libaio-dev)")
    arguments = parser.parse_args()
    cases = [("replica", 1), ("zero3", 1), ("zero3", 2), ("zero3", 4), ("zero3_cpu", 2)]
    cases += [("zero3_nvme", 1), ("zero3_nvme", 2), ("zero3_nvme", 4)] if arguments.nvme else []
    print("| teacher | placement | ranks | MiB a rank, loaded | after a forward pass | replica would be |")
    print("|---|---|---|---|---|---|")
    for name in ["0.3 B", *(["1.0 B"] if arguments.large else [])]:
        with tempfile.TemporaryDirectory() as scratch:
            parameters = save_teacher(Path(scratch), SIZES[name])
            layer = json.loads((Path(scratch) / "config.json").read_text())["num_hidden_layers"]
            for kind, ranks in cases:
                held, after = measure(kind, Path(scratch), layer, ranks, arguments.nvme)
                expected = parameters * 2 / 2**20
                print(f"| {name} | {kind} | {ranks} | {held:,.0f} | {after:,.0f} | {expected:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
