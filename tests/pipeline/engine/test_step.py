"""Steps whose loss or gradient is not finite leave the weights alone: every ZeRO stage, every precision, all ranks."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from pipeline.training.metrics import read_metrics

CASES = ("fine", "loss", "gradient", "first micro-batch", "one rank", "fine")
RANK = textwrap.dedent(
    """
    import json, sys, torch
    from launch.status import end_process
    from pipeline.engine import process_group
    from pipeline.engine.student import set_learning_rate, spoil_unless_finite, start_student, take_step
    from pipeline.recipes import load_recipe
    process_group.init_distributed()
    rank, options = torch.distributed.get_rank(), load_recipe("demo").optimizer
    nan = float("nan")
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16", "bf16 summed in fp32"):
            if stage == 0 and "summed" in precision:
                continue  # DeepSpeed does not have it
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
            config = {
                "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
                "gradient_clipping": 1.0, "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 62,
            }
            config |= {"bf16": {"enabled": True}} if "bf16" in precision else {}
            config |= {"data_types": {"grad_accum_dtype": "fp32"}} if "summed" in precision else {}
            student = start_student(model, options, config)
            dtype = next(student.module.parameters()).dtype
            data = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

            def weights():
                return [getattr(p, "ds_tensor", p).detach().clone() for p in student.module.parameters()]

            def step(case):
                losses = torch.zeros(1)
                for micro in range(2):
                    out = student(data)
                    if case == "gradient" and micro == 1 and rank == 1:
                        out.register_hook(lambda grad: grad * nan)  # the loss stays finite
                    bad = case == "loss" or case == "one rank" and rank == 1 and micro == 1
                    bad |= case == "first micro-batch" and micro == 0 and rank == 0
                    loss = out.square().mean() * (nan if bad else 1.0)
                    losses += loss.detach()
                    student.backward(spoil_unless_finite(loss, losses) if micro == 1 else loss)
                    stepped = take_step(student)
                return stepped

            set_learning_rate(student, 1e-2)
            before, stepped, changed = weights(), [], []
            for case in json.loads(sys.argv[1]):
                stepped.append(step(case))
                changed.append(not all(map(torch.equal, before, weights())))
                before = weights()
            finite = all(bool(w.isfinite().all()) for w in before)
            result = [stage, precision, stepped, changed, finite, student.global_steps, student.skipped_steps]
            found = [None, None]
            torch.distributed.all_gather_object(found, result)
            if rank == 0:
                print("RESULT " + json.dumps(found), flush=True)
    process_group.leave_process_group()
    end_process(0)
    """
)


def test_steps_that_are_not_finite_are_skipped_on_every_stage_precision_and_rank():
    command = [os.path.join(os.path.dirname(sys.executable), "torchrun"), "--standalone", "--nproc-per-node=2"]
    command += ["--no-python", sys.executable, "-c", RANK, json.dumps(CASES)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line.partition("RESULT ")[2] for line in process.stdout.splitlines() if "RESULT " in line]
    assert len(lines) == 11
    expected = [case == "fine" for case in CASES]
    for line in lines:
        for stage, precision, stepped, changed, finite, steps, skipped in json.loads(line):
            where = (stage, precision)
            assert (stepped, changed) == (expected, expected), where
            assert finite and (steps, skipped) == (len(CASES), expected.count(False)), where


@pytest.mark.slow
def test_a_run_that_diverges_ends_saved_with_its_samples_named(distill, tmp_path):
    overrides = ["optimizer.peak_lr=1e30", "optimizer.steps=50", "checkpoint.stop_after_skipped_steps=4"]
    process = distill(tmp_path / "run", *overrides, ranks=1, expect=3)
    assert "giving up: 4 steps in a row were not finite" in process.stdout
    skipped = read_metrics(tmp_path / "run", "skipped")
    assert [record["in_a_row"] for record in skipped] == [1, 2, 3, 4]
    first = skipped[0]
    assert (first["first_sample"], first["last_sample"]) == (8 * (first["step"] - 1), 8 * first["step"] - 1)
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()
