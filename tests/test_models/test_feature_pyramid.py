"""The feature pyramid against the official ``fpn1`` to ``fpn4``, written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import equal, randomize
from torch import nn

from cae_mm.models import ViTFeaturePyramid

DIM = 6


def build(patch_size=16, strides=(4, 8, 16, 32)):
    neck = ViTFeaturePyramid(
        in_channels=DIM, patch_size=patch_size, strides=strides, norm_cfg=dict(type='BN')
    )
    return randomize(neck.double(), std=1.0)


def maps_of(height, width, count=4, batch=2):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, DIM, height, width, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]


def test_default_is_for_the_base_encoder():
    with torch.device('meta'):
        maps = ViTFeaturePyramid()([torch.empty(1, 768, 2, 4)])
    assert [tuple(x.shape) for x in maps] == [(1, 768, n, 2 * n) for n in (8, 4, 2, 1)]


def twice(x, p, name):
    return F.conv_transpose2d(x, p[f'{name}.weight'], p[f'{name}.bias'], stride=2)


def four_times(x, p, name):
    x = twice(x, p, f'{name}.0')
    x = F.batch_norm(x, None, None, p[f'{name}.1.weight'], p[f'{name}.1.bias'], training=True)
    return twice(F.gelu(x), p, f'{name}.3')


def pooled(x, factor):
    """Largest value of each block; what is left over at right and bottom makes smaller blocks."""
    x = torch.stack([rows.amax(2) for rows in x.split(factor, dim=2)], dim=2)
    return torch.stack([columns.amax(3) for columns in x.split(factor, dim=3)], dim=3)


@pytest.mark.parametrize(('height', 'width'), [(4, 4), (3, 6), (5, 1), (1, 7), (1, 1)])
def test_patches_of_16_give_the_official_pyramid(height, width):
    neck, maps = build(), maps_of(height, width)
    p = neck.state_dict()
    expected = [
        four_times(maps[0], p, 'levels.0'),
        twice(maps[1], p, 'levels.1.0'),
        maps[2],
        pooled(maps[3], 2),
    ]
    outs = neck(maps)
    for out, reference, stride in zip(outs, expected, (4, 8, 16, 32), strict=True):
        size = (math.ceil(height * 16 / stride), math.ceil(width * 16 / stride))
        assert out.shape == (2, DIM, *size)
        torch.testing.assert_close(out, reference)


def test_patches_of_8_give_the_official_pyramid():
    neck, maps = build(patch_size=8), maps_of(8, 4)
    p = neck.state_dict()
    expected = [
        twice(maps[0], p, 'levels.0.0'),
        maps[1],
        pooled(maps[2], 2),
        pooled(maps[3], 4),
    ]
    for out, reference in zip(neck(maps), expected, strict=True):
        torch.testing.assert_close(out, reference)


def test_whole_maps_are_pooled_as_without_ceil_mode():
    """On even maps the official pooling, which drops an odd last row, says the same."""
    [x] = maps_of(6, 4, count=1)
    [out] = build(strides=(32,))([x])
    torch.testing.assert_close(out, nn.functional.max_pool2d(x, 2, 2))


def test_one_map_serves_all_strides():
    neck = build()
    [x] = maps_of(4, 4, count=1)
    for one, each in zip(neck([x]), neck([x] * 4), strict=True):
        equal(one, each)


def test_every_parameter_gets_a_gradient():
    neck = build()
    sum(out.square().sum() for out in neck(maps_of(4, 4))).backward()
    assert len(list(neck.parameters())) == 2 + 2 + 2 + 2
    assert all(param.grad.abs().sum() > 0 for param in neck.parameters())


def test_default_norm_is_synchronised():
    assert isinstance(ViTFeaturePyramid(in_channels=DIM).levels[0][1], nn.SyncBatchNorm)


def test_number_of_maps_must_fit():
    message = '3 maps for 4 strides: give the backbone one out_index for each stride, or one'
    with pytest.raises(ValueError, match=message):
        build()(maps_of(4, 4, count=3))


@pytest.mark.parametrize('stride', [2, 12, 24])
def test_strides_that_cannot_be_made(stride):
    message = f'a stride of {stride} cannot be made of patches of 16 pixels: take a quarter'
    with pytest.raises(ValueError, match=message):
        build(strides=(stride,))
