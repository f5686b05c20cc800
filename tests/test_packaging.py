"""What `pip install .` puts on a machine works there without the clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    target, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    for name in ("data_prep", "pipeline", "launch", "ds_configs", "tests"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, source]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    return target


def minilm(installed, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(cwd)}
    environment.pop("MINILM_HOME", None)
    command = [sys.executable, str(installed / "bin" / "minilm"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_packages_data_and_nothing_else(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"data_prep", "pipeline", "launch", "ds_configs", "bin"}
    assert (installed / "launch" / "distill.sh").read_text() == (ROOT / "launch" / "distill.sh").read_text()
    for folder, pattern in (("launch/recipes", "*.toml"), ("ds_configs", "*.json")):
        assert {p.name for p in (installed / folder).iterdir()} >= {p.name for p in (ROOT / folder).glob(pattern)}


def test_the_command_finds_its_recipes_outside_the_clone(installed, tmp_path):
    process = minilm(installed, tmp_path, "distill", "--recipe", "demo")
    assert process.returncode == 2
    assert str(tmp_path / "minilmv2-deepspeed" / "samples") in process.stderr and "minilm samples" in process.stderr
    process = minilm(installed, tmp_path, "distill", "--recipe", "demmo")
    assert process.returncode == 2 and "bert-base-6x768" in process.stderr


def test_the_launch_script_runs_where_it_was_installed(installed, tmp_path):
    environment = {
        **os.environ,
        "LOCAL_RANK": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    script = installed / "launch" / "distill.sh"
    process = subprocess.run(
        ["bash", script, "--recipe", "demmo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2 and str(installed / "launch" / "recipes") in process.stderr
