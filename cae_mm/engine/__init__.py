"""What the Runner needs beside models, data and hooks: optimisation, number formats, settings."""

from cae_mm.engine.mixed_precision import MixedPrecisionOptimWrapper
from cae_mm.engine.optim import LARS, LayerDecayOptimWrapperConstructor
from cae_mm.engine.runner import CAERunner

__all__ = ['CAERunner', 'LARS', 'LayerDecayOptimWrapperConstructor', 'MixedPrecisionOptimWrapper']
