"""What bertdistiller's own trainer makes of a run's untrained student in the time that the run took; for proof.py.

The same teacher, first weights, relations, samples, batch, optimizer and shape of the schedule, on as many threads.
bertdistiller needs an interpreter of its own (see step.py), which runs this file too: `peer.py SETTINGS.json`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, TrainerCallback


def train(python: str, run, student: Path, folder: Path) -> Path:
    """The trained model's folder, made where it is missing.

    Args:
        python: the interpreter that has bertdistiller.
        run: a `FinishedRun` on this machine.
        student: its student before the first step, with a tokenizer.
    """
    from pipeline.results import compare

    if (folder / "whole").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("whole"))
    options, (ours,) = run.recipe.optimizer, compare.read([run.folder])
    *_, (_, seconds, _) = ours.training
    settings = {
        "teacher": run.recipe.teacher.model,
        "student": str(folder),
        "samples": str(folder / "samples.npy"),
        "layer": run.recipe.teacher.layer,
        "heads": run.recipe.relations.heads,
        "rows": options.global_batch_samples,
        "learning_rate": options.peak_lr,
        "adam": {name: getattr(options, name) for name in ("betas", "eps", "weight_decay")},
        "clip_norm": options.clip_norm,
        "warmup": options.warmup_steps / options.steps,
        "seconds": seconds,
    }
    np.save(settings["samples"], _samples(run.recipe))
    (folder / "settings.json").write_text(json.dumps(settings))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, __file__, folder / "settings.json"], check=True, env=environment)
    (folder / "samples.npy").unlink()
    (folder / "whole").touch()
    return folder


def _samples(recipe) -> np.ndarray:
    """Twice the samples of the run, in its order: token ids [samples, tokens]."""
    from masked_words import samples_of

    loader = samples_of(recipe)
    batches = zip(range(2 * recipe.optimizer.steps), loader, strict=False)
    rows = np.concatenate([batch.inputs(torch.device("cpu"))["input_ids"].numpy() for _, batch in batches])
    loader.close()
    return rows


class Samples(torch.utils.data.Dataset):
    def __init__(self, path: str) -> None:
        self._ids = torch.from_numpy(np.load(path).astype(np.int64))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[number], "attention_mask": torch.ones_like(self._ids[number])}


class Clock(TrainerCallback):
    """Ends the training when its time is over; the share that has passed sets the learning rate."""

    def __init__(self, seconds: float, warmup: float) -> None:
        self._seconds, self._warmup, self._began = seconds, warmup, None

    def passed(self) -> float:
        return 0.0 if self._began is None else min(1.0, (time.perf_counter() - self._began) / self._seconds)

    def factor(self, _: int) -> float:
        passed = self.passed()
        return min((passed + 1e-3) / self._warmup, (1 - passed) / (1 - self._warmup))

    def on_train_begin(self, *_, **__) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop = self.passed() >= 1


def main(settings: dict) -> None:
    from bertdistiller import MiniLMTrainer, MiniLMTrainingArguments

    torch.set_num_threads(os.cpu_count() or 1)
    teacher = AutoModel.from_pretrained(settings["teacher"])
    teacher.config.architectures = ["BertForMaskedLM"]  # the only name it accepts; the encoder is the same
    student = AutoModel.from_pretrained(settings["student"])
    clock = Clock(settings["seconds"], settings["warmup"])
    adam = torch.optim.AdamW(student.parameters(), settings["learning_rate"], **settings["adam"])
    trainer = MiniLMTrainer(
        model=student,
        teacher_model=teacher,
        train_dataset=Samples(settings["samples"]),
        optimizers=(adam, torch.optim.lr_scheduler.LambdaLR(adam, clock.factor)),
        callbacks=[clock],
        args=MiniLMTrainingArguments(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=50,
            max_steps=1_000_000,
            per_device_train_batch_size=settings["rows"],
            max_grad_norm=settings["clip_norm"],
            teacher_layer=settings["layer"],
            student_layer=student.config.num_hidden_layers,
            student_hidden_size=student.config.hidden_size,
            student_attention_heads=student.config.num_attention_heads,
            num_relation_heads=settings["heads"],
        ),
    )
    done = trainer.train()
    student.save_pretrained(settings["student"])
    print(f"bertdistiller: {done.global_step} steps in {settings['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
