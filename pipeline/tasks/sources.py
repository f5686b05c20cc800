"""Where the rows of a task come from: files below a folder, or the task's data set on the hub.

Both say which splits are trained on and which are reported, as (split, language or nothing), and give their rows.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError, first_line
from pipeline.tasks import files
from pipeline.tasks.files import Row
from pipeline.tasks.table import CONVERTED, TASKS, Task


class Files:
    """Files below a folder, see `pipeline.tasks.files`; only the splits that are trained on or reported are read."""

    def __init__(self, task: Task, folder: Path) -> None:
        self._task, self._folder = task, folder / task.name
        self.torn = 0  # rows of a distribution's own tables that have too few or too many fields
        folders = [self._folder, *([folder / task.train_from] if task.train_from else [])]
        self._found: dict[tuple[str, str], list[Row]] = {}
        if not task.is_frozen:
            self._found |= self._first(folders, ["train"])
        same = task.train_from and TASKS[task.train_from].hub == task.hub
        self._found |= self._first(folders if same else folders[:1], task.splits)
        others = f" (or {folder / task.train_from})" if task.train_from else ""
        if not task.is_frozen and not self.train_keys():
            raise UserError(
                f"there is no training split in {self._folder}{others}: expected train.parquet, .jsonl, .csv or .tsv"
            )
        if not self.reported_keys():
            raise UserError(
                f"there is no {' or '.join(task.splits)} split in {self._folder}{others if same else ''}: "
                f"expected such as {task.splits[0]}.parquet, .jsonl, .csv or .tsv"
            )
        plain, *rest = self.train_keys() or [("", "")]
        if not plain[1] and rest:
            raise UserError(
                f"{self._folder}: train.* and {', '.join(f'train.{language}.*' for _, language in rest)} are both "
                "there; name the language of the first, or leave out what is not to be trained on"
            )

    def _first(self, folders: list[Path], splits: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
        """The first of some splits that one of the folders has, in all its variants and languages."""
        for folder in folders:
            by_key = files.splits_of(folder)
            for split in splits:
                if keys := [key for key in by_key if key[0].partition("_")[0] == split]:
                    return self._read({key: by_key[key] for key in keys})
        return {}

    def _read(self, paths_by_key: dict[tuple[str, str], list[Path]]) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        torn: list[int] | None = [] if self._task.hub else None
        for (split, language), paths in paths_by_key.items():
            files.require_one(paths)
            rows = [row for path in paths for row in files.read_rows(path, self._task.header, torn)]
            if self._task.languages and not language and rows and "language" in rows[0]:
                for row in rows:
                    found.setdefault((split, str(row["language"])), []).append(row)
            else:
                found.setdefault((split, language), []).extend(rows)
        self.torn += len(torn or ())
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

    torn = 0

    def __init__(self, task: Task) -> None:
        if task.hub is None:
            raise UserError(f"{task.name} are files of your own: say where they are with --data DIR")
        self._task = task
        self._rows: dict[tuple[str, str], list[Row]] = {}

    def train_keys(self) -> list[tuple[str, str]]:
        return [("train", language) for language in self._task.train_languages or ("",)]

    def reported_keys(self) -> list[tuple[str, str]]:
        from datasets import get_dataset_split_names

        task = self._task
        try:
            names = get_dataset_split_names(task.hub, **self._where((*task.languages, "")[0], called="config_name"))
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
            return load_dataset(task.hub, split=split, **self._where(language)).to_list()
        except Exception as error:
            raise self._unreachable(error) from error

    def _where(self, language: str, called: str = "name") -> dict[str, str | None]:
        """Which configuration, by an argument's name. The hub's own conversion to Parquet has a folder for each,
        and no list of them."""
        task = self._task
        name = task.config.format(language=language) if task.config else None
        return {"data_dir" if task.revision == CONVERTED else called: name, "revision": task.revision}

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"cannot load the data set {self._task.hub!r} for {self._task.name}: {first_line(error)}. Where the hub "
            f"cannot be reached, put {self._task.name}/train.* and {self._task.splits[0]}.* into a folder and give it "
            "with --data"
        )


def split_name(split: str, language: str) -> str:
    """What a split of a language is called: `test.fr`."""
    return f"{split}.{language}" if language else split
