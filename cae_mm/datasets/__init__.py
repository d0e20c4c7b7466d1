"""Transforms: loading any image file, two views of one crop, masks."""

from cae_mm.datasets.loading import LoadImage
from cae_mm.datasets.masking import CAEMaskGenerator
from cae_mm.datasets.transforms import TwoViewResizedCrop

__all__ = ['CAEMaskGenerator', 'LoadImage', 'TwoViewResizedCrop']
