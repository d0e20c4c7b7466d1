"""Models: the method (cae), its parts (vit, neck, head, targets), probes and feature pyramid."""

from cae_mm.model_index import register_model_index
from cae_mm.models.cae import CAE
from cae_mm.models.data_preprocessor import CAEDataPreprocessor
from cae_mm.models.description import build_encoder, describe_model
from cae_mm.models.feature_pyramid import ViTFeaturePyramid
from cae_mm.models.head import CAEPretrainHead
from cae_mm.models.neck import CAENeck
from cae_mm.models.probe import AttentiveProbeHead, LinearProbeHead
from cae_mm.models.targets import (
    CAEFeatures,
    CLIPFeatures,
    DALLEDecoder,
    DALLEEncoder,
    DiscreteVAE,
    HOGTarget,
    KMeansTokenizer,
    RGBTarget,
    TimmFeatures,
)
from cae_mm.models.vit import CAEViT

__all__ = [
    'AttentiveProbeHead',
    'CAE',
    'CAEDataPreprocessor',
    'CAEFeatures',
    'CAENeck',
    'CAEPretrainHead',
    'CAEViT',
    'CLIPFeatures',
    'DALLEDecoder',
    'DALLEEncoder',
    'DiscreteVAE',
    'HOGTarget',
    'KMeansTokenizer',
    'LinearProbeHead',
    'RGBTarget',
    'TimmFeatures',
    'ViTFeaturePyramid',
    'build_encoder',
    'describe_model',
]

register_model_index()
