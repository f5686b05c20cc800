"""Students of every architecture, as the field's classes load and fine-tune them."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from data_prep.errors import UserError
from pipeline.encoders.architectures import ARCHITECTURES
from pipeline.encoders.models import StudentShape, build_student, teacher_config
from pipeline.shipping import huggingface
from pipeline.tasks.vectors import load_encoder
from tests import toy
from tests.pipeline.encoders.test_models import EXTRA

HEAD = {  # what fine-tuned teachers carry along
    "id2label": {"0": "good", "1": "bad", "2": "ugly"},
    "problem_type": "multi_label_classification",
    "finetuning_task": "sst2",
    "classifier_dropout": 0.7,
}
LOSSES = {
    "SequenceClassification": dict(labels=torch.tensor([0, 1])),
    "TokenClassification": dict(labels=torch.zeros(2, 8, dtype=torch.long)),
    "QuestionAnswering": dict(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([2, 3])),
}


@pytest.fixture(scope="module")
def teachers(samples, tmp_path_factory):
    """Folder of a random teacher of an architecture, with a head's fields in its configuration."""
    texts, made = toy.first_texts(samples.leads(), 50), {}

    def teacher(kind):
        if kind not in made:
            folder = toy.make_teacher(tmp_path_factory.mktemp(kind), texts, model_type=kind, **EXTRA.get(kind, {}))
            config = json.loads((folder / "config.json").read_text()) | HEAD
            (folder / "config.json").write_text(json.dumps(config))
            made[kind] = folder
        return made[kind]

    return teacher


def make_student(teacher, folder):
    """A student of random weights, and its folder as an export has it."""
    folder.mkdir(exist_ok=True)
    student = build_student(StudentShape.parse("2x24", heads=4), teacher_config(str(teacher))).eval()
    huggingface.write_tokenizer(teacher, folder, seq_tokens=32)
    huggingface.write_model(student.backbone, folder)
    huggingface.check_reload(student.backbone, teacher, folder)
    return student


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_loads_whole_and_takes_a_step_in_every_head(kind, teachers, tmp_path):
    make_student(teachers(kind), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not set(HEAD) & set(config) and "label2id" not in config
    tokens = AutoTokenizer.from_pretrained(tmp_path)(
        ["a text", "a longer one " * 9], padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for head, labels in LOSSES.items():
        model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path).train()
        assert model.config.num_labels == 2 and model.config.problem_type is None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = next(model.parameters()).detach().clone()
        model(**tokens, **labels).loss.backward()
        optimizer.step()
        assert not torch.equal(before, next(model.parameters()))


def test_a_weight_too_large_for_fp16_is_refused(teachers, tmp_path):
    student = make_student(teachers("bert"), tmp_path / "a")
    with torch.no_grad():
        student.backbone.embeddings.word_embeddings.weight[3, 3] = 1e6
    (tmp_path / "b").mkdir()
    with pytest.raises(
        UserError, match="1 weights are not finite numbers in torch.float16, such as those of embeddings"
    ):
        huggingface.write_model(student.backbone, tmp_path / "b", dtype=torch.float16)


def test_a_folder_that_differs_is_noticed(teachers, tmp_path):
    student = make_student(teachers("roberta"), tmp_path)
    with torch.no_grad():
        student.backbone.encoder.layer[1].output.dense.bias[0] += 1
    with pytest.raises(RuntimeError, match="differs from the one written"):
        huggingface.check_reload(student.backbone, teachers("roberta"), tmp_path)


def test_what_a_teacher_asks_of_every_call_is_not_the_students(samples, tmp_path):
    """Tuples for outputs would end the export, attentions the training, hidden states fill the consumer's memory."""
    folder = toy.make_teacher(tmp_path / "teacher", toy.first_texts(samples.leads(), 50))
    config = json.loads((folder / "config.json").read_text())
    asked = dict(return_dict=False, output_hidden_states=True, output_attentions=True, model_max_length=77)
    (folder / "config.json").write_text(json.dumps(config | asked))
    make_student(folder, tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert not set(asked) & set(written)
    assert load_encoder(str(folder)).config.return_dict


def test_a_tokenizer_is_written_in_words_that_older_libraries_know_and_never_without_its_vocabulary(teachers, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(teachers("modernbert"), source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["[X]", "[Y]"]}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(source).save_pretrained(source)  # [X] and [Y] come into its vocabulary
    make_student(source, tmp_path / "student")
    written = json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert written["additional_special_tokens"] == ["[X]", "[Y]"] and "extra_special_tokens" not in written
    mine, given = AutoTokenizer.from_pretrained(tmp_path / "student"), AutoTokenizer.from_pretrained(source)
    assert mine("a [X] text")["input_ids"] == given("a [X] text")["input_ids"]
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        huggingface.write_tokenizer(source, tmp_path / "student", seq_tokens=32)
