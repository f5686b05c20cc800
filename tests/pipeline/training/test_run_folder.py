"""Whose a run's folder is: nobody's files are written over, and one job at a time writes."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from data_prep.errors import UserError
from pipeline.training.run_folder import LOCK, MARKER, Claim, check_claimable, check_shared, read_marker


def test_new_and_empty_folders_are_claimed_and_marked(tmp_path):
    for output in (tmp_path / "new" / "run", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        claim = Claim(output)
        assert read_marker(output)["run"] == claim.run and claim.run
        claim.close()
        again = Claim(output)
        assert again.run == claim.run
        again.close()


@pytest.mark.parametrize("name", ["recipe.toml", "metrics.jsonl", "thesis.txt", MARKER])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    for attempt in (check_claimable, Claim):
        with pytest.raises(UserError, match="holds files that no run wrote .*nothing was written"):
            attempt(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("rest", ["", ', "run": 7'])
def test_a_marker_that_names_no_run_is_none(rest, tmp_path):
    (tmp_path / MARKER).write_text(f'{{"kind": "minilmv2-deepspeed run"{rest}}}')
    with pytest.raises(UserError, match="holds files that no run wrote"):
        Claim(tmp_path)


def test_a_claim_that_was_cut_short_is_no_obstacle(tmp_path):
    for name in (LOCK, f"{MARKER}.partial"):
        (tmp_path / name).write_text("")
    Claim(tmp_path).close()
    assert read_marker(tmp_path)


def test_a_link_to_nothing_is_named_and_one_to_a_folder_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a folder")
    with pytest.raises(UserError, match="is a link to .*a folder', which does not exist"):
        Claim(tmp_path / "link")
    (tmp_path / "a folder").mkdir()
    Claim(tmp_path / "link").close()
    assert read_marker(tmp_path / "a folder")


def test_a_full_disk_says_where(on_small_disk):
    fill = "import os, sys; open(sys.argv[1] + '/ballast', 'wb', 0).write(bytes(1 << 20))"
    imports = "from pathlib import Path; from pipeline.training.run_folder import Claim"
    code = f"{fill}; {imports}; Claim(Path(sys.argv[1]) / 'run')"
    process = on_small_disk("64k", code)
    assert "No space left on device: " in process.stderr and "run.lock" in process.stderr.splitlines()[-1]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        Claim(tmp_path / "file")


HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from pipeline.training.run_folder import Claim
    claim = Claim(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
    """
)


def test_a_second_job_is_refused_until_the_first_is_gone_however_it_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    first = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is being written by process {first.pid} on .*, since "):
        Claim(tmp_path / "run")
    first.kill()
    first.wait()
    Claim(tmp_path / "run").close()


def test_ranks_that_see_another_folder_are_told(tmp_path):
    claim = Claim(tmp_path / "run")
    check_shared(tmp_path / "run", claim.run)
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere", ignore=shutil.ignore_patterns(LOCK, MARKER))
    with pytest.raises(UserError, match="give one that all machines share"):
        check_shared(tmp_path / "elsewhere", claim.run, patience_seconds=0.3)
    claim.close()


def test_a_job_does_not_write_over_files_that_lie_in_its_output(distill, tmp_path):
    """Beside the refusal before anything starts: by the script, on two ranks, with one message and no traceback."""
    own = tmp_path / "own"
    (own / "model").mkdir(parents=True)
    (own / "recipe.toml").write_text("mine")
    (own / "model" / "config.json").write_text("mine")
    process = distill(own, expect=2)
    assert process.stderr.count("holds files that no run wrote") == 1 and "Traceback" not in process.stderr
    assert (own / "recipe.toml").read_text() == (own / "model" / "config.json").read_text() == "mine"
    assert {path.name for path in own.rglob("*")} == {"recipe.toml", "model", "config.json"}
