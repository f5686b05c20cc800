"""Slurm: srun starts the ranks of one job; a warning, the time limit, a lost node and a cancelled job lose no step."""

import signal
import subprocess

import pytest

from pipeline.training.metrics import read_metrics
from tests.conftest import free_port
from tests.launch import slurm as machines
from tests.launch.nodes import ROOT
from tests.launch.slurm import wait_until
from tests.read import losses_of

SCRIPT = ROOT / "launch" / "distill.sh"
pytestmark = pytest.mark.skipif(bool(machines.reason_not_to()), reason=machines.reason_not_to())
elsewhere = [pytest.mark.launchers, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster that all tests here share."""
    made = machines.Slurm(tmp_path_factory.mktemp("slurm"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(cluster, toy_overrides, tmp_path_factory):
    """Losses of two ranks that DeepSpeed starts on this machine."""
    output = tmp_path_factory.mktemp("alone") / "run"
    words = ["bash", SCRIPT, "--num_gpus=2", f"--master_port={free_port()}", "--recipe=demo", *toy_overrides]
    done = cluster.run(*words, f"run.output={output}")
    assert done.returncode == 0, done.stderr
    return losses_of(output)


class Batch:
    """A job of two ranks on two nodes that does not end by itself: `launch/slurm.sbatch` with more options.

    Args:
        options: of sbatch.
        overrides: of the recipe.
    """

    def __init__(self, cluster, folder, options, overrides):
        self._cluster = cluster
        self.run, self.log = folder / "run", folder / "log.txt"
        options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={self.log}", *options]
        words = ["--recipe", "demo", *overrides, "optimizer.steps=100000", f"run.output={self.run}"]
        batch = ["sbatch", *options, SCRIPT.with_name("slurm.sbatch"), *words]
        self.number = cluster.ask(*batch, MINILM_PROJECT=str(ROOT)).strip()

    def steps(self):
        return len(read_metrics(self.run, "train"))

    def state(self):
        words = self._cluster.ask("scontrol", "show", "job", self.number).split()
        return next(word.removeprefix("JobState=") for word in words if word.startswith("JobState="))

    def ranks(self):
        return self._cluster.ranks(self.number)

    def saved(self):
        """The steps of whole checkpoints."""
        return [int(path.parent.name.removeprefix("step-")) for path in self.run.glob("checkpoints/*/complete.json")]

    def wait(self, condition, seconds=60):
        wait_until(condition, self.log, seconds)

    def begin_again(self):
        """When it is queued again, which it is for two minutes."""
        self.wait(lambda: self.state() == "PENDING", 120)
        self._cluster.ask("scontrol", "update", f"jobid={self.number}", "starttime=now")

    def goes_on_from(self, step):
        """From this step, of which there is a whole checkpoint; and no step is lost, or taken twice."""
        self.wait(lambda: f"resumed from step {step} " in self.log.read_text() and max(losses_of(self.run)) > step, 180)
        steps = list(losses_of(self.run))
        assert steps == list(range(1, len(steps) + 1))


@pytest.fixture
def submit(cluster, toy_overrides, tmp_path):
    """Submit a `Batch`; it is cancelled in the end."""
    jobs = []

    def begin(*options, every=100_000):
        jobs.append(Batch(cluster, tmp_path, options, [*toy_overrides, f"checkpoint.every_steps={every}"]))
        return jobs[-1]

    yield begin
    for job in jobs:
        cluster.ask("scancel", job.number)
        job.wait(lambda: not cluster.ask("squeue", "-h").strip(), 90)


@pytest.mark.slow
def test_srun_starts_ranks_of_one_job_on_both_nodes(cluster, alone, toy_overrides, tmp_path):
    arguments = ["--recipe", "demo", *toy_overrides, f"run.output={tmp_path / 'run'}"]
    done = cluster.run("srun", "-N2", "-n2", "bash", SCRIPT, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


@pytest.fixture
def by_deepspeed(toy_overrides, tmp_path):
    """The command that starts ranks by DeepSpeed's launcher for Slurm."""
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    words = ["bash", SCRIPT, "--launcher", "slurm", "--hostfile", tmp_path / "hosts", "--recipe", "demo"]
    return [*words, *toy_overrides, f"run.output={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    "before", [pytest.param([], marks=pytest.mark.slow), pytest.param(["salloc"], marks=elsewhere)]
)
def test_deepspeeds_launcher_outside_and_inside_of_an_allocation(before, cluster, by_deepspeed, alone, tmp_path):
    done = cluster.run(*before, *(["-N2"] if before else []), *by_deepspeed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--nodelist=n1,n2 --nodes=2 --ntasks-per-node=1" in done.stdout + done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_deepspeeds_launcher_where_it_would_train_elsewhere_or_twice(cluster, by_deepspeed, tmp_path):
    refused = cluster.run("salloc", "--nodelist=n1", *by_deepspeed)
    assert refused.returncode == 2 and "the hostfile names n2, but this allocation of Slurm has n1" in refused.stderr
    refused = cluster.run("srun", "-n2", *by_deepspeed)
    assert refused.returncode == 2 and "each would start a job of its own" in refused.stderr
    (tmp_path / "hosts").write_text("n1 slots=1\nelsewhere slots=1\n")
    refused = cluster.run(*by_deepspeed)
    assert refused.returncode == 2 and "the hostfile names elsewhere, but Slurm has n1, n2" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "run").exists()


@pytest.mark.launchers
@pytest.mark.exhaustive
def test_a_signal_to_what_runs_deepspeeds_launcher_saves(cluster, by_deepspeed, tmp_path):
    log, more = tmp_path / "log.txt", ["optimizer.steps=100000", "checkpoint.every_steps=100000"]
    with log.open("w") as out:
        words = list(map(str, [*by_deepspeed, *more]))
        job = subprocess.Popen(words, env=cluster.environment, stdout=out, stderr=out)
    wait_until(lambda: len(read_metrics(tmp_path / "run", "train")) > 2, log, 120)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75, log.read_text()
    assert list(tmp_path.glob("run/checkpoints/*/complete.json"))
    wait_until(lambda: not cluster.ask("squeue", "-h").strip(), log)


@pytest.mark.slow
def test_an_array_trains_a_value_a_task(cluster, toy_overrides, tmp_path):
    options = ["--wait", "--array=0-1", "--nodes=1", "--ntasks-per-node=1", f"--output={tmp_path}/log-%a.txt"]
    arguments = ["--recipe", "demo", *toy_overrides, "--vary", "optimizer.peak_lr=1e-3,1e-4"]
    batch = ["sbatch", *options, SCRIPT.with_name("slurm.sbatch"), *arguments, f"run.output={tmp_path / 'sweep'}"]
    done = cluster.run(*batch, MINILM_PROJECT=str(ROOT))
    assert done.returncode == 0, "".join(path.read_text() for path in tmp_path.glob("log-*.txt"))
    fast, slow = (losses_of(tmp_path / "sweep" / f"optimizer.peak_lr={lr}") for lr in ("1e-3", "1e-4"))
    assert len(fast) == len(slow) == 6 and fast[6] < slow[6]


@pytest.mark.slow
def test_a_warning_before_the_end_saves_and_the_job_is_requeued_and_goes_on(cluster, submit):
    """One that comes while the ranks still start, and have nothing to save, too."""
    job = submit("--cpus-per-task=2")
    job.wait(lambda: len(job.ranks()) == 2)
    assert {rank.environ().get("SRUN_CPUS_PER_TASK") for rank in job.ranks()} == {"2"}
    cluster.ask("scancel", "--signal=USR1", job.number)
    job.begin_again()
    job.wait(lambda: job.steps() > 2, 120)
    cluster.ask("scancel", "--signal=USR1", job.number)
    job.begin_again()
    (saved,) = job.saved()
    job.goes_on_from(saved)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_leaves_nobody_behind(cluster, submit):
    job = submit()
    job.wait(lambda: job.steps() > 2, 120)
    ranks = job.ranks()
    assert len(ranks) >= 2
    cluster.ask("scancel", job.number)
    job.wait(lambda: not any(rank.is_running() for rank in ranks), 60)
    assert job.saved() == [job.steps()] and not job.ranks(), job.log.read_text()
    job.wait(lambda: job.state() == "CANCELLED")


@pytest.mark.launchers
@pytest.mark.exhaustive
def test_the_time_limit_comes_with_a_warning_and_the_job_goes_on(submit):
    job = submit("--time=2", "--signal=USR1@45")
    job.wait(job.saved, 120)
    job.begin_again()
    assert "TIME LIMIT" not in job.log.read_text()
    (saved,) = job.saved()
    job.goes_on_from(saved)


@pytest.mark.launchers
@pytest.mark.exhaustive
def test_a_lost_node_ends_the_ranks_of_the_other_and_the_job_goes_on(cluster, submit):
    job = submit(every=3)
    job.wait(job.saved, 120)
    survivors = cluster.ranks(job.number, "n1")
    cluster.pull_the_plug("n2", job.number)
    job.wait(lambda: not any(rank.is_running() for rank in survivors), 30)
    job.wait(lambda: "is gone: killed" in job.log.read_text())
    cluster.plug_in("n2")
    job.begin_again()
    job.goes_on_from(max(job.saved()))
