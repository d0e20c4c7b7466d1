"""Histograms of oriented gradients (HOG) as reconstruction target."""

import math

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from cae_mm.models.blocks import at_least_float32
from cae_mm.patches import Grid, gather_tokens, patchify
from cae_mm.registry import MODELS

CELLS = 2  # of a patch, along each side


@MODELS.register_module()
class HOGTarget(BaseModule):
    """Histograms of the gradients' directions in each masked patch of view 1, as in MaskFeat.

    MaskFeat has cells of 8 pixels under a Gaussian window of 16 pixels, which is its patch: 2 x 2
    cells. Here cells are half a patch and the window a patch at every patch size, so that targets
    of 8 pixels are those of 16 at half the scale. Each channel of a cell has its own histogram of
    length 1, hence normalisation of the images changes nothing.

    mmpretrain's ``HOGGenerator`` gives the same for square images of 14 x 14 patches, the only
    ones that it knows; it compares all patches, this one the masked ones. A cell of one colour is
    exactly 0, as differences are taken before sums.

    Args:
        bins: Directions in 180 degrees; opposite ones count as the same.

    References:
        MaskFeat, section 3.2: https://arxiv.org/abs/2112.09133
        HOG: Dalal and Triggs, 2005, https://hal.science/inria-00548512
    """

    view = 0

    def __init__(self, bins: int = 9) -> None:
        super().__init__()
        self.bins = bins

    def out_dims(self, patch_size: int) -> int:
        """Values to predict for a patch: 108 with 9 bins, at every patch size."""
        if patch_size % CELLS:
            raise ValueError(f'HOGTarget cuts patches into halves, which {patch_size} px have not')
        return 3 * self.bins * CELLS**2

    @torch.no_grad()
    def targets(self, images: Tensor, ids: Tensor, grid: Grid) -> Tensor:
        """Return histograms of the patches ``ids``, shape (B, M, 3 * bins * 2 * 2), in that order.

        A value lies in [0, 1]. Images have shape (B, 3, H, W); numbers are at least float32.
        """
        patch_size = images.shape[-2] // grid[0]
        gx, gy = (
            _split_cells(gather_tokens(patchify(g, patch_size), ids), patch_size)
            for g in _sobel(at_least_float32(images))
        )  # [c, c, B, M, 3, 2, 2]
        strength = torch.hypot(gx, gy) * _gaussian(patch_size, gx)
        half_turns = torch.atan2(gx, gy) / math.pi  # [-1, 1]
        bin_of = (self.bins * half_turns).floor() % self.bins
        counts = [(strength * (bin_of == b)).sum((0, 1)) for b in range(self.bins)]
        return F.normalize(torch.stack(counts, dim=3), dim=3).flatten(2)  # of [B, M, 3, bins, 2, 2]


def _sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical gradients, (B, C, H, W) each; at borders images are mirrored."""
    x = F.pad(images, (1, 1, 1, 1), mode='reflect')
    dx, dy = x[..., :-2] - x[..., 2:], x[..., :-2, :] - x[..., 2:, :]
    gx = dx[..., :-2, :] + 2 * dx[..., 1:-1, :] + dx[..., 2:, :]
    gy = dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]
    return gx, gy


def _gaussian(patch_size: int, like: Tensor) -> Tensor:
    """Weights of a patch's pixels, standard deviation half a patch, as (c, c, 1, 1, 1, 2, 2)."""
    x = torch.arange(patch_size, dtype=like.dtype, device=like.device) - (patch_size - 1) / 2
    weights = torch.exp(-0.5 * (x / (patch_size // 2)) ** 2)
    return _split_cells((weights[:, None] * weights).view(1, 1, -1), patch_size)


def _split_cells(patches: Tensor, patch_size: int) -> Tensor:
    """Patches (B, M, C * p * p) as (c, c, B, M, C, 2, 2): sums over a cell's pixels are fast."""
    cell = patch_size // CELLS
    x = patches.unflatten(-1, (-1, CELLS, cell, CELLS, cell))  # [B, M, C, 2, c, 2, c]
    return x.permute(4, 6, 0, 1, 2, 3, 5).contiguous()
