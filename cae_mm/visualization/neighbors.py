"""Nearest neighbours by cosine similarity: of a patch over many images, of images by features."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cae_mm.patches import Grid
from cae_mm.visualization.sheet import WRONG, outline


def nearest_patches(
    query: Tensor, batches: Iterable[Tensor], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the images with the patches most like a patch: of each image its most similar one.

    Args:
        query: Token of the patch, shape (D,).
        batches: Tokens of the patches of images, shapes (B, N, D).
        k: How many.

    Returns:
        Similarities, rows of images and indices of patches, each of shape (k,), nearest first.
    """
    query = F.normalize(query, dim=0)
    best = [(F.normalize(tokens, dim=-1) @ query).max(dim=1) for tokens in batches]
    values, patches = (torch.cat(parts) for parts in zip(*best, strict=True))
    if len(values) < k:
        raise ValueError(f'{k} neighbours were asked for, but there are {len(values)} images')
    top, rows = values.topk(k)
    return top, rows, patches[rows]


def nearest_images(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and rows of the k features (N, D) most like each of (M, D): twice (M, k)."""
    return (F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T).topk(k, dim=1)


def mark_patch(picture: Tensor, patch: int, grid: Grid) -> Tensor:
    """Draw a frame around a patch of a picture."""
    h, w = (side // n for side, n in zip(picture.shape[1:], grid, strict=True))
    row, column = divmod(patch, grid[1])
    return outline(picture, (row * h, column * w, h, w), WRONG, max(h // 8, 1))
