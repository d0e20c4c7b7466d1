"""Hooks of the Runner: safe loading, exact resuming, progress, guards, kNN during training."""

from cae_mm.hooks.checkpoint import SafeLoadHook
from cae_mm.hooks.collapse import CollapseHook
from cae_mm.hooks.faults import NumericalFaultHook
from cae_mm.hooks.knn import KNNHook
from cae_mm.hooks.progress import ProgressHook
from cae_mm.hooks.training import EpochSeedHook, GumbelTemperatureHook, seeded_by_torch

__all__ = [
    'CollapseHook',
    'EpochSeedHook',
    'GumbelTemperatureHook',
    'KNNHook',
    'NumericalFaultHook',
    'ProgressHook',
    'SafeLoadHook',
    'seeded_by_torch',
]
