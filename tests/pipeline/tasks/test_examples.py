"""Every task is read in the form in which it is handed out, and as the hub's columns in every kind of file."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.errors import UserError
from pipeline.tasks.examples import load
from pipeline.tasks.table import TASKS, find_task, find_tasks

WORDS = ["a tidy film", "it's \"unclosed", "dull", "vivid and warm", "so so", "grand", "flat", "fine", "poor", "rich"]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": f"The {word} river is long.",
                    "qas": [
                        {
                            "id": f"{word}-1",
                            "question": "What is long?",
                            "answers": [{"text": f"{word} river", "answer_start": 4}],
                            "is_impossible": False,
                        },
                        {
                            "id": f"{word}-2",
                            "question": "What is short?",
                            "answers": [],
                            "plausible_answers": [{"text": f"{word} river", "answer_start": 4}],
                            "is_impossible": True,
                        },
                    ],
                }
                for word in ("blue", "red", "green", "old")
            ],
        }
    ],
}


def tsv(header, *columns):
    rows = [header, *zip(*columns, strict=True)] if header else list(zip(*columns, strict=True))
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


N = range(len(WORDS))
LABELS = [i % 2 for i in N]
NLI = [("entailment", "neutral", "contradiction")[i % 3] for i in N]
HALF = ["entailment" if i % 2 else "not_entailment" for i in N]
MNLI_HEAD = "index promptID pairID genre sentence1_parse sentence1 sentence2 label1 gold_label".split()
CONLL = (
    "-DOCSTART- -X- -X- O\n\n" + "Ada NNP B-NP B-PER\nwrote VBD B-VP O\n\nin IN B-PP O\nParis NNP B-NP B-LOC\n\n" * 5
)

# What each task's own distribution looks like: file -> content, then what the first test example must be.
DISTRIBUTED = {
    "cola": (
        {"train.tsv": tsv(None, N, LABELS, WORDS, WORDS), "dev.tsv": tsv(None, N, LABELS, WORDS, WORDS)},
        ((WORDS[0],), 0),
    ),
    "sst2": (
        {"train.tsv": tsv(["sentence", "label"], WORDS, LABELS), "dev.tsv": tsv(["sentence", "label"], WORDS, LABELS)},
        ((WORDS[0],), 0),
    ),
    "mrpc": (
        dict.fromkeys(
            ("train.tsv", "dev.tsv"),
            "\ufeff" + tsv(["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], LABELS, N, N, WORDS, WORDS[::-1]),
        ),
        ((WORDS[0], WORDS[-1]), 0),
    ),
    "qqp": (
        dict.fromkeys(
            ("train.tsv", "dev.tsv"),
            tsv(["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], N, N, N, WORDS, WORDS[::-1], LABELS),
        ),
        ((WORDS[0], WORDS[-1]), 0),
    ),
    "stsb": (
        dict.fromkeys(
            ("train.tsv", "dev.tsv"),
            tsv(["index", "genre", "sentence1", "sentence2", "score"], N, N, WORDS, WORDS[::-1], [i / 2 for i in N]),
        ),
        ((WORDS[0], WORDS[-1]), 0.0),
    ),
    "mnli": (
        dict.fromkeys(
            ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"),
            tsv(MNLI_HEAD, N, N, N, N, N, WORDS, WORDS[::-1], N, NLI),
        ),
        ((WORDS[0], WORDS[-1]), 0),
    ),
    "qnli": (
        dict.fromkeys(
            ("train.tsv", "dev.tsv"), tsv(["index", "question", "sentence", "label"], N, WORDS, WORDS[::-1], HALF)
        ),
        ((WORDS[0], WORDS[-1]), 1),
    ),
    "rte": (
        dict.fromkeys(
            ("train.tsv", "dev.tsv"), tsv(["index", "sentence1", "sentence2", "label"], N, WORDS, WORDS[::-1], HALF)
        ),
        ((WORDS[0], WORDS[-1]), 1),
    ),
    "squad": (
        {"train-v1.1.json": json.dumps(SQUAD), "dev-v1.1.json": json.dumps(SQUAD)},
        (("What is long?", "The blue river is long."), (("blue river", 4),)),
    ),
    "squad2": (
        {"train-v2.0.json": json.dumps(SQUAD), "dev-v2.0.json": json.dumps(SQUAD)},
        (("What is long?", "The blue river is long."), (("blue river", 4),)),
    ),
    "xnli": (
        {
            "train.en.tsv": tsv(
                ["premise", "hypo", "label"], WORDS, WORDS[::-1], [n.replace("ion", "ory") for n in NLI]
            ),
            "train.fr.tsv": tsv(["premise", "hypo", "label"], WORDS[:1], WORDS[:1], NLI[:1]),
            "xnli.dev.tsv": "",
            "xnli.test.tsv": tsv(
                ["language", "gold_label", "sentence1", "sentence2"], ["fr", "sw"] * 5, NLI, WORDS, WORDS
            ),
        },
        ((WORDS[0], WORDS[0]), 0),
    ),
    "mlqa": (
        {
            "../squad/train-v1.1.json": json.dumps(SQUAD),
            "test-context-de-question-de.json": json.dumps(SQUAD),
            "test-context-de-question-zh.json": "not read",
            "test-context-zh-question-zh.json": json.dumps(SQUAD),
        },
        (("What is long?", "The blue river is long."), (("blue river", 4),)),
    ),
    "conll2003": ({"train.txt": CONLL, "test.txt": CONLL}, (("Ada", "wrote"), (1, 0))),
}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_task_as_it_is_handed_out(name, tmp_path):
    files, (texts, target) = DISTRIBUTED[name]
    (tmp_path / name).mkdir()
    write(tmp_path / name, files)
    data = load(find_task(name), tmp_path)
    first = next(iter(data.reported.values()))[0]
    assert (first.texts, first.target) == (texts, target)
    assert data.train and data.selection and not set(data.train) & set(data.selection)
    assert len(data.train) + len(data.selection) in (8, 10)
    reported = {"mnli": ["validation_matched", "validation_mismatched"], "xnli": ["test.fr", "test.sw"]}
    reported |= {"mlqa": ["test.de", "test.zh"], "conll2003": ["test"]}
    assert list(data.reported) == reported.get(name, ["validation"])


def test_every_row_of_the_table_is_read_above():
    assert set(TASKS) - set(DISTRIBUTED) == {"xnli-translate-train"}


def test_translated_training_data_of_all_languages(tmp_path):
    write(tmp_path / "xnli-translate-train", DISTRIBUTED["xnli"][0])
    data = load(find_task("xnli-translate-train"), tmp_path)
    assert len(data.train) + len(data.selection) == 11


def test_kinds_of_files_hold_the_same(tmp_path):
    """A hub's Parquet in two shards, JSON lines, CSV with quotes and TSV give equal examples; order does not matter."""
    rows = [{"sentence": word, "label": label} for word, label in zip(WORDS, LABELS, strict=True)]
    for kind in ("parquet", "jsonl", "csv", "tsv"):
        folder = tmp_path / kind / "sst2"
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            if kind == "parquet":
                for part in (0, 1):
                    table = pyarrow.Table.from_pylist(rows[5 * part : 5 * part + 5])
                    pyarrow.parquet.write_table(table, folder / f"{split}-{part:05d}-of-00002.parquet")
            elif kind == "csv":
                with (folder / f"{split}.csv").open("w", newline="") as file:
                    writer = csv.DictWriter(file, ["sentence", "label"])
                    writer.writeheader()
                    writer.writerows(rows)
            elif kind == "jsonl":
                (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            else:
                (folder / f"{split}.tsv").write_text(tsv(["sentence", "label"], WORDS, LABELS))
    read = {kind: load(find_task("sst2"), tmp_path / kind) for kind in ("parquet", "jsonl", "csv", "tsv")}
    assert len({data.fingerprint() for data in read.values()}) == 1
    folder = tmp_path / "reversed" / "sst2"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    turned = load(find_task("sst2"), tmp_path / "reversed")
    assert set(turned.selection) == set(read["csv"].selection)


def test_selection_shares_no_context_with_training(tmp_path):
    write(tmp_path / "squad2", DISTRIBUTED["squad2"][0])
    data = load(find_task("squad2"), tmp_path)
    assert not {e.texts[1] for e in data.train} & {e.texts[1] for e in data.selection}


OWN = {
    "text": {"text": "a", "label": "good"},
    "pair": {"sentence1": "a", "sentence2": "b", "label": 3},
    "regression": {"sentence1": "a", "label": 0.5},
    "tokens": {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
    "span": {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}},
    "retrieval": {"query": "a", "document": "b"},
}


@pytest.mark.parametrize("kind", OWN)
def test_own_files_of_each_kind(kind, tmp_path):
    rows = [dict(OWN[kind]) for _ in range(6)]
    texts = {"text": "text", "pair": "sentence1", "regression": "sentence1", "span": "context", "retrieval": "query"}
    for number, row in enumerate(rows):
        if kind in texts:
            row[texts[kind]] = f"a b {number}"
        if kind in ("text", "pair"):
            row["label"] = ["good", "bad"][number % 2] if kind == "text" else number % 2
        if kind == "tokens":
            row["tokens"] = [f"a{number}", "b"]
    write(tmp_path / "mine", {f"{split}.jsonl": "\n".join(map(json.dumps, rows)) for split in ("train", "test")})
    data = load(find_task(f"mine:{kind}"), tmp_path)
    assert len(data.reported["test"]) == 6 and (kind == "retrieval" or len(data.train) == 5)


BAD = {
    "no training split": {"test.jsonl": '{"text": "a", "label": 1}'},
    "no test or validation split": {"train.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": 2}'},
    "no column `label`": {"train.jsonl": '{"text": "a"}', "test.jsonl": "{}"},
    "line 2": {"train.jsonl": '{"text": "a", "label": 1}\n{', "test.jsonl": "{}"},
    "not a Parquet file": {"train.parquet": "PAR1", "test.jsonl": "{}"},
    "expected the 2 fields": {"train.csv": "text,label\na,1\nb", "test.jsonl": "{}"},
    "which is none of": {
        "train.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": 2}',
        "test.jsonl": '{"text": "a", "label": 3}',
    },
    "must be texts": {
        "train.jsonl": '{"text": null, "label": 1}\n{"text": "b", "label": 2}',
        "test.jsonl": '{"text": "a", "label": 1}',
    },
    "none of 1 rows has a label": {
        "train.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": 2}',
        "test.jsonl": '{"text": "a", "label": null}',
    },
    "train.csv, train.jsonl all hold the same split": {
        "train.jsonl": "",
        "train.csv": "text,label",
        "test.jsonl": "{}",
    },
    "of 3 shards of a split only train-00001-of-00003": {"train-00001-of-00003.jsonl": "", "test.jsonl": "{}"},
    "train.old.* are both": {"train.jsonl": "", "train.old.jsonl": "", "test.jsonl": "{}"},
    "1 different values": {"train.jsonl": '{"text": "a", "label": 1}', "test.jsonl": '{"text": "a", "label": 1}'},
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_said(message, tmp_path):
    write(tmp_path / "mine", BAD[message])
    with pytest.raises(UserError, match=message):
        load(find_task("mine:text"), tmp_path)


def test_negative_classes_of_ones_own_are_classes(tmp_path):
    """-1 is GLUE's and the hub's word for a test row without its label, and nobody else's."""
    rows = [{"text": f"a {i}", "label": i % 3 - 1} for i in range(30)] + [{"text": "?", "label": None}]
    write(tmp_path / "mine", {f"{split}.jsonl": "\n".join(map(json.dumps, rows)) for split in ("train", "test")})
    data = load(find_task("mine:text"), tmp_path)
    assert sorted(data.labels) == ["-1", "0", "1"] and len(data.reported["test"]) == 30 and data.unlabelled == 2
    rows = [{"sentence1": row["text"], "label": str(row["label"])} for row in rows[:30]]
    write(tmp_path / "mine", {f"{split}.jsonl": "\n".join(map(json.dumps, rows)) for split in ("train", "test")})
    assert {e.target for e in load(find_task("mine:regression"), tmp_path).reported["test"]} == {-1.0, 0.0, 1.0}


def test_classes_that_datasets_wrote_as_numbers_go_by_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    tags = Sequence(ClassLabel(names=["O", "B-PER", "I-PER"]))
    rows = {"tokens": [[f"Ada{i}", "wrote"] for i in range(9)], "ner_tags": [[1, 0]] * 9}
    found = Dataset.from_dict(rows, features=Features({"tokens": Sequence(Value("string")), "ner_tags": tags}))
    (tmp_path / "mine").mkdir()
    for split in ("train", "test"):
        found.to_parquet(tmp_path / "mine" / f"{split}.parquet")
    data = load(find_task("mine:tokens"), tmp_path)
    assert data.labels == ("B-PER", "O") and data.reported["test"][0].target == (0, 1)
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "mine" / "train.parquet")
    with pytest.raises(UserError, match="tags are numbers"):
        load(find_task("mine:tokens"), tmp_path)


def test_only_what_is_needed_is_read_and_torn_rows_of_a_distribution_are_counted(tmp_path):
    cola = {**DISTRIBUTED["cola"][0], "test.tsv": "index\tsentence\n0\tNobody has labelled this."}
    write(tmp_path / "cola", cola)
    assert len(load(find_task("cola"), tmp_path).reported["validation"]) == len(WORDS)
    qqp = DISTRIBUTED["qqp"][0]
    write(tmp_path / "qqp", {**qqp, "train.tsv": qqp["train.tsv"] + '"\tWas there a second line?\t0\n'})
    data = load(find_task("qqp"), tmp_path)
    assert data.torn == 1 and len(data.train) + len(data.selection) == len(WORDS)


def test_translated_training_data_are_tested_on_the_same_files(tmp_path):
    files = DISTRIBUTED["xnli"][0]
    write(tmp_path / "xnli", files)
    write(
        tmp_path / "xnli-translate-train",
        {"train.fr.tsv": files["train.fr.tsv"], "train.en.tsv": files["train.en.tsv"]},
    )
    assert list(load(find_task("xnli-translate-train"), tmp_path).reported) == ["test.fr", "test.sw"]


def test_rows_in_a_list_and_words_that_look_like_comments(tmp_path):
    rows = [{"text": f"a {i}", "label": float(i % 2)} for i in range(9)]
    whole = [{**row, "label": int(row["label"])} for row in rows]
    write(tmp_path / "mine", {"train.json": json.dumps(rows, indent=1), "test.json": json.dumps(whole)})
    assert len(load(find_task("mine:text"), tmp_path).reported["test"]) == 9
    conll = "# sent_id = 1\n# NN I-NP O\none CD I-NP B-NUM\n\n# text of another line\nAda NNP B-NP B-PER\n\n"
    write(tmp_path / "words", {"train.conll": conll, "test.conll": conll})
    found = load(find_task("words:tokens"), tmp_path).reported["test"]
    assert [example.texts for example in found] == [("#", "one"), ("Ada",)]


def test_answers_stand_where_they_are_said_to(tmp_path):
    """White space at an edge does not count, an empty answer is none, and bytes are no characters."""

    def put(text, begin, listed=False):
        given = [{"text": text, "answer_start": begin}] if listed else {"text": [text], "answer_start": [begin]}
        rows = [{"question": f"q{i}", "context": f"Größe: the cat {i}", "answers": given} for i in range(4)]
        write(tmp_path / "mine", {f"{split}.jsonl": "\n".join(map(json.dumps, rows)) for split in ("train", "test")})
        return load(find_task("mine:span"), tmp_path).reported["test"][0].target

    assert put(" cat ", 10) == put("cat", 11) == put("cat", 11, listed=True) == (("cat", 11),)
    assert put("", -1) == ()
    with pytest.raises(UserError, match="begin at character 13"):
        put("cat", 13)


def test_few_texts_that_come_many_times_give_no_more_than_a_tenth(tmp_path):
    rows = [{"sentence1": f"topic {i % 3}", "sentence2": f"b {i}", "label": i % 2} for i in range(300)]
    write(tmp_path / "mine", {f"{split}.jsonl": "\n".join(map(json.dumps, rows)) for split in ("train", "test")})
    data = load(find_task("mine:pair"), tmp_path)
    assert (len(data.train), len(data.selection)) == (270, 30)
    assert {e.texts[0] for e in data.train} == {"topic 0", "topic 1", "topic 2"}


def test_names_of_tasks():
    assert [task.name for task in find_tasks("sst2, rte,mine:text")] == ["sst2", "rte", "mine"]
    for names in ("sst3", "mine:texts", "sst2:text", "", "../x:text", "mine:text,mine:pair"):
        with pytest.raises(UserError):
            find_tasks(names)
