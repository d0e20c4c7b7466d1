"""Transforms: loading any image file, two views of one crop, masks; images in tar shards."""

from cae_mm.datasets.loading import LoadImage
from cae_mm.datasets.masking import CAEMaskGenerator
from cae_mm.datasets.shards import ShardDataset, ShardSampler
from cae_mm.datasets.transforms import CheckSegMap, TwoViewResizedCrop

__all__ = [
    'CAEMaskGenerator',
    'CheckSegMap',
    'LoadImage',
    'ShardDataset',
    'ShardSampler',
    'TwoViewResizedCrop',
]
