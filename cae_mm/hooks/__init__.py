"""Hooks of the Runner: safe loading, exact resuming, progress, guards, kNN during training."""

from cae_mm.hooks.checkpoint import SafeLoadHook
from cae_mm.hooks.knn import KNNHook
from cae_mm.hooks.training import (
    EpochSeedHook,
    GumbelTemperatureHook,
    NonFiniteLossHook,
    ProgressBarHook,
    ThroughputHook,
    seeded_by_torch,
)

__all__ = [
    'EpochSeedHook',
    'GumbelTemperatureHook',
    'KNNHook',
    'NonFiniteLossHook',
    'ProgressBarHook',
    'SafeLoadHook',
    'ThroughputHook',
    'seeded_by_torch',
]
