"""Where the rows of a task come from: files below a folder, or the task's data set on the hub.

Both say which splits are trained on and which are reported, as (split, language or nothing), and give their rows.
"""

from pathlib import Path

from data_prep.errors import UserError, first_line
from pipeline.tasks import files
from pipeline.tasks.files import Row
from pipeline.tasks.table import TASKS, Task


class Files:
    """Files below a folder, see `pipeline.tasks.files`."""

    def __init__(self, task: Task, folder: Path) -> None:
        self._task, self._folder = task, folder / task.name
        self._found = self._read(self._folder)
        if not self.train_keys() and task.train_from:
            self._found |= {
                key: rows for key, rows in self._read(folder / task.train_from).items() if key[0] == "train"
            }
        if not task.is_frozen and not self.train_keys():
            others = f" (or {folder / task.train_from})" if task.train_from else ""
            raise UserError(
                f"there is no training split in {self._folder}{others}: expected train.parquet, .jsonl, .csv or .tsv"
            )
        if not self.reported_keys():
            raise UserError(
                f"there is no {' or '.join(task.splits)} split in {self._folder}: expected such as "
                f"{task.splits[0]}.parquet, .jsonl, .csv or .tsv"
            )

    def _read(self, folder: Path) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for (split, language), paths in files.splits_of(folder).items():
            rows = [row for path in paths for row in files.read_rows(path, self._task.header)]
            if self._task.languages and not language and rows and "language" in rows[0]:
                for row in rows:
                    found.setdefault((split, str(row["language"])), []).append(row)
            else:
                found.setdefault((split, language), []).extend(rows)
        return found

    def train_keys(self) -> list[tuple[str, str]]:
        allowed = ("", *self._task.train_languages)
        keys = [key for key in sorted(self._found) if key[0] == "train"]
        return [key for key in keys if not self._task.train_languages or key[1] in allowed]

    def reported_keys(self) -> list[tuple[str, str]]:
        for split in self._task.splits:
            if keys := [key for key in sorted(self._found) if key[0].partition("_")[0] == split]:
                return keys
        return []

    def rows(self, split: str, language: str) -> list[Row]:
        return self._found[split, language]


class Hub:
    """The task's data set on the hub."""

    def __init__(self, task: Task) -> None:
        if task.hub is None:
            raise UserError(f"{task.name} are files of your own: say where they are with --data DIR")
        self._task = task
        self._rows: dict[tuple[str, str], list[Row]] = {}

    def train_keys(self) -> list[tuple[str, str]]:
        return [("train", language) for language in self._task.train_languages or ("",)]

    def reported_keys(self) -> list[tuple[str, str]]:
        from datasets import get_dataset_split_names

        first = (*self._task.languages, "")[0]
        task = self._task
        try:
            names = get_dataset_split_names(task.hub, self._config(first), revision=task.revision)
        except Exception as error:  # every way in which a network can fail
            raise self._unreachable(error) from error
        for split in task.splits:
            if found := [name for name in names if name.partition("_")[0] == split]:
                return [(name, language) for name in found for language in task.languages or ("",)]
        raise UserError(f"the data set {task.hub} has no split {' or '.join(task.splits)}, only {', '.join(names)}")

    def rows(self, split: str, language: str) -> list[Row]:
        if (split, language) not in self._rows:
            self._rows[split, language] = self._load(split, language)
        return self._rows[split, language]

    def _load(self, split: str, language: str) -> list[Row]:
        from datasets import load_dataset

        task = self._task
        if split == "train" and task.train_from and task.train_from != task.name:
            return Hub(TASKS[task.train_from])._load(split, language)
        try:
            return load_dataset(task.hub, self._config(language), split=split, revision=task.revision).to_list()
        except Exception as error:
            raise self._unreachable(error) from error

    def _config(self, language: str) -> str | None:
        return self._task.config.format(language=language) if self._task.config else None

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"cannot load the data set {self._task.hub!r} for {self._task.name}: {first_line(error)}. Without a "
            f"network, put {self._task.name}/train.* and {self._task.splits[0]}.* into a folder and give it with --data"
        )


def split_name(split: str, language: str) -> str:
    """What a split of a language is called: `test.fr`."""
    return f"{split}.{language}" if language else split
