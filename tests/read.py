"""What tests compare: the files of a folder, the losses of a run."""

from pathlib import Path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses_of(run: Path) -> dict[int, float]:
    """The training loss of every step that a run has logged, each once."""
    from pipeline.training.metrics import read_metrics

    records = read_metrics(run, "train")
    losses = {record["step"]: record["loss"] for record in records}
    assert len(losses) == len(records), "a step was logged twice"
    return losses
