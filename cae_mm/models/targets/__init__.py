"""Targets: tokens of DALL-E, of an own d-VAE or encoder; pixels, HOG, features of a model."""

from cae_mm.models.targets.dalle import DALLEDecoder, DALLEEncoder
from cae_mm.models.targets.dvae import DiscreteVAE
from cae_mm.models.targets.features import CAEFeatures, CLIPFeatures, TimmFeatures
from cae_mm.models.targets.hog import HOGTarget
from cae_mm.models.targets.kmeans import KMeansTokenizer
from cae_mm.models.targets.rgb import RGBTarget

__all__ = [
    'CAEFeatures',
    'CLIPFeatures',
    'DALLEDecoder',
    'DALLEEncoder',
    'DiscreteVAE',
    'HOGTarget',
    'KMeansTokenizer',
    'RGBTarget',
    'TimmFeatures',
]
