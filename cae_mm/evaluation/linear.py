"""Linear classifiers on features: logistic regression, and a sweep of learning rates by SGD.

C and the learning rate are picked on a part of the training features that is held out; the
validation features have no say.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

HELD_OUT = 0.2  # share of the training features
CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strength of the regularisation
MAX_ITER = 1000
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
BATCH_SIZE = 256
EPS = 1e-6  # as in the BatchNorm of the paper's linear probe

Split = tuple[np.ndarray, np.ndarray]  # features (N, D) float32, class indices (N,)


def check_class_sizes(labels: np.ndarray, names: Sequence[str]) -> None:
    """Raise ValueError if a class is too small for a part of it to be held out."""
    counts = np.bincount(labels, minlength=len(names))
    small = [name for name, count in zip(names, counts, strict=True) if count < 2]
    if small:
        raise ValueError(
            'a part of each class is held out to pick C and learning rate, but these have fewer '
            f'than two training images: {", ".join(small[:5])}. Add images, or choose --probes knn'
        )


def hold_out(train: Split, seed: int) -> tuple[Split, Split]:
    """Split off a stratified fifth of the training features, at least one image a class."""
    features, labels = train
    size = max(round(HELD_OUT * len(labels)), len(np.unique(labels)))
    x, x_out, y, y_out = train_test_split(
        features, labels, test_size=size, stratify=labels, random_state=seed
    )
    return (x, y), (x_out, y_out)


def logistic_regression(
    train: Split, val: Split, *, seed: int, cs: Sequence[float] = CS
) -> dict[str, Any]:
    """Fit scikit-learn's logistic regression on standardised features.

    Each of ``cs`` is tried on a held-out part of ``train``, the best (of equally good ones the
    first) is then fitted to all.

    Returns:
        ``C``, the ``accuracy`` on ``val``, ``held_out`` accuracies by C, and ``not_converged``,
        the values of C whose fit stopped at ``MAX_ITER`` iterations.
    """
    part, held_out = hold_out(train, seed)
    not_converged = set()

    def score(C: float, fit_to: Split, judge_on: Split) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=MAX_ITER))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', ConvergenceWarning)
            model.fit(*fit_to)
        if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            not_converged.add(C)
        return float(model.score(*judge_on))

    bar = tqdm(cs, desc='logistic regression', unit=' C', leave=False)
    accuracies = {C: score(C, part, held_out) for C in bar}
    best = max(accuracies, key=accuracies.__getitem__)
    return {
        'C': best,
        'accuracy': score(best, train, val),
        'held_out': accuracies,
        'not_converged': sorted(not_converged),
    }


def linear_sweep(
    train: Split,
    val: Split,
    *,
    seed: int,
    device: str | torch.device,
    epochs: int,
    lrs: Sequence[float] = LEARNING_RATES,
) -> dict[str, Any]:
    """Linear probe with the learning rate picked on held-out training features.

    Two sweeps of ``lrs``, which are for batch size 256: one that leaves out the held-out part and
    picks, of equally good ones the first, and one on all of ``train``.

    Returns:
        The picked ``lr``, its ``accuracy`` on ``val``, and ``held_out`` and ``val`` accuracies by
        learning rate.
    """

    def sweep(fit_to: Split, judge_on: Split) -> dict[float, float]:
        x, y, x_judge, y_judge = (
            torch.as_tensor(array, device=device) for array in (*fit_to, *judge_on)
        )
        var, mean = torch.var_mean(x, dim=0, unbiased=False)
        x, x_judge = (F.batch_norm(features, mean, var, eps=EPS) for features in (x, x_judge))
        models = train_sweep(x, y, lrs, seed=seed, epochs=epochs)
        right = [model(x_judge).argmax(1) == y_judge for model in models]
        return {lr: r.double().mean().item() for lr, r in zip(lrs, right, strict=True)}

    on_held_out, on_val = sweep(*hold_out(train, seed)), sweep(train, val)
    best = max(lrs, key=on_held_out.__getitem__)
    return {'lr': best, 'accuracy': on_val[best], 'held_out': on_held_out, 'val': on_val}


@torch.enable_grad()
def train_sweep(
    x: Tensor, y: Tensor, lrs: Sequence[float], *, seed: int, epochs: int
) -> nn.ModuleList:
    """Train one linear classifier per learning rate, all on the same batches.

    SGD with momentum 0.9, no weight decay, cosine to 0 over all steps, weights from a normal
    distribution of standard deviation 0.01. The paper's linear probe takes LARS with batch 16384;
    on features of a few thousand images that would be no batch at all.

    Args:
        x: Standardised features with shape (N, D).
        y: Class indices with shape (N,), the largest class among them.
        lrs: The learning rate of each classifier.
        seed: Of initial weights (the same for all) and order.
        epochs: Passes over the features.
    """
    generator = torch.Generator().manual_seed(seed)
    first = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.normal_(first.weight, std=0.01, generator=generator)
    nn.init.zeros_(first.bias)
    models = nn.ModuleList(deepcopy(first) for _ in lrs).to(x.device)
    groups = [dict(params=[*m.parameters()], lr=lr) for m, lr in zip(models, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs * -(-len(x) // BATCH_SIZE))
    for _ in tqdm(range(epochs), desc='linear probe', unit=' epochs', leave=False):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order.split(BATCH_SIZE):
            inputs, targets = x[rows], y[rows]
            optimizer.zero_grad()
            for model in models:
                F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
    return models.requires_grad_(False)
