"""A student as the field's libraries want it: weights, configuration and tokenizer, without what was the teacher's.

The pooler. A relation-distilled student has none, and yet the class that `AutoModel` picks for BERT, RoBERTa, XLM-R or
MPNet wants one, would make it of random numbers and say so. The exported one passes the first token on: its matrix is
the identity and its bias zero, so that `pooler_output = tanh(last_hidden_state[:, 0])`. Nothing is random in
it and nothing was learned, and fine-tuning begins at the features themselves.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from data_prep import durable
from data_prep.errors import UserError
from pipeline.encoders.architectures import PLAIN_CALLS, architecture_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PROBE = "The exported model computes what the trained one did."

# What a configuration says of a task's head, or of the place where the teacher lay.
_FOREIGN_FIELDS = (
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("classifier_dropout", "seq_classif_dropout", "qa_dropout", "pooler_dropout", "pooler_hidden_act"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout", "summary_hidden_size"),
    *("classifier_pooling", "classifier_bias", "classifier_activation", "sparse_prediction", "_name_or_path"),
    *("sentence_transformers", "sbert_ce_default_activation_function", "_num_labels", "label_names", "adapters"),
    *("quantization_config", "auto_map", "gradient_checkpointing", "output_past", "tokenizer_class"),
    *("max_seq_length", "model_max_length", *PLAIN_CALLS),
)
# What a tokenizer's settings say of one machine, one call or one use.
_FOREIGN_SETTINGS = (
    *("local_files_only", "is_local", "name_or_path", "cache_dir", "token", "use_auth_token", "trust_remote_code"),
    *("tokenizer_file", "special_tokens_map_file", "_commit_hash", "auto_map", "processor_class"),
    *("max_length", "stride", "truncation_strategy", "padding", "truncation", "pad_to_multiple_of", "max_len"),
)


def load_exported(folder: Path) -> "PreTrainedModel":
    """The model of an exported folder, in fp32 and eval mode, without the pooler, which was not trained."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    if architecture_of(model.config).has_pooler:
        model.pooler = None
    return model.eval()


def write_model(backbone: "PreTrainedModel", folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and configuration; the folder then loads without a word about missing weights.

    Args:
        backbone: without a pooler; it is left as it was.
        folder: where they go.
        dtype: of the weights.

    Raises:
        UserError: the disk is full, or a weight is too large for fp16.
    """
    model = with_pooler(backbone, clean_config(backbone.config)).to(dtype)
    infinite = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if infinite:
        raise UserError(
            f"{len(infinite)} weights are not finite numbers in {dtype}, such as those of {infinite[0]}; nothing was "
            f"written. {'Choose fp32 or bf16' if dtype == torch.float16 else 'Take an earlier checkpoint with --step'}."
        )
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, as its library says it
        raise UserError(f"no model can be written in {folder}: {error}. Nothing was left there") from error
    path = folder / "config.json"
    values = json.loads(path.read_bytes())  # the library writes defaults too
    durable.write(path, json.dumps({k: v for k, v in values.items() if k not in _FOREIGN_FIELDS}, indent=2) + "\n")


def with_pooler(backbone: "PreTrainedModel", config: "PretrainedConfig") -> "PreTrainedModel":
    """A copy of an encoder as its class wants to be: with a pooler that passes the first token on, if it has one."""
    from transformers import AutoModel

    model = AutoModel.from_config(config, dtype=torch.float32)
    result = model.load_state_dict(backbone.state_dict(), strict=False)
    if result.unexpected_keys or any(not key.startswith("pooler.") for key in result.missing_keys):
        raise RuntimeError(f"the student's weights are not those of its configuration: {result}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in result.missing_keys:
                torch.nn.init.eye_(parameter) if parameter.dim() == 2 else torch.nn.init.zeros_(parameter)
    return model.eval()


def clean_config(config: "PretrainedConfig") -> "PretrainedConfig":
    """A copy without what belonged to a head of the teacher's: those fields are as the class begins with."""
    kind = type(config)
    values, fresh = config.to_dict(), kind().to_dict()
    for name in _FOREIGN_FIELDS:
        values.pop(name, None)
        if name in fresh:
            values[name] = fresh[name]
    if "pooler_hidden_size" in values:  # the teacher's width, to which no head of the student would fit
        values["pooler_hidden_size"] = config.hidden_size
    return kind.from_dict(values)


def write_tokenizer(source: Path, folder: Path, *, seq_tokens: int) -> None:
    """Copy a tokenizer's files; what they say of another machine or another use is left out.

    Args:
        source: folder of the tokenizer; a configuration in it is not copied.
        folder: where they go.
        seq_tokens: the longest input, as the student was trained.

    Raises:
        UserError: a file is damaged, or there is no vocabulary.
    """
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source / 'tokenizer.json'} is missing: copy the run again")
    for path in sorted(path for path in source.iterdir() if path.is_file() and path.name != "config.json"):
        content = path.read_bytes()  # not the modes of a run that may be read-only
        if path.name == "tokenizer_config.json":
            content = _edited(path, content, _clean_settings(seq_tokens))
        elif path.name == "tokenizer.json":
            content = _edited(path, content, lambda values: {**values, "truncation": None, "padding": None})
        durable.write(folder / path.name, content)


def _clean_settings(seq_tokens: int):
    def cleaned(settings: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in settings.items() if name not in _FOREIGN_SETTINGS}
        if kept.get("tokenizer_class") == "TokenizersBackend":  # as transformers 5 writes what 4 knows by another name
            kept["tokenizer_class"] = "PreTrainedTokenizerFast"
            kept.setdefault("model_input_names", ["input_ids", "attention_mask"])  # to which 4 would add token types
        if isinstance(kept.get("extra_special_tokens"), list):
            kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
        return {**kept, "model_max_length": seq_tokens}

    return cleaned


def _edited(path: Path, content: bytes, edit) -> str:
    try:
        return json.dumps(edit(json.loads(content)), indent=2, ensure_ascii=False) + "\n"
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): copy the run again") from None


def check_reload(
    backbone: "PreTrainedModel", tokenizer: Path, folder: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """The folder must give back the same model: the same weights, nothing missing, and in fp32 the same output; and a
    tokenizer with the vocabulary and special tokens of the one in the folder `tokenizer`."""
    from transformers import AutoModel, AutoTokenizer

    mine, given = (AutoTokenizer.from_pretrained(place, trust_remote_code=False) for place in (folder, tokenizer))
    if (mine.get_vocab(), sorted(mine.all_special_ids)) != (given.get_vocab(), sorted(given.all_special_ids)):
        raise RuntimeError(f"the tokenizer read back from {folder} differs from the one in {tokenizer}")
    tokens = mine(_PROBE, return_tensors="pt")
    theirs, report = AutoModel.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    if problems := {name: found for name, found in report.items() if found}:
        raise RuntimeError(f"the model in {folder} does not load whole: {problems}")
    read = theirs.state_dict()
    same = all(torch.equal(read[name], weight.to(dtype)) for name, weight in backbone.state_dict().items())
    if same and dtype == torch.float32:
        with torch.no_grad():
            ours, theirs = (model.eval()(**tokens).last_hidden_state for model in (backbone, theirs))
        same = torch.equal(ours, theirs)
    if not same:
        raise RuntimeError(f"the model read back from {folder} differs from the one written")


def agreement(backbone: "PreTrainedModel", folder: Path) -> float:
    """The lowest cosine between a token's last hidden state here and as the exported weights, rounded, give it."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(_PROBE, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (model.eval()(**tokens).last_hidden_state for model in (backbone, load_exported(folder)))
    return torch.cosine_similarity(ours, theirs, dim=-1).min().item()
