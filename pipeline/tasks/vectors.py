"""Texts as vectors, the mean of the last hidden state, and what can be read off them without training a model."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.relations.qkv import QKV

NEAREST, FEWEST_TEXTS = 10, 32  # neighbours of a text, and among how few texts that says nothing


def load_encoder(folder: str, trust_remote_code: bool = False):
    """A model as it is, in fp32 and eval mode, without a pooler, on the GPU if there is one."""
    from transformers import AutoConfig, AutoModel

    from pipeline.encoders.architectures import ARCHITECTURES, plain_calls, without_pooler

    trust = dict(trust_remote_code=trust_remote_code)
    config = plain_calls(AutoConfig.from_pretrained(folder, **trust))
    bare = without_pooler(config) if config.model_type in ARCHITECTURES else {}
    model = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, **trust, **bare)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def embed(model: nn.Module, tokenizer, texts: Sequence[str], seq_tokens: int, rows: int = 32) -> Tensor:
    """Mean of the last hidden state over real tokens: [texts, hidden]. Texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device = next(model.parameters()).device
    features: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        tokens = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=seq_tokens, return_tensors="pt"
        ).to(device)
        for i, feature in zip(chosen, pooled(model, tokens["input_ids"], tokens["attention_mask"]), strict=True):
            features[i] = feature.cpu()
    return torch.stack(features)


def pooled(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of the last hidden state over real tokens: [rows, hidden] of ids and mask [rows, positions]."""
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return mean_over_tokens(hidden, attention_mask)


def mean_over_tokens(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean over real tokens, fp32 [rows, hidden].

    Args:
        hidden: [rows, positions, hidden], of any precision; what stands at padding does not matter.
        attention_mask: [rows, positions], true where there is a real token; None: no padding.
    """
    if attention_mask is None:
        return hidden.mean(1, dtype=torch.float32)
    real = attention_mask.bool().unsqueeze(-1)
    return hidden.masked_fill(~real, 0).sum(1, dtype=torch.float32) / real.sum(1)


def qkv_vectors(qkv: QKV, attention_mask: Tensor | None) -> Tensor:
    """The means of a layer's queries, keys and values over real tokens, side by side: fp32 [rows, 3 hidden]."""
    return torch.cat([mean_over_tokens(x, attention_mask) for x in qkv], dim=1)


def ranks(queries: Tensor, documents: Tensor, right: Tensor) -> list[int]:
    """From 1, the rank of each query's nearest right document among those that are wrong, by cosine.

    Wrong ones that are just as near come first.

    Args:
        queries, documents: [queries, hidden], [documents, hidden].
        right: [queries, documents], true where they belong together; in each row somewhere.
    """
    scores = _unit(queries) @ _unit(documents).T
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return (((scores >= best) & ~right).sum(1) + 1).tolist()


def neighbours_in_common(one: Tensor, other: Tensor, k: int = NEAREST) -> float:
    """Mean share of the k nearest of each text, by cosine, that two models agree on; [texts, hidden] each.

    Means are taken off first: vectors of untuned encoders all point the same way.
    """
    k = min(k, len(one) - 1)
    near = []
    for vectors in (one, other):
        unit = _unit(vectors - vectors.mean(0))
        near.append((unit @ unit.T).fill_diagonal_(-2).topk(k).indices)
    both = (near[0].unsqueeze(2) == near[1].unsqueeze(1)).any(2)
    return both.float().mean().item()


def linear_probe(train: Tensor, train_labels: list[int], test: Tensor, test_labels: list[int], decay=1e-3) -> float:
    """Accuracy of logistic regression with an L2 penalty of `decay`, on standardised features [texts, hidden]."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    goal, truth = torch.tensor(train_labels), torch.tensor(test_labels)
    probe = nn.Linear(train.shape[1], int(max(goal.max(), truth.max())) + 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(probe(train), goal) + decay * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (probe(test).argmax(1) == truth).float().mean().item()


@torch.no_grad()
def forward_speed(models: dict[str, nn.Module], seq_tokens: int, rows: int = 8, runs: int = 5) -> dict[str, float]:
    """Tokens a second of a forward pass of full rows; the models take turns, the median of the runs counts."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    for run in range(runs + 1):
        for name, model in models.items():
            ids = torch.randint(5, model.config.vocab_size, (rows, seq_tokens), generator=generator)
            ids = ids.to(next(model.parameters()).device)
            began = time.perf_counter()
            model(input_ids=ids).last_hidden_state.sum().item()  # waits for a GPU
            if run:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    return {name: rows * seq_tokens / statistics.median(times) for name, times in seconds.items()}


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors.float(), dim=1)
