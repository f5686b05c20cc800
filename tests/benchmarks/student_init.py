"""Which first weights help a student after equal steps, and which tail gives features without fine-tuning.

    python tests/benchmarks/student_init.py [--steps 300] [--seeds 2] [--only random slice ...]

Distils the sample teacher's layer into a small student on the sample's English articles, with the paper's optimizer and
schedule, once for every initialisation and seed. Printed is the loss on held-out windows as training goes on (without
dropout), and the share of articles whose topic a linear classifier finds from the mean last hidden state, with the tail
as it is ("random") and zeroed ("identity").
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep import samples  # noqa: E402
from pipeline.encoders.models import StudentShape, build_student, load_teacher, teacher_config  # noqa: E402
from pipeline.encoders.student_init import clear_tail  # noqa: E402
from pipeline.relations.loss import relation_loss  # noqa: E402

POSITIONS, ROWS, HELD_OUT_ROWS, PROBE_ARTICLES = 128, 16, 64, 1200


def articles(folder: Path) -> tuple[list[str], list[str]]:
    """Texts and topics."""
    lines = (folder / samples.LEADS.format(language="en")).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)  # the file is sorted by topic
    return [row["text"] for row in rows], [row["topic"] for row in rows]


def windows(tokenizer, texts: list[str]) -> torch.Tensor:
    """The texts end to end, cut into samples [n, POSITIONS]."""
    ids = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    stream = torch.tensor([token for text in ids for token in (*text, tokenizer.sep_token_id)])
    body = stream[: len(stream) // (POSITIONS - 2) * (POSITIONS - 2)].view(-1, POSITIONS - 2)
    ends = [torch.full((len(body), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return torch.cat([ends[0], body, ends[1]], 1)


def train(student, teacher, data: torch.Tensor, held_out: torch.Tensor, options, seed: int) -> dict[int, float]:
    """Held-out loss by step."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    warmup = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (options.steps - step) / (options.steps - warmup))
    )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    losses = {}
    for step in range(options.steps + 1):
        if step % (options.steps // 4) == 0:
            losses[step] = held_out_loss(student, teacher, held_out, options)
        if step == options.steps:
            return losses
        ids = data[order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(order)]]
        with torch.no_grad():
            wanted = teacher(ids)
        relation_loss(wanted, student(ids), heads=options.heads).total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(student, teacher, held_out: torch.Tensor, options) -> float:
    student.eval()
    losses = [relation_loss(teacher(ids), student(ids), heads=options.heads).total for ids in held_out.split(ROWS)]
    student.train()
    return float(torch.stack(losses).mean())


@torch.no_grad()
def probe(student, tokenizer, texts: list[str], topics: list[str]) -> float:
    """Accuracy of a ridge classifier on half of the articles, fitted on the other half."""
    student.eval()
    features = []
    for start in range(0, len(texts), 50):
        batch = tokenizer(
            texts[start : start + 50], truncation=True, max_length=POSITIONS, padding=True, return_tensors="pt"
        )
        hidden = student.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weight = batch["attention_mask"][..., None]
        features.append((hidden * weight).sum(1) / weight.sum(1))
    x = torch.cat(features).double()
    x = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(len(x), 1)], 1)
    names = sorted(set(topics))
    y = torch.tensor([names.index(topic) for topic in topics])
    half = len(x) // 2
    a, targets = x[:half], torch.nn.functional.one_hot(y[:half], len(names)).double()
    weights = torch.linalg.solve(a.T @ a + 10.0 * torch.eye(a.shape[1]), a.T @ targets)
    return float(((x[half:] @ weights).argmax(1) == y[half:]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--shape", default="3x192")
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=["random", "embeddings", "slice", "pca"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = samples.fetch(log=lambda line: None)
    model = str(folder / samples.TEACHER)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts, topics = articles(folder)
    data = windows(tokenizer, texts[:-PROBE_ARTICLES])
    held_out = windows(tokenizer, texts[-PROBE_ARTICLES:])[:HELD_OUT_ROWS]
    teacher = load_teacher(model, layer=options.layer)
    print(f"{options.shape} from layer {options.layer}, {options.steps} steps of {ROWS} x {POSITIONS}, lr {options.lr}")
    for init in options.only:
        curves, scores = [], {"random": [], "identity": []}
        began = time.perf_counter()
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            student = build_student(
                StudentShape.parse(options.shape), teacher_config(model), init=init, seed=seed, teacher_model=model
            )
            curves.append(train(student, teacher, data, held_out, options, seed))
            probed = (tokenizer, texts[-PROBE_ARTICLES:], topics[-PROBE_ARTICLES:])
            scores["random"].append(probe(student, *probed))
            with torch.no_grad():
                clear_tail(student)
            scores["identity"].append(probe(student, *probed))
        losses = "  ".join(f"{step}: {statistics.mean(c[step] for c in curves):.4f}" for step in curves[0])
        spread = max(c[options.steps] for c in curves) - min(c[options.steps] for c in curves)
        tails = "  ".join(f"{tail} {statistics.mean(values):.3f}" for tail, values in scores.items())
        seconds = (time.perf_counter() - began) / options.seeds
        between = f" (between seeds {spread:.4f})" if options.seeds > 1 else ""
        print(f"{init:11} loss {losses}{between}  topics {tails}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
