"""The attentive probe on stored patch tokens: a sweep of learning rates in the time of one.

With a single query the products with keys and values can change places with the sum over patches:
scores are ``x @ (Wk^T q)``, and values are made of the D numbers that are left of an image. Tokens
are read once for all heads and all learning rates, which is what the time goes to.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from cae_mm.evaluation.encoder import quiet_init
from cae_mm.evaluation.linear import BATCH_SIZE, Split, hold_out
from cae_mm.models.probe import AttentiveProbeHead

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # the paper's is 0.0125 for 256 images
HEAD_WIDTH = 64  # of all encoders of the paper


def attentive_sweep(
    train: Split,
    val: Split,
    *,
    seed: int,
    device: str | torch.device,
    epochs: int,
    lrs: Sequence[float] = LEARNING_RATES,
) -> dict[str, Any]:
    """Attentive probe with the learning rate picked on a held-out part of the training images.

    High rates train well or fall over by chance. Where the picked one does so with all images, the
    next lower one is taken.

    Args:
        train: Patch tokens after the final norm, shape (n, N, D), and class indices (n,). The
            tokens may be a memory-mapped file.
        val: The same, to report on.
        seed: Of the held-out part, initial weights and order.
        device: To train on; tokens go there batch by batch.
        epochs: Of SGD with momentum 0.9, batch 256, cosine to 0, no weight decay.
        lrs: Learning rates to try, ascending.

    Returns:
        The picked ``lr``, its ``accuracy`` on ``val``, and ``held_out`` accuracies by rate.
    """
    tokens, labels = train
    (rows, _), (rows_out, _) = hold_out((np.arange(len(labels)), labels), seed)
    fit = partial(train_heads, tokens, labels, seed=seed, epochs=epochs, device=device)
    held_out = _accuracies(fit(rows=rows, lrs=lrs), tokens, labels, rows_out, device)
    best = int(np.argmax(held_out))
    for i in range(best, -1, -1):
        heads = fit(rows=np.arange(len(labels)), lrs=[lrs[i]])
        [seen] = _accuracies(heads, tokens, labels, rows_out, device)
        if seen >= held_out[i]:  # else it fell over this time: it was trained on these images now
            break
    [accuracy] = _accuracies(heads, *val, np.arange(len(val[1])), device)
    by_rate = dict(zip(lrs, held_out, strict=True))
    return {'lr': lrs[i], 'accuracy': accuracy, 'held_out': by_rate}


@torch.enable_grad()
def train_heads(
    tokens: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    lrs: Sequence[float],
    *,
    seed: int,
    epochs: int,
    device: str | torch.device,
) -> list[AttentiveProbeHead]:
    """Train one probe per learning rate on the images ``rows``, all on the same batches."""
    D = tokens.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = AttentiveProbeHead(
            num_classes=int(labels.max()) + 1,
            in_channels=D,
            num_heads=D // math.gcd(D, HEAD_WIDTH),
        )
        quiet_init(first)
    heads = [deepcopy(first).to(device).train() for _ in lrs]
    groups = [dict(params=[*h.parameters()], lr=lr) for h, lr in zip(heads, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    if len(rows) % BATCH_SIZE == 1:
        rows = rows[1:]  # BatchNorm has no statistics of a batch of one
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs * -(-len(rows) // BATCH_SIZE))
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), desc='attentive probe', unit=' epochs', leave=False):
        order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        for x, y in _batches(tokens, labels, order, device):
            optimizer.zero_grad()
            losses = [F.cross_entropy(scores, y) for scores in _classify(heads, x)]
            torch.stack(losses).sum().backward()
            optimizer.step()
            scheduler.step()
    return heads


def pool(heads: Sequence[AttentiveProbeHead], tokens: Tensor) -> list[Tensor]:
    """What the cross-attention of each probe makes of ``tokens``, (B, N, D) -> each (B, D)."""
    x = F.layer_norm(tokens, tokens.shape[-1:], eps=heads[0].norm_k.eps)  # without scale and bias
    queries = torch.cat([_query(head) for head in heads])  # [R*H, D] for R probes of H heads
    weights = (x @ queries.T).softmax(1)  # [B, N, R*H]
    mixed = (weights.mT @ x).chunk(len(heads), dim=1)  # R times [B, H, D]
    return [_value(head, each) for head, each in zip(heads, mixed, strict=True)]


def _classify(heads: Sequence[AttentiveProbeHead], tokens: Tensor) -> list[Tensor]:
    """Scores of each probe for the classes, (B, N, D) -> each (B, K)."""
    pooled = zip(heads, pool(heads, tokens), strict=True)
    return [head.fc(head.norm(each)) for head, each in pooled]


def _query(head: AttentiveProbeHead) -> Tensor:
    """What each head multiplies a normalised token with to get its score, shape (H, D)."""
    H, D = head.attn.num_heads, head.attn.q.in_features
    q = head.attn.q(head.norm_q(head.query_token)).view(H, 1, D // H) * (D // H) ** -0.5
    keys = head.attn.k.weight.view(H, D // H, D) * head.norm_k.weight
    return (q @ keys).squeeze(1)  # norm_k's bias adds the same to all scores of a head


def _value(head: AttentiveProbeHead, mixed: Tensor) -> Tensor:
    """Output of the attention whose heads mix normalised tokens to ``mixed``, shape (B, H, D)."""
    B, H, D = mixed.shape
    x = mixed * head.norm_v.weight + head.norm_v.bias
    values = torch.einsum('bhd,hed->bhe', x, head.attn.v.weight.view(H, D // H, D))
    return head.attn.proj(values.reshape(B, D) + head.attn.v.bias)


@torch.no_grad()
def _accuracies(
    heads: Sequence[AttentiveProbeHead],
    tokens: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    device: str | torch.device,
) -> list[float]:
    """Share of right answers of each probe."""
    right = [0] * len(heads)
    for head in heads:
        head.eval()
    for x, y in _batches(tokens, labels, rows, device):
        for i, scores in enumerate(_classify(heads, x)):
            right[i] += int((scores.argmax(1) == y).sum())
    return [count / len(rows) for count in right]


def _batches(
    tokens: np.ndarray, labels: np.ndarray, rows: np.ndarray, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows[start : start + BATCH_SIZE]
        yield (
            torch.from_numpy(np.asarray(tokens[part])).to(device),
            torch.from_numpy(labels[part]).to(device),
        )
