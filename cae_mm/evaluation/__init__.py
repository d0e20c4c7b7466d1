"""Quick judgement of an encoder by its features of a labelled folder."""

from cae_mm.evaluation.encoder import Encoder, load_backbone, load_encoder
from cae_mm.evaluation.features import (
    cached_features,
    check_same_classes,
    extract_features,
    labelled_images,
    make_fingerprint,
)
from cae_mm.evaluation.knn import check_neighbors, knn_accuracies
from cae_mm.evaluation.linear import check_class_sizes, linear_sweep, logistic_regression

__all__ = [
    'Encoder',
    'cached_features',
    'check_class_sizes',
    'check_neighbors',
    'check_same_classes',
    'extract_features',
    'knn_accuracies',
    'labelled_images',
    'linear_sweep',
    'load_backbone',
    'load_encoder',
    'logistic_regression',
    'make_fingerprint',
]
