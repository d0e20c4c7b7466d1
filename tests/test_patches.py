"""Cutting images into patches, gathering them, splitting masks."""

import pytest
import torch
import torch.nn.functional as F
from builders import equal
from torch import nn

from cae_mm.patches import gather_tokens, grid_of, patchify, split_mask, to_pair, unpadded_grids


@pytest.mark.parametrize(('height', 'width', 'p'), [(32, 32, 8), (16, 48, 8), (60, 20, 5)])
def test_patchify_and_linear_are_a_convolution(height, width, p):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 10, p, stride=p).double()
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    tokens = F.linear(patchify(images, p), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(tokens, conv(images).flatten(2).transpose(1, 2))


def test_patchify_takes_row_major_patches():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            cut = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            equal(patches[:, 3 * row + column], cut.flatten(1))


def test_gather_tokens_against_loops():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 4)
    ids = torch.randint(7, (3, 5))
    taken = gather_tokens(x, ids)
    assert taken.shape == (3, 5, 4)
    for b in range(3):
        for k in range(5):
            equal(taken[b, k], x[b, ids[b, k]])


def test_split_mask_is_ascending_and_complementary():
    torch.manual_seed(0)
    mask = torch.rand(20, 30).argsort(1) < 12
    visible, masked = split_mask(mask)
    assert visible.dtype == masked.dtype == torch.int64
    assert visible.shape == (20, 18)
    assert masked.shape == (20, 12)
    for row, ids_v, ids_m in zip(mask, visible, masked, strict=True):
        equal(ids_v, torch.nonzero(~row).flatten())
        equal(ids_m, torch.nonzero(row).flatten())


@pytest.mark.parametrize(
    ('mask', 'message'),
    [
        ([[1, 0, 0], [1, 1, 0]], r'must hide the same number of patches, but they hide \[1, 2\]'),
        ([[1, 1, 1], [1, 1, 1]], '3 of 3 patches are masked: CAE needs at least one visible'),
        ([[0, 0, 0], [0, 0, 0]], '0 of 3 patches are masked: .* True where a patch is masked'),
    ],
)
def test_split_mask_refuses(mask, message):
    with pytest.raises(ValueError, match=message):
        split_mask(torch.tensor(mask, dtype=torch.bool))


def test_to_pair():
    assert to_pair(224) == (224, 224)
    assert to_pair((96, 160)) == to_pair([96, 160]) == (96, 160)


def test_grid_of():
    assert grid_of((224, 224), 16) == (14, 14)
    assert grid_of((96, 160), 16) == (6, 10)


@pytest.mark.parametrize('size', [(225, 160), (240, 150)])
def test_grid_of_proposes_a_size(size):
    message = rf'{size[0]}x{size[1]} pixels cannot be cut into patches of 16x16: .* to 240x160$'
    with pytest.raises(ValueError, match=message):
        grid_of(size, 16)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_told_from_pixels(dtype):
    """No pixel of an image is zero after normalisation, whatever its colour."""
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
    images = torch.arange(256.0).expand(3, 256)[:, :, None].expand(-1, -1, 3)
    images = ((images - mean) / std).to(dtype)  # [3, 256, 3], a row of each grey
    assert images.ne(0).all()
    sizes = [(24, 16), (17, 9), (1, 24), (8, 8)]
    batch = torch.zeros(5, 3, 24, 32, dtype=dtype)
    for i, (height, width) in enumerate(sizes):
        batch[i, :, :height, :width] = images[:, 116 : 116 + height, :1]
    grids = unpadded_grids(patchify(batch, 8), (3, 4))
    assert grids.tolist() == [[3, 2], [3, 2], [1, 3], [1, 1], [1, 1]]  # the last one is blank
    batch[0, 1, 5, 31] = batch[1, :, :, :8] = 0  # zeros inside an image do not matter
    assert unpadded_grids(patchify(batch, 8), (3, 4))[:2].tolist() == [[3, 2], [3, 2]]
