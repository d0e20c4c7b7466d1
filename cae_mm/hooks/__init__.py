"""Hooks of the Runner: safe loading, exact resuming, progress, guards, kNN during training."""

from cae_mm.hooks.checkpoint import SafeLoadHook
from cae_mm.hooks.knn import KNNHook
from cae_mm.hooks.progress import ProgressHook
from cae_mm.hooks.training import (
    EpochSeedHook,
    GumbelTemperatureHook,
    NonFiniteLossHook,
    seeded_by_torch,
)

__all__ = [
    'EpochSeedHook',
    'GumbelTemperatureHook',
    'KNNHook',
    'NonFiniteLossHook',
    'ProgressHook',
    'SafeLoadHook',
    'seeded_by_torch',
]
