"""A model's description names what its weights do not tell, and builds the same encoder."""

from dataclasses import replace

import pytest
from mmengine.registry import MODELS
from torch import nn

from cae_mm.models import CAEViT, build_encoder, describe_model

ENCODER = dict(arch=dict(embed_dims=24, depth=1, num_heads=3, layer_scale=0.1), patch_size=4)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.mark.parametrize(
    ('options', 'differences'),
    [
        (dict(img_size=(12, 16)), dict(img_size=(12, 16), pretrain_img_size=(12, 16))),
        (dict(img_size=16, pretrain_img_size=12), dict(pretrain_img_size=(12, 12))),
        (dict(img_size=16, use_rel_pos_bias=True), dict(use_rel_pos_bias=True)),
        (dict(img_size=16, final_norm=False), dict(final_norm=False)),
        (dict(img_size=16, out_type='avg_featmap'), dict(pooled_norm=True)),
        (dict(img_size=16, mlp_ratio=2.0, in_channels=1), dict(mlp_ratio=2.0, in_channels=1)),
    ],
)
def test_description_and_encoder_make_each_other(options, differences):
    description = CAEViT(**ENCODER, **options).describe()
    assert description == replace(CAEViT(**ENCODER, img_size=16).describe(), **differences)
    encoder = build_encoder(description)
    assert encoder.describe() == description
    assert {k: v.shape for k, v in encoder.state_dict().items()} == {
        k: v.shape for k, v in CAEViT(**ENCODER, **options).state_dict().items()
    }


@pytest.mark.parametrize(
    ('preprocessor', 'expected'),
    [
        (dict(type='cae_mm.CAEDataPreprocessor'), (MEAN, STD, True)),
        (dict(type='cae_mm.CAEDataPreprocessor', to_rgb=False), (MEAN, STD, False)),
        (dict(type='mmpretrain.ClsDataPreprocessor', to_rgb=True), (MEAN, STD, True)),
        (dict(type='mmpretrain.SelfSupDataPreprocessor', to_rgb=True), (MEAN, STD, True)),
        (dict(type='mmengine.ImgDataPreprocessor', bgr_to_rgb=True), (MEAN, STD, True)),
        (dict(type='mmengine.ImgDataPreprocessor', mean=None, std=None), (None, None, False)),
    ],
)
def test_normalisation_is_that_of_the_preprocessor(preprocessor, expected):
    import mmpretrain.models  # noqa: F401  registers its own

    own = preprocessor['type'].startswith('cae_mm')
    numbers = {} if own else dict(mean=list(MEAN), std=list(STD))
    model = nn.Module()
    assert describe_model(model) is None
    model.backbone = CAEViT(**ENCODER, img_size=16)
    model.data_preprocessor = MODELS.build(numbers | preprocessor)
    description = describe_model(model)
    assert (description.mean, description.std, description.to_rgb) == expected
