"""Pixels as reconstruction target (paper, table 8)."""

from mmengine.model import BaseModule
from torch import Tensor

from cae_mm.models.layers import Grid, gather_tokens, patchify
from cae_mm.registry import MODELS


@MODELS.register_module()
class RGBTarget(BaseModule):
    """The normalised pixels of each masked patch of view 1.

    Args:
        patch_size: Side p of a patch in pixels, the encoder's.
        norm_patch: Whether each patch is brought to mean 0 and variance 1, as in MAE
            (https://arxiv.org/abs/2111.06377, section 4.1). The CAE paper does not say.
    """

    view = 0

    def __init__(self, patch_size: int = 16, norm_patch: bool = False) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_patch = norm_patch

    def targets(self, images: Tensor, ids: Tensor, grid: Grid) -> Tensor:
        """Return pixels of the patches ``ids``, shape (B, M, 3 * p * p), ordered (3, p, p)."""
        pixels = gather_tokens(patchify(images, self.patch_size).float(), ids)
        if not self.norm_patch:
            return pixels
        variance, mean = pixels.var(-1, keepdim=True), pixels.mean(-1, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()
