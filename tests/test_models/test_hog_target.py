"""HOG features against a loop in numpy, mmpretrain's generator, and what must not change them."""

import math

import numpy as np
import pytest
import torch
from builders import build_cae, make_batch
from mmpretrain.models.selfsup.maskfeat import HOGGenerator

from cae_mm.models import HOGTarget

GRID = (2, 3)
ALL = torch.arange(6).expand(2, 6)


def hog_by_hand(image, patch_size, bins=9):
    """One channel (H, W) -> (H/p, W/p, bins, 2, 2), pixel by pixel."""
    H, W = image.shape
    p, cell = patch_size, patch_size // 2
    x = np.pad(image.astype(np.float64), 1, mode='reflect')
    counts = np.zeros((H // p, W // p, bins, 2, 2))
    for r in range(H):
        for c in range(W):
            rows = [x[r + k] for k in range(3)]
            gx = sum(w * (row[c] - row[c + 2]) for w, row in zip((1, 2, 1), rows, strict=True))
            gy = sum(w * (rows[0][c + k] - rows[2][c + k]) for k, w in enumerate((1, 2, 1)))
            angle = math.degrees(math.atan2(gx, gy)) % 180  # opposite directions are the same
            at = (r % p - (p - 1) / 2, c % p - (p - 1) / 2)
            weight = math.exp(-0.5 * (at[0] ** 2 + at[1] ** 2) / (p / 2) ** 2)
            b = min(int(angle // (180 / bins)), bins - 1)
            counts[r // p, c // p, b, r % p // cell, c % p // cell] += weight * math.hypot(gx, gy)
    return counts / np.maximum(np.sqrt((counts**2).sum(2, keepdims=True)), 1e-12)


@pytest.mark.parametrize(('patch_size', 'bins'), [(8, 9), (4, 6)])
def test_is_a_loop_over_pixels(patch_size, bins):
    """Not square, only what is asked for, in its order."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, GRID[0] * patch_size, GRID[1] * patch_size)
    ids = torch.tensor([[0, 4], [5, 1]])
    target = HOGTarget(bins=bins)
    found = target.targets(images, ids, GRID)
    assert found.shape == (2, 2, target.out_dims(patch_size))
    for b in range(2):
        channels = [hog_by_hand(channel.numpy(), patch_size, bins) for channel in images[b]]
        for m, i in enumerate(ids[b].tolist()):
            want = np.stack([channel[divmod(i, GRID[1])] for channel in channels])
            np.testing.assert_allclose(found[b, m], want.ravel(), atol=1e-5)


def test_is_that_of_mmpretrain_for_its_size():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    ids = torch.randperm(196)[None, :60]
    want = HOGGenerator()(images)[0, ids[0]]
    torch.testing.assert_close(HOGTarget().targets(images, ids, (14, 14))[0], want)


def test_does_not_change_with_brightness_contrast_or_autocast():
    """Nor therefore with the normalisation of the images."""
    images = torch.rand(2, 3, 16, 24)
    want = HOGTarget().targets(images, ALL, GRID)
    scale, shift = torch.tensor([0.2, 3.0, 9.0]), torch.tensor([5.0, -1.0, 0.0])
    other = HOGTarget().targets(images * scale.view(3, 1, 1) + shift.view(3, 1, 1), ALL, GRID)
    torch.testing.assert_close(other, want, rtol=0, atol=1e-4)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(HOGTarget().targets(images, ALL, GRID), want)


def test_a_cell_of_one_colour_is_zero_and_others_have_length_1():
    """Values whose sums round: differences of sums would be noise of length 1."""
    images = torch.rand(2, 3, 1, 1).expand(2, 3, 16, 24).clone()
    assert HOGTarget().targets(images, ALL, GRID).count_nonzero() == 0
    images[..., 12:, :] = torch.rand(2, 3, 4, 24)
    cells = HOGTarget().targets(images, ALL, GRID).view(2, *GRID, 3, 9, 2, 2)
    lengths = cells.norm(dim=4)  # [B, rows, columns, 3, 2, 2]
    assert lengths[:, 0].count_nonzero() == 0
    torch.testing.assert_close(lengths[:, 1, ..., 1, :], torch.ones(2, 3, 3, 2))


def test_odd_patches_are_refused():
    with pytest.raises(ValueError, match='patches into halves, which 7 px have not'):
        HOGTarget().out_dims(7)


def test_only_encoder_and_neck_learn_from_it():
    model = build_cae(neck=dict(out_dims=108), target_generator=dict(type='cae_mm.HOGTarget'))
    views, samples = make_batch()
    losses = model(views[:1], samples, mode='loss')
    assert 'token_acc' not in losses
    ids = torch.stack([s.mask.nonzero().flatten() for s in samples])
    targets = model.target_generator.targets(views[0].requires_grad_(), ids, (4, 4))
    assert not targets.requires_grad
    predicted = model.eval().reconstruct(views[0], torch.stack([s.mask for s in samples]))
    evaluated = model(views[:1], samples, mode='loss')['loss_main']
    torch.testing.assert_close(evaluated, ((predicted - targets) ** 2).mean())
    losses['loss_main'].backward()
    assert all(p.grad is not None for p in model.neck.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())
