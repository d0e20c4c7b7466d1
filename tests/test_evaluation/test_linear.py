import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from cae_mm.evaluation import linear
from cae_mm.evaluation.linear import (
    check_class_sizes,
    hold_out,
    linear_sweep,
    logistic_regression,
    train_sweep,
)

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(linear, 'BATCH_SIZE', 32)


def make_split(seed, num=100, spread=2.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(3, 6))
    labels = rng.integers(3, size=num)
    features = 5 + 3 * (centres[labels] + spread * rng.normal(size=(num, 6)))
    return features.astype(np.float32), labels


def train_alone(x, y, lr, seed, epochs):
    """One classifier of torch's own, with the initial weights and the order of the sweep."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(x.shape[1], 3)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight.copy_(0.01 * torch.randn(model.weight.shape, generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(epochs)]
    batches = [rows for order in orders for rows in order.split(linear.BATCH_SIZE)]
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]['lr'] = lr * (1 + np.cos(np.pi * step / len(batches))) / 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def test_sweep_is_one_training_for_each_rate():
    features, labels = make_split(0)
    x, y, lrs = torch.from_numpy(features - 5), torch.from_numpy(labels), (1e-3, 0.03, 0.5)
    models = train_sweep(x, y, lrs, seed=4, epochs=3)
    for model, lr in zip(models, lrs):
        alone = train_alone(x, y, lr, seed=4, epochs=3)
        torch.testing.assert_close(model.weight, alone.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model.bias, alone.bias, rtol=1e-3, atol=1e-5)


def test_a_rate_that_diverges_leaves_the_others_alone():
    features, labels = make_split(0)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    good, bad = train_sweep(x, y, (1e-3, 1e38), seed=0, epochs=2)
    [alone] = train_sweep(x, y, (1e-3,), seed=0, epochs=2)
    assert not bad.weight.isfinite().all()
    torch.testing.assert_close(good.weight, alone.weight)


def test_linear_sweep_picks_without_looking_at_val():
    train, val = make_split(0), make_split(1, num=60)
    lrs = (1e-6, 1e-2, 1e38)
    results = linear_sweep(train, val, seed=0, device=CPU, epochs=20, lrs=lrs)
    assert set(results) == {'lr', 'accuracy', 'held_out', 'val'}
    assert set(results['held_out']) == set(results['val']) == set(lrs)
    assert results['lr'] == max(lrs, key=results['held_out'].get)
    assert results['accuracy'] == results['val'][results['lr']] > 0.5

    others = (val[0], (val[1] + 1) % 3)  # other validation labels: the same pick
    wrong = linear_sweep(train, others, seed=0, device=CPU, epochs=20, lrs=lrs)
    assert wrong['lr'] == results['lr'] and wrong['held_out'] == results['held_out']
    assert wrong['accuracy'] < 0.5


def test_linear_sweep_standardises_with_training_statistics():
    """So a shift and a scale of both sets change nothing, and of ``val`` alone very much."""
    (x, y), (x_val, y_val) = make_split(0), make_split(1, num=60)
    options = dict(seed=0, device=CPU, epochs=20, lrs=(1e-2,))
    expected = linear_sweep((x, y), (x_val, y_val), **options)
    moved = linear_sweep((100 * x + 50, y), (100 * x_val + 50, y_val), **options)
    assert moved['accuracy'] == pytest.approx(expected['accuracy'], abs=0.02)
    shifted = linear_sweep((x, y), (x_val + 1000, y_val), **options)
    assert shifted['accuracy'] < expected['accuracy'] - 0.1


def test_logistic_regression():
    train, val = make_split(0), make_split(1, num=60)
    results = logistic_regression(train, val, seed=0, cs=(1e-3, 1e-1))
    assert results['C'] == 1e-1 == max(results['held_out'], key=results['held_out'].get)
    assert results['not_converged'] == []
    mean, std = train[0].mean(0), train[0].std(0)
    reference = LogisticRegression(C=1e-1).fit((train[0] - mean) / std, train[1])
    assert results['accuracy'] == pytest.approx(reference.score((val[0] - mean) / std, val[1]))


def test_logistic_regression_says_what_did_not_converge(monkeypatch):
    monkeypatch.setattr(linear, 'MAX_ITER', 2)
    results = logistic_regression(make_split(0), make_split(1), seed=0, cs=(1.0,))
    assert results['not_converged'] == [1.0]


@pytest.mark.parametrize('num_classes', [3, 20])
def test_hold_out_is_stratified_and_seeded(num_classes):
    labels = np.arange(60) % num_classes
    features = np.arange(60, dtype=np.float32)[:, None]
    (x, y), (x_out, y_out) = hold_out((features, labels), seed=0)
    assert sorted(np.concatenate([x, x_out])[:, 0]) == list(range(60))
    np.testing.assert_array_equal(labels[x_out[:, 0].astype(int)], y_out)
    counts = np.bincount(y_out)
    assert set(counts) == ({4} if num_classes == 3 else {1})
    np.testing.assert_array_equal(hold_out((features, labels), seed=0)[1][0], x_out)
    assert (hold_out((features, labels), seed=1)[1][0] != x_out).any()


def test_classes_of_one_image_or_none_are_named():
    check_class_sizes(np.array([0, 1, 1, 0]), ['cat', 'dog'])
    with pytest.raises(ValueError, match='fewer than two training images: cat, bird. Add images'):
        check_class_sizes(np.array([0, 1, 1]), ['cat', 'dog', 'bird'])
