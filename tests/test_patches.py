"""Cutting images into patches, gathering them, splitting masks."""

import pytest
import torch
import torch.nn.functional as F
from builders import equal
from hypothesis import example, given
from hypothesis import strategies as st

from cae_mm.patches import (
    draw_ids,
    gather_tokens,
    grid_of,
    patchify,
    split_mask,
    to_pair,
    unpadded_grids,
)

sides = st.integers(1, 7)
seeds = st.integers(0, 2**32 - 1)


@given(batch=st.integers(1, 3), channels=st.integers(1, 4), h=sides, w=sides, p=sides, seed=seeds)
def test_patchify_cuts_as_torchs_convolutions_do(batch, channels, h, w, p, seed):
    """Row-major patches, channels first in each; nothing is lost, as the way back shows."""
    images = torch.randn(batch, channels, h * p, w * p, generator=torch.manual_seed(seed))
    patches = patchify(images, p)
    equal(patches, F.unfold(images, p, stride=p).transpose(1, 2))
    equal(F.fold(patches.transpose(1, 2), (h * p, w * p), p, stride=p), images)


@given(batch=st.integers(1, 4), tokens=st.integers(2, 40), seed=seeds, data=st.data())
def test_split_mask_and_gather_tokens_part_an_image(batch, tokens, seed, data):
    """Indices are ascending and complementary, and gather what a mask selects."""
    masked = data.draw(st.integers(1, tokens - 1))
    generator = torch.manual_seed(seed)
    mask = torch.rand(batch, tokens, generator=generator).argsort(1) < masked
    x = torch.randn(batch, tokens, 3, generator=generator)
    ids_v, ids_m = split_mask(mask)
    assert ids_v.dtype == ids_m.dtype == torch.int64
    assert ids_v.shape == (batch, tokens - masked) and ids_m.shape == (batch, masked)
    for i in range(batch):
        equal(ids_v[i], torch.nonzero(~mask[i]).flatten())
        equal(ids_m[i], torch.nonzero(mask[i]).flatten())
        equal(gather_tokens(x, ids_v)[i], x[i][~mask[i]])
        equal(gather_tokens(x, ids_m)[i], x[i][mask[i]])


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


@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), p=st.integers(1, 32))
@example((96, 160), 16)
def test_grid_of_any_size(size, p):
    """Rows and columns, or the next larger size that can be cut."""
    (h, H), (w, W) = ((-(-side // p), -(-side // p) * p) for side in size)
    if size == (H, W):
        assert grid_of(size, p) == (h, w)
    else:
        message = rf'^an image of {size[0]}x{size[1]} pixels cannot .* of {p}x{p}: .* to {H}x{W}$'
        with pytest.raises(ValueError, match=message):
            grid_of(size, p)


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


def test_a_share_of_indices_is_drawn_in_each_image():
    ids = torch.arange(100, 110).expand(2000, 10)
    drawn = draw_ids(ids, 0.3)
    assert drawn.shape == (2000, 3) and (drawn.diff() > 0).all()
    counts = (drawn.flatten() - 100).bincount(minlength=10)
    assert counts.min() > 500 and counts.max() < 700  # 600 each, standard deviation 20
    assert len(drawn.unique(dim=0)) == 120  # all ways to draw 3 of 10
    assert draw_ids(ids, 0.01).shape == (2000, 1)
