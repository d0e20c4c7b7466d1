"""Reconstruction targets: DALL-E's tokens, tokens of an own d-VAE, pixels."""

from cae_mm.models.targets.dalle import DALLEDecoder, DALLEEncoder
from cae_mm.models.targets.dvae import DiscreteVAE
from cae_mm.models.targets.rgb import RGBTarget

__all__ = ['DALLEDecoder', 'DALLEEncoder', 'DiscreteVAE', 'RGBTarget']
