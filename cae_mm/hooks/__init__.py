"""Hooks of the Runner: checkpoints, safe loading, progress, guards, kNN and pictures."""

from cae_mm.hooks.collapse import CollapseHook
from cae_mm.hooks.faults import NumericalFaultHook
from cae_mm.hooks.knn import KNNHook
from cae_mm.hooks.loading import SafeLoadHook
from cae_mm.hooks.pictures import PictureHook
from cae_mm.hooks.progress import ProgressHook
from cae_mm.hooks.saving import CheckpointHook
from cae_mm.hooks.schedules import AlignmentRampHook, GumbelTemperatureHook
from cae_mm.hooks.unreadable import UnreadableImagesHook

__all__ = [
    'AlignmentRampHook',
    'CheckpointHook',
    'CollapseHook',
    'GumbelTemperatureHook',
    'KNNHook',
    'NumericalFaultHook',
    'PictureHook',
    'ProgressHook',
    'SafeLoadHook',
    'UnreadableImagesHook',
]
