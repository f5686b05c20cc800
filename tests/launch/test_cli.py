"""The command `minilm` as a user types it, its mistakes included."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch  # noqa: F401  (commands that do without it must not keep it from others in this process)
from click.testing import CliRunner

from launch import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(cli.minilm.commands)


def minilm(*arguments, cwd=None):
    code = "from launch.cli import main; main()"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def refused(process, *words):
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


def test_commands():
    assert {"samples", "prepare", "inspect", "distill", "export", "evaluate"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    result = CliRunner().invoke(cli.minilm, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output and f"minilm {command}" in result.output


def test_data_files_in_a_folder_are_a_hub_source_here_too(samples, tmp_path):
    """The command keeps torch out of its process by an entry that `datasets` must not take for torch."""
    (tmp_path / "data").mkdir()
    lines = samples.leads("en").read_text(encoding="utf-8").splitlines()[:40]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = minilm(
        *("prepare", "--tokenizer", samples.teacher, "--source", f"hub:{tmp_path / 'data'}", "--workers", "2"),
        *("--out", tmp_path / "corpus"),
    )
    assert made.returncode == 0 and "corpus: 40 documents" in made.stdout, made.stderr


def test_help_is_fast():
    """Nothing heavy is imported before it is needed."""
    code = (
        "import sys, launch.cli; print(sorted({'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "[]\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("relations.heads=40", "does not divide the teacher's hidden size 384"),
        pytest.param("data.corpus={folder}/nothing", "is not a prepared corpus", marks=pytest.mark.slow),
        pytest.param("teacher.model={folder}/nothing", "{folder}/nothing", marks=pytest.mark.slow),
        pytest.param("data.weights={{ nowhere = 1.0 }}", "nowhere", marks=pytest.mark.slow),
        pytest.param("student.init=best", "best", marks=pytest.mark.slow),
    ],
)
def test_distill_refuses_before_anything_is_launched(override, words, small_run, tmp_path):
    """One process for many mistakes would be quicker, but each must be a clean exit of its own."""
    base = ["distill", "--recipe", "demo", *small_run, f"run.output={tmp_path / 'run'}"]
    refused(minilm(*base, override.format(folder=tmp_path)), words.format(folder=tmp_path))
    assert not (tmp_path / "run").exists()


def test_corpus_of_another_tokenizer_is_refused(small_run, samples, corpus_folder, tmp_path):
    teacher = shutil.copytree(samples.teacher, tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a cased model of the same vocabulary
        text = (teacher / name).read_text()
        (teacher / name).write_text(re.sub(r'(lower_?case":\s*)true', r"\1false", text))
        assert (teacher / name).read_text() != text
    base = ["distill", "--recipe", "demo", *small_run, f"run.output={tmp_path / 'run'}"]
    refused(minilm(*base, f"teacher.model={teacher}"), "was made with another tokenizer", "minilm prepare --tokenizer")


def test_a_changed_shard_of_the_same_size_is_refused_on_request(small_run, corpus_folder, tmp_path):
    copy = shutil.copytree(corpus_folder, tmp_path / "corpus")
    shard = next((copy / "train").rglob("*.bin"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    arguments = [f"data.corpus={copy}", f"run.output={tmp_path / 'run'}", "data.verify=checksums"]
    refused(minilm("distill", "--recipe", "demo", *small_run, *arguments), "00000.bin", "differ from their checksums")


def test_inspect_shows_corpora_and_runs(runs, corpus_folder, tmp_path):
    corpus = minilm("inspect", corpus_folder)
    assert corpus.returncode == 0 and "leads" in corpus.stdout and "validation" in corpus.stdout
    run = minilm("inspect", runs.unbroken)
    assert run.returncode == 0 and "step-00000006" in run.stdout and "whole" in run.stdout
    refused(minilm("inspect", tmp_path), "neither a corpus")
    damaged = shutil.copytree(runs.unbroken, tmp_path / "run")
    file = next((damaged / "checkpoints" / "step-00000003").glob("*optim_states.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    verified = minilm("inspect", damaged, "--verify")
    assert "torn" in verified.stdout and verified.stdout.count("whole, verified") == 1


def test_export_and_evaluate_name_what_is_missing(runs, tmp_path):
    refused(minilm("export", tmp_path), "is not the folder of a run")
    refused(minilm("export", runs.unbroken, "--step", "4"), "step 4 cannot be used")
    refused(minilm("evaluate", runs.unbroken, "--probe", tmp_path / "none.jsonl"), "there is no probe file")
    assert not (runs.unbroken / "export").exists()
    refused(minilm("export"), "Missing argument")
    refused(minilm("exprot"), "No such command")


def test_names_with_brackets_are_shown_as_they_are(runs, samples, tmp_path):
    """To the table's library `[/x]` would be the end of a style that never began."""
    from data_prep.prepare import PrepareRequest, prepare
    from data_prep.readers.sources import Source

    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "A sentence that is long enough to be kept, about nothing."}\n' * 20)
    source = Source.parse(f"jsonl,name=s-x:{text}")
    prepare(PrepareRequest(tokenizer=str(samples.teacher), sources=(source,)), tmp_path / "c[/y]", workers=0)
    shown = minilm("inspect", tmp_path / "c[/y]")
    assert shown.returncode == 0 and "c[/y]" in "".join(shown.stdout.split()), shown.stderr  # a long name is wrapped
    run = tmp_path / "run[/z]"
    shutil.copytree(runs.unbroken, run)
    shown = minilm("inspect", run)
    assert shown.returncode == 0 and "run[/z]" in shown.stdout, shown.stderr


def test_paths_that_cannot_be_are_one_message(runs, tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    run = tmp_path / "run"
    shutil.copytree(runs.unbroken, run)
    record = run / "checkpoints" / "step-00000006" / "complete.json"
    record.unlink()
    record.mkdir()
    shown = minilm("inspect", run)
    assert shown.returncode == 0 and "torn" in shown.stdout and "step-00000003" in shown.stdout
    corpus = ("--tokenizer", runs.unbroken / "model", "--out", tmp_path / "corpus")
    for path in (loop, tmp_path / ("x" * 300), "/dev/null/run"):
        refused_here(capsys, "inspect", path)
        refused_here(capsys, "export", path)
        refused_here(capsys, "distill", "--recipe", path)
        refused_here(capsys, "distill", "--recipe", "demo", "--ds-config", path)
        refused_here(capsys, "prepare", "--source", f"text:{path}", *corpus)


def refused_here(capsys, *arguments):
    """As `refused`, without a process of its own."""
    with patch.object(sys, "argv", ["minilm", *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("minilm: error: ") and "Traceback" not in said, said
