"""From maps of a plain ViT, all at the stride of a patch, to the strides of dense prediction.

Reference: official ``fpn1`` to ``fpn4``, https://github.com/Atten4Vis/CAE/blob/master/
downstream_tasks/semantic_segmentation/backbone/cae.py
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from cae_mm.registry import MODELS


@MODELS.register_module()
class ViTFeaturePyramid(BaseModule):
    """Bring each map to its own stride: transposed convolutions up, max pooling down.

    A neck for mmsegmentation; in mmdetection the first of ``neck=[ViTFeaturePyramid, FPN]``.

    Args:
        in_channels: Width D of the backbone.
        patch_size: Side of a patch in pixels, the stride of the maps that come in.
        strides: Stride in pixels of each map that goes out, for example (4, 8, 16, 32).
        norm_cfg: The norm between two transposed convolutions; official: SyncBN, which on one
            process is plain BN.
        init_cfg: See ``mmengine.model.BaseModule``.
    """

    def __init__(
        self,
        *,
        in_channels: int = 768,
        patch_size: int = 16,
        strides: Sequence[int] = (4, 8, 16, 32),
        norm_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        norm_cfg = norm_cfg or dict(type='SyncBN')
        self.levels = nn.ModuleList(
            _make_level(in_channels, patch_size, stride, norm_cfg) for stride in strides
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Resize maps (B, D, H/p, W/p), one per stride or one for all, each to its stride."""
        if len(maps) not in (1, len(self.levels)):
            raise ValueError(
                f'{len(maps)} maps for {len(self.levels)} strides: give the backbone one out_index '
                'for each stride, or one for all'
            )
        maps = tuple(maps) * (len(self.levels) // len(maps))
        return tuple(level(x) for level, x in zip(self.levels, maps, strict=True))


def _make_level(dim: int, patch_size: int, stride: int, norm_cfg: dict[str, Any]) -> nn.Module:
    twice = partial(nn.ConvTranspose2d, dim, dim, 2, stride=2)
    if patch_size == 4 * stride:
        norm = build_norm_layer(norm_cfg, dim)[1]
        return nn.Sequential(twice(), norm, nn.GELU(), twice())
    if patch_size == 2 * stride:
        return nn.Sequential(twice())
    if stride % patch_size == 0:
        # ceil_mode (official: without) keeps the last row and column of odd maps
        factor = stride // patch_size
        return nn.MaxPool2d(factor, factor, ceil_mode=True) if factor > 1 else nn.Identity()
    raise ValueError(
        f'a stride of {stride} cannot be made of patches of {patch_size} pixels: take a quarter, a '
        'half or a multiple of the patch size'
    )
