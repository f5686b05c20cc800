"""Steps whose loss is not finite leave the weights alone, on every ZeRO stage."""

import os
import subprocess
import sys
import textwrap

import pytest

from pipeline.monitor import read_metrics

ONE_RANK = textwrap.dedent(
    """
    import sys, torch
    from pipeline import engine
    from pipeline.config import load_recipe
    engine.init_distributed()
    options = load_recipe("demo").optimizer
    for stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
        config = {
            "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 62,
        }
        student = engine.start_student(model, options, config)
        data = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

        def weights():
            return [p.detach().clone() for p in student.module.parameters()]

        def step(factor):
            loss = student(data).square().mean() * factor
            student.backward(loss)
            return engine.take_step(student, finite=bool(torch.isfinite(loss)))

        history = [weights()]
        for factor in (1.0, float("nan"), float("inf"), 1.0):
            history.append((step(factor), weights()))
        stepped = [item[0] for item in history[1:]]
        states = [history[0]] + [item[1] for item in history[1:]]
        same = [all(map(torch.equal, a, b)) for a, b in zip(states, states[1:])]
        finite = all(w.isfinite().all() for w in states[-1])
        print(stage, stepped, same, finite, student.global_steps, flush=True)
    torch.distributed.destroy_process_group()
    """
)


def test_steps_that_are_not_finite_are_skipped_on_every_stage():
    process = subprocess.run(
        [sys.executable, "-c", ONE_RANK],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line[:2] in ("0 ", "1 ", "2 ", "3 ")]
    assert lines == [f"{stage} [True, False, False, True] [False, True, True, False] True 4" for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize("stage", [1])
def test_a_run_that_diverges_ends_saved_with_its_samples_named(stage, distill, tmp_path):
    overrides = ["optimizer.peak_lr=1e30", "optimizer.steps=50", "checkpoint.stop_after_skipped_steps=4"]
    process = distill(tmp_path / "run", *overrides, ranks=1, expect=3)
    assert "giving up: 4 steps in a row were not finite" in process.stdout
    skipped = read_metrics(tmp_path / "run", "skipped")
    assert [record["in_a_row"] for record in skipped] == [1, 2, 3, 4]
    first = skipped[0]
    assert (first["first_sample"], first["last_sample"]) == (8 * (first["step"] - 1), 8 * first["step"] - 1)
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()
