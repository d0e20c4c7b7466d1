import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from cae_mm.evaluation import knn
from cae_mm.evaluation.knn import knn_accuracies


@pytest.fixture
def data():
    """Three clusters of 40, of which 20 points are to be classified."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8))
    labels = np.arange(120) % 3
    features = (centres[labels] + 1.5 * rng.normal(size=(120, 8))).astype(np.float32)
    return features[:100], labels[:100], features[100:], labels[100:]


@pytest.mark.parametrize('chunk', [2**26, 300, 1])
def test_same_as_scikit_learn(data, chunk, monkeypatch):
    monkeypatch.setattr(knn, 'MAX_SIMILARITIES', chunk)
    train, train_labels, val, val_labels = data
    actual = knn_accuracies(*map(torch.from_numpy, data), ks=(1, 5, 20, 100))
    for k, accuracy in actual.items():
        reference = KNeighborsClassifier(
            k, metric='cosine', weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        assert accuracy == pytest.approx(reference.fit(train, train_labels).score(val, val_labels))
    assert len(set(actual.values())) > 1


def test_near_neighbours_outvote_many_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    query, right = torch.tensor([[10.0, 1.0]]), torch.tensor([0])
    assert knn_accuracies(train, labels, query, right, ks=[3]) == {3: 1.0}
    assert knn_accuracies(train, labels, query, right, ks=[3], temperature=100) == {3: 0.0}


def test_scale_of_features_does_not_count(data):
    tensors = [torch.from_numpy(array) for array in data]
    expected = knn_accuracies(*tensors)
    tensors[0] *= torch.rand(100, 1) + 0.1
    tensors[2] *= 7
    assert knn_accuracies(*tensors) == expected


@pytest.mark.parametrize('k', [0, 101])
def test_number_of_neighbours_is_checked(data, k):
    with pytest.raises(ValueError, match=f'k = {k} neighbours were asked for, but there are 100'):
        knn_accuracies(*map(torch.from_numpy, data), ks=(10, k))
