"""A model of a student's shape that learns without a teacher: BERT's masked words, on the student's own samples.

For proof.py. The same tokens in the same order, batch and schedule as the recipe's run; BERT's choice of words (15 %,
of which 80 % hidden and 10 % changed) and its head. Only chosen words go through the head, which changes no number.
"""

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

from data_prep import durable
from data_prep.shards import Corpus
from pipeline.config import Recipe
from pipeline.data.loader import Loader
from pipeline.encoders.models import student_config
from pipeline.engine.student import learning_rate_factor
from pipeline.shipping import huggingface
from pipeline.training.build import data_options, student_shape, teacher_settings

PEAK_LR = 1e-3


def train(recipe: Recipe, folder: Path) -> Path:
    """The trained model's folder, made where it is missing."""
    if (folder / "whole").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(recipe.run.seed)
    student, options = recipe.student, recipe.optimizer
    shape, teacher = student_shape(recipe), teacher_settings(recipe)
    sizes = student_config(shape, teacher, family=student.family, dropout=student.dropout)
    model = AutoModelForMaskedLM.from_config(sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher.model)
    hide = DataCollatorForLanguageModeling(tokenizer).torch_mask_tokens
    loader = samples_of(recipe)
    for step, batch in zip(range(options.steps), loader, strict=False):
        inputs = batch.inputs(torch.device("cpu"))
        loss = masked_loss(model, inputs["input_ids"], hide)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * learning_rate_factor(step, options)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"masked words: step {step + 1}/{options.steps}, loss {loss.item():.3f}", flush=True)
    loader.close()
    tokenizer.save_pretrained(folder)
    huggingface.write_model(model.base_model.eval(), folder)
    durable.write(folder / "whole", "")
    return folder


def samples_of(recipe: Recipe) -> Loader:
    """The samples of a run in its order, a step's at a time."""
    size = recipe.optimizer.global_batch_samples
    return Loader(
        Corpus.open(recipe.data.corpus), data_options(recipe), global_batch_samples=size, micro_batch_samples=size,
        rank=0, world_size=1, samples_seen=0,
    )  # fmt: skip


def masked_loss(model, ids: torch.Tensor, hide) -> torch.Tensor:
    """Cross-entropy of the hidden words; the rows' first and last tokens are special and stay."""
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, 0] = special[:, -1] = True
    shown, labels = hide(ids.clone(), special_tokens_mask=special)
    hidden = labels != -100
    states = model.base_model(shown).last_hidden_state[hidden]
    return torch.nn.functional.cross_entropy(model.cls(states), labels[hidden])
