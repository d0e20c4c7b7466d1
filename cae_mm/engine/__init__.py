"""What the Runner needs beside models and data: optimisation and hooks."""

from cae_mm.engine.hooks import (
    EpochSeedHook,
    GumbelTemperatureHook,
    NonFiniteLossHook,
    ProgressBarHook,
    ThroughputHook,
)
from cae_mm.engine.optim import LARS, BF16OptimWrapper, LayerDecayOptimWrapperConstructor

__all__ = [
    'BF16OptimWrapper',
    'EpochSeedHook',
    'GumbelTemperatureHook',
    'LARS',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook',
    'ProgressBarHook',
    'ThroughputHook',
]
