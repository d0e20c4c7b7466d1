"""What the Runner needs beside models, data and hooks: optimisation and number formats."""

from cae_mm.engine.optim import LARS, BF16OptimWrapper, LayerDecayOptimWrapperConstructor

__all__ = ['BF16OptimWrapper', 'LARS', 'LayerDecayOptimWrapperConstructor']
