"""Images as grids of patches, and which of the patches a mask hides."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of patches


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``size`` as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(size: Sequence[int], patch_size: int) -> Grid:
    """Rows and columns of patches in an image of ``size`` (height, width) pixels."""
    H, W = size
    p = patch_size
    if H % p or W % p:
        raise ValueError(
            f'an image of {H}x{W} pixels cannot be cut into patches of {p}x{p}: resize or pad it, '
            f'for example to {H + -H % p}x{W + -W % p}'
        )
    return H // p, W // p


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images, shape (B, C, H, W), into flat patches of p x p pixels, in row-major order.

    Returns:
        Tensor with shape (B, H/p * W/p, C * p * p), whose last axis is ordered as a convolution's
        weight (C, p, p).
    """
    B, C, H, W = images.shape
    p = patch_size
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)  # [B, N, C*p*p]


def unpadded_grids(patches: Tensor, grid: Grid) -> Tensor:
    """Rows and columns that each image fills of a padded grid.

    What is zero throughout at the right and the bottom is padding: mmdetection and mmsegmentation
    pad after normalisation, where ImageNet's means make no pixel of an image exactly zero.

    Args:
        patches: Shape (B, h * w, C * p * p).
        grid: Rows h and columns w of the padded batch.

    Returns:
        int64 tensor with shape (B, 2) on the same device, at least 1.
    """
    filled = patches.ne(0).any(-1).unflatten(1, grid)  # [B, h, w]
    ends = [torch.arange(1, side + 1, device=patches.device) for side in grid]
    rows, columns = (filled.any(2 - i) * ends[i] for i in range(2))  # [B, h], [B, w]
    return torch.stack([rows.amax(1), columns.amax(1)], dim=1).clamp(min=1)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Take the tokens ``ids``, shape (B, K), of each image from ``x``, shape (B, N, D)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, K, D]


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a mask into the indices of visible and of masked patches, both ascending.

    With the mask in host memory (``CAEDataPreprocessor`` leaves it there) no device is waited
    for; with the mask on a device the number of masked patches has to be read back from it.

    Args:
        mask: Bool tensor with shape (B, N), True = masked, M times in each image.

    Returns:
        Two int64 tensors with shapes (B, N - M) and (B, M).
    """
    counts = mask.sum(1).tolist()
    M, N = counts[0], mask.shape[1]
    if any(count != M for count in counts):
        raise ValueError(
            'all masks of a batch must hide the same number of patches, but they hide '
            f'{sorted(set(counts))}: use cae_mm.CAEMaskGenerator, whose count is exact'
        )
    if not 0 < M < N:
        raise ValueError(
            f'{M} of {N} patches are masked: CAE needs at least one visible and one masked patch '
            '(a mask is True where a patch is masked)'
        )
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # [B, N], visible patches first
    return order[:, : N - M], order[:, N - M :]


def draw_ids(ids: Tensor, share: float) -> Tensor:
    """Draw a share of each image's indices, (B, M) -> (B, max(floor(share * M), 1)), ascending."""
    B, M = ids.shape
    count = max(math.floor(share * M + 1e-9), 1)  # 0.3 of 10 is 3
    places = torch.rand(B, M, device=ids.device).argsort(1)[:, :count].sort(1).values
    return ids.gather(1, places)
