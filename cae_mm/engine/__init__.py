"""What the Runner needs beside models and data: optimisation and hooks."""

from cae_mm.engine.hooks import (
    EpochSeedHook,
    GumbelTemperatureHook,
    NonFiniteLossHook,
    ProgressBarHook,
    ThroughputHook,
)
from cae_mm.engine.optim import BF16OptimWrapper, LayerDecayOptimWrapperConstructor

__all__ = [
    'BF16OptimWrapper',
    'EpochSeedHook',
    'GumbelTemperatureHook',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook',
    'ProgressBarHook',
    'ThroughputHook',
]
