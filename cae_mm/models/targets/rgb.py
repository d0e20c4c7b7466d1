"""Pixels as reconstruction target (paper, table 8)."""

from mmengine.model import BaseModule
from torch import Tensor

from cae_mm.patches import Grid, gather_tokens, patchify
from cae_mm.registry import MODELS


@MODELS.register_module()
class RGBTarget(BaseModule):
    """The normalised pixels of each masked patch of view 1.

    Args:
        norm_patch: Whether each patch is brought to mean 0 and variance 1, as in MAE
            (https://arxiv.org/abs/2111.06377, section 4.1). The CAE paper does not say.
    """

    view = 0

    def __init__(self, norm_patch: bool = False) -> None:
        super().__init__()
        self.norm_patch = norm_patch

    def out_dims(self, patch_size: int) -> int:
        """Values to predict for a patch."""
        return 3 * patch_size**2

    def targets(self, images: Tensor, ids: Tensor, grid: Grid) -> Tensor:
        """Return pixels of the patches ``ids``, shape (B, M, 3 * p * p), ordered (3, p, p)."""
        pixels = gather_tokens(patchify(images, images.shape[-2] // grid[0]).float(), ids)
        if not self.norm_patch:
            return pixels
        mean, std = patch_statistics(pixels)
        return (pixels - mean) / std


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (B, M, K) -> twice (B, M, 1)."""
    return pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
