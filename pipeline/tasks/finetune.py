"""One model fine-tuned on one task, with one learning rate and one seed, and scored.

Every model that is compared gets the same: the same examples, as many epochs, AdamW (weight decay 0.01) with a linear
decay after a warm-up of 10 %, batches of 32, gradients clipped to 1. Heads are always new: one that came with the
weights would be an advantage over those that have none. (The pooler below BERT's head for texts is the model's own, if
it has one.) Numbers are learned less their mean and over their deviation. The loop is `transformers.Trainer`.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.errors import UserError, first_line
from pipeline.encoders.architectures import plain_calls
from pipeline.tasks import features, metrics, spans
from pipeline.tasks.examples import Example, TaskData

BATCH_EXAMPLES, WARMUP_SHARE, WEIGHT_DECAY = 32, 0.1, 0.01


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried.

    Attributes:
        folder: of the model.
        lr: peak learning rate; None: nothing is trained.
        seed: of the new head, the order of examples and dropout.
        max_tokens: the length of the task, or what the shortest model of the comparison takes.
    """

    folder: str
    lr: float | None
    seed: int
    max_tokens: int


def fine_tune(trial: Trial, data: TaskData) -> dict[str, Any]:
    """Train and score; nothing is written.

    Returns:
        selection: the first metric on the part of the training split that chooses the learning rate.
        scores: split -> metric -> value and jackknife.
        loss, train_seconds, seconds, diverged.
    """
    began = time.perf_counter()
    tokenizer = load_tokenizer(trial.folder, data.task.kind)
    if data.task.is_frozen:
        return {"selection": None, "scores": _retrieve(trial, tokenizer, data), "seconds": time.perf_counter() - began}
    with tempfile.TemporaryDirectory(prefix="minilm-evaluate-") as scratch:
        trainer = _trainer(trial, tokenizer, data, scratch)
        train_began = time.perf_counter()
        loss = trainer.train().training_loss
        train_seconds = time.perf_counter() - train_began
        scorer = _Scorer(trainer, tokenizer, data, trial.max_tokens)
        selection = scorer.select()
        scores = {split: scorer.score(split) for split in data.reported}
    return {
        "selection": selection,
        "scores": scores,
        "diverged": scorer.diverged or not np.isfinite(loss),
        "loss": float(loss) if np.isfinite(loss) else None,
        "train_seconds": train_seconds,
        "seconds": time.perf_counter() - began,
    }


def load_tokenizer(folder: str, kind: str):
    """The tokenizer of a model; words that come one by one need one that sets a space before each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if kind == "tokens" and getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, add_prefix_space=True)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {folder} has no fast form (tokenizer.json), which the tasks need")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def load_model(folder: str, data: TaskData, seed: int):
    """The model's encoder under a new head for the task.

    Raises:
        UserError: the folder lacks weights of its architecture, or there is no such head for it.
    """
    import transformers
    from transformers import AutoConfig, AutoModel, set_seed

    kinds = {"tokens": "TokenClassification", "span": "QuestionAnswering"}
    auto = getattr(transformers, f"AutoModelFor{kinds.get(data.task.kind, 'SequenceClassification')}")
    head: dict[str, Any] = {"num_labels": len(data.labels)} if data.labels else {}
    if data.task.kind == "regression":
        head = {"num_labels": 1, "problem_type": "regression"}
    elif data.task.kind in ("text", "pair"):
        head["problem_type"] = "single_label_classification"
    set_seed(seed)
    try:
        config = plain_calls(AutoConfig.from_pretrained(folder, trust_remote_code=False, **head))
        model = auto.from_config(config, dtype=torch.float32)
        encoder, report = AutoModel.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot fine-tune {folder} on {data.task.name}: {first_line(error)}") from error
    absent = [name for name in map(str, report["missing_keys"]) if "pooler" not in name]
    if absent or report["mismatched_keys"]:
        raise UserError(f"{folder} lacks weights of its architecture, such as {(absent or ['?'])[0]}")
    wanted = model.base_model.state_dict()
    weights = {name: weight for name, weight in encoder.state_dict().items() if name in wanted}
    model.base_model.load_state_dict(weights, strict=False)
    if missing := [name for name in wanted if name not in weights and "pooler" not in name]:
        raise UserError(f"{type(model).__name__} has weights that {folder} lacks, such as {missing[0]}")
    set_seed(seed)
    return model


def _trainer(trial: Trial, tokenizer, data: TaskData, scratch: str):
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = features.encode(tokenizer, _standardised(data), data.task.kind, trial.max_tokens).rows
    steps = -(-len(rows) // BATCH_EXAMPLES) * data.task.epochs
    on_gpu = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=BATCH_EXAMPLES,
        per_device_eval_batch_size=BATCH_EXAMPLES,
        num_train_epochs=data.task.epochs,
        learning_rate=trial.lr,
        warmup_steps=round(WARMUP_SHARE * steps),
        weight_decay=WEIGHT_DECAY,
        seed=trial.seed,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=load_model(trial.folder, data, trial.seed),
        args=settings,
        train_dataset=rows,
        data_collator=lambda chosen: features.pad(tokenizer, chosen),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _standardised(data: TaskData) -> list[Example]:
    """What is trained on; numbers, which are scored by correlations, have mean 0 and deviation 1."""
    if data.task.kind != "regression":
        return data.train
    numbers = np.array([example.target for example in data.train])
    scaled = (numbers - numbers.mean()) / (numbers.std() or 1.0)
    return [Example(texts=e.texts, target=float(number)) for e, number in zip(data.train, scaled, strict=True)]


class _Scorer:
    """The trained model's answers, scored."""

    def __init__(self, trainer, tokenizer, data: TaskData, max_tokens: int) -> None:
        self._trainer, self._tokenizer, self._data, self._max_tokens = trainer, tokenizer, data, max_tokens
        self._threshold = -np.inf
        self.diverged = False

    def select(self) -> float:
        """The first metric on what chooses the learning rate; there too the threshold of "no answer" is found."""
        task, examples = self._data.task, self._data.selection
        found, margins = self._answers(examples)
        if task.kind == "span" and not all(example.target for example in self._data.train):
            right = [[text for text, _ in example.target] for example in examples]
            self._threshold = spans.no_answer_threshold(margins, found, right)
            found = self._silenced(found, margins)
        gold, found = self._as_scored(examples, found, "")
        return metrics.metric_of(task.metrics[0], task.kind)(gold, found)

    def score(self, split: str) -> dict[str, Any]:
        """Every metric of a reported split."""
        task, examples = self._data.task, self._data.reported[split]
        found = self._silenced(*self._answers(examples))
        gold, found = self._as_scored(examples, found, split.partition(".")[2] or "en")
        return {name: metrics.scores(name, task.kind, gold, found) for name in task.metrics}

    def _answers(self, examples: Sequence[Example]) -> tuple[list[Any], list[float]]:
        kind = self._data.task.kind
        made = features.encode(self._tokenizer, examples, kind, self._max_tokens)
        output = self._predict(made.rows)
        return features.answers(kind, output, made, examples)

    @torch.no_grad()
    def _predict(self, rows: list[dict[str, Any]]) -> Any:
        """A model's scores in the order of the rows, which are run with others of their length."""
        model = self._trainer.model.eval()
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        names = ("start_logits", "end_logits") if self._data.task.kind == "span" else ("logits",)
        outputs: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
        for start in range(0, len(order), BATCH_EXAMPLES):
            chosen = order[start : start + BATCH_EXAMPLES]
            batch = features.pad(self._tokenizer, [rows[i] for i in chosen])
            labels = ("labels", "start_positions", "end_positions")
            inputs = {name: value.to(model.device) for name, value in batch.items() if name not in labels}
            result = model(**inputs)
            for name in names:
                values = getattr(result, name).float()
                self.diverged |= not bool(values.isfinite().all())
                for i, value in zip(chosen, values.nan_to_num().cpu().numpy(), strict=True):
                    outputs[name][i] = value
        if self._data.task.kind == "span":
            return [outputs[name] for name in names]
        if self._data.task.kind == "tokens":
            return [value.argmax(1) for value in outputs["logits"]]
        return np.stack(outputs["logits"])

    def _silenced(self, found: list[Any], margins: list[float]) -> list[Any]:
        if not margins or self._threshold == -np.inf:
            return found
        return ["" if margin < self._threshold else text for text, margin in zip(found, margins, strict=True)]

    def _as_scored(self, examples: Sequence[Example], found: list[Any], language: str) -> tuple[list[Any], list[Any]]:
        """Right answers and those found, as the metrics take them."""
        gold: list[Any] = [example.target for example in examples]
        if self._data.task.kind == "span":
            return [([text for text, _ in target], language or "en") for target in gold], found
        if self._data.task.kind == "tokens":
            names = metrics.scored_tags(self._data.labels)
            tags = [["O" if tag is None else names[tag] for tag in row] for row in found]
            return [[names[tag] for tag in row] for row in gold], tags
        return gold, found


def _retrieve(trial: Trial, tokenizer, data: TaskData) -> dict[str, Any]:
    """Ranks of each text's counterpart among all texts of the other side, by the cosine of mean-pooled vectors, both
    ways. A text that stands in several rows has a counterpart in each: the nearest counts."""
    from pipeline.tasks.vectors import embed, load_encoder, ranks

    model, scores = load_encoder(trial.folder), {}
    for split, examples in data.reported.items():
        texts = [list(dict.fromkeys(example.texts[side] for example in examples)) for side in (0, 1)]
        places = [{text: number for number, text in enumerate(side)} for side in texts]
        right = torch.zeros(len(texts[0]), len(texts[1]), dtype=torch.bool)
        for example in examples:
            right[places[0][example.texts[0]], places[1][example.texts[1]]] = True
        queries, documents = (embed(model, tokenizer, side, trial.max_tokens) for side in texts)
        found = ranks(queries, documents, right) + ranks(documents, queries, right.T)
        scores[split] = {
            name: metrics.scores(name, "retrieval", [None] * len(found), found) for name in data.task.metrics
        }
    return scores
