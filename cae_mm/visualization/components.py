"""Principal components of patch tokens as colours."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from cae_mm.patches import Grid

QUANTILES = (0.01, 0.99)  # of a component's scores: darkest and brightest


def principal_components(tokens: Tensor) -> tuple[Tensor, float]:
    """Scores of patches on the first three principal components of all patches of all images.

    Args:
        tokens: Float tensor with shape (B, N, D).

    Returns:
        Float tensor with shape (B, N, 3), and the share of the variance that the three have.
    """
    flat = tokens.flatten(0, 1).double().numpy()
    if min(flat.shape) < 3:
        raise ValueError(f'three components of {len(flat)} patches of width {flat.shape[1]}')
    pca = PCA(n_components=3, svd_solver='full')
    scores = torch.from_numpy(pca.fit_transform(flat)).view(*tokens.shape[:2], 3)
    return scores.float(), float(pca.explained_variance_ratio_.sum())


def to_colors(scores: Tensor) -> Tensor:
    """Bring each component, the last axis, from its quantiles over all patches to [0, 1]."""
    low, high = np.quantile(scores.flatten(0, -2).numpy(), QUANTILES, axis=0)
    return ((scores - torch.tensor(low)) / torch.tensor(high - low)).clamp(0, 1).float()


def paint_patches(colors: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Turn colours of patches, (N, 3), into a picture (3, H, W) of squares."""
    return F.interpolate(colors.T.reshape(1, 3, *grid), size, mode='nearest')[0]
