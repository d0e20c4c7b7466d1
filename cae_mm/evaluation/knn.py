"""k nearest neighbours on features, without any training.

Reference: DINO, https://github.com/facebookresearch/dino/blob/main/eval_knn.py: cosine similarity,
votes weighted by exp(similarity / 0.07).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SIMILARITIES = 2**26  # held at a time, 256 MiB


def check_neighbors(ks: Sequence[int], num_train: int) -> None:
    """Raise ValueError if there are not as many training images as neighbours are asked for."""
    for k in ks:
        if not 1 <= k <= num_train:
            raise ValueError(
                f'k = {k} neighbours were asked for, but there are {num_train} training images: '
                f'k must be from 1 to {num_train}'
            )


def knn_accuracies(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Share of ``val`` that its k nearest neighbours in ``train`` assign to the right class.

    Args:
        train: Features with shape (N, D).
        train_labels: Their class indices.
        val: Features with shape (M, D) on the same device.
        val_labels: Their class indices.
        ks: Numbers of neighbours.
        temperature: The smaller, the more do the nearest of them count.

    Returns:
        Accuracies in [0, 1] by k.
    """
    check_neighbors(ks, len(train))
    train = F.normalize(train, dim=1).T  # [D, N]
    num_classes = int(torch.cat([train_labels, val_labels]).max()) + 1
    correct = dict.fromkeys(ks, 0)
    chunk = max(MAX_SIMILARITIES // train.shape[1], 1)
    for queries, labels in zip(val.split(chunk), val_labels.split(chunk), strict=True):
        similarity = F.normalize(queries, dim=1) @ train  # [m, N]
        top, ids = similarity.topk(max(ks), dim=1)  # [m, K], nearest first
        weights = ((top - 1) / temperature).exp()  # minus 1: at most 1, the ratios stay
        for k in ks:
            votes = weights.new_zeros(len(queries), num_classes)
            votes.scatter_add_(1, train_labels[ids[:, :k]], weights[:, :k])  # [m, C]
            correct[k] += int((votes.argmax(1) == labels).sum())
    return {k: count / len(val) for k, count in correct.items()}
