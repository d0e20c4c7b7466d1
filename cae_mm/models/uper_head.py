"""UperNet's head for fewer operations: the same parameters, the same function.

Imported by its users only, since it needs mmsegmentation: ``cae_mm.models.uper_head.UPerHead``.

Reference: UperNet, https://arxiv.org/abs/1807.10221
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead as MMSegUPerHead
from torch import Tensor, nn


class UPerHead(MMSegUPerHead):
    """mmsegmentation's ``UPerHead`` without a convolution of upsampled maps.

    Its last convolution takes the maps of all strides, brought to the size of the largest, and is
    half of a step's operations. ``conv_of_resized`` computes the same from the maps as they are.
    Arguments and state dict are those of mmsegmentation's.
    """

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Fuse maps of all strides into one, shape (B, channels, H, W), of the first's size."""
        maps = self._transform_inputs(inputs)
        x = self.psp_forward(maps)  # the map of the largest stride, with its context
        outs = [x]
        for i in reversed(range(len(self.lateral_convs))):
            lateral = self.lateral_convs[i](maps[i])
            x = lateral + self._resize(x, lateral.shape[2:])
            outs.insert(0, self.fpn_convs[i](x))
        fuse = self.fpn_bottleneck
        x = conv_of_resized(fuse.conv, outs, self.align_corners)
        x = fuse.norm(x) if fuse.with_norm else x
        return fuse.activate(x) if fuse.with_activation else x

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, size, mode='bilinear', align_corners=self.align_corners)


def conv_of_resized(conv: nn.Conv2d, maps: Sequence[Tensor], align_corners: bool = False) -> Tensor:
    """Convolve maps that are brought to the first one's size and concatenated, without doing so.

    A convolution is the sum over its taps of a product with the channels and a shift. The products
    commute with resizing, so they are made at a map's own size, where there are fewer pixels;
    resizing and shift together are one matrix along the height and one along the width.

    Args:
        conv: Of odd kernel size, stride 1, padded with zeros so that the size stays.
        maps: Shapes (B, C_i, h_i, w_i), resized bilinearly from the second on.
        align_corners: See ``torch.nn.functional.interpolate``.

    Returns:
        ``conv(cat([maps[0], resized maps[1], ...]))``, shape (B, D, h_0, w_0).
    """
    weights = conv.weight.split([x.shape[1] for x in maps], dim=1)  # each [D, C_i, k, k]
    out = F.conv2d(maps[0], weights[0], conv.bias, padding=conv.padding)
    for x, weight in zip(maps[1:], weights[1:], strict=True):
        out = out + _conv_of_resized(x, weight, maps[0].shape[2:], align_corners)
    return out


def _conv_of_resized(x: Tensor, weight: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    (B, C, h, w), (D, _, k, _), (H, W) = x.shape, weight.shape, size
    rows = _resize_and_shift(h, H, k, align_corners, x)  # [k, h, H]
    columns = _resize_and_shift(w, W, k, align_corners, x)  # [k, w, W]
    products = weight.permute(3, 0, 2, 1).reshape(-1, C, 1, 1)  # [k (columns) * D * k (rows), C]
    x = F.conv2d(x, products).reshape(B, k, D * k * h, w)
    x = reduce(add, (x[:, i] @ columns[i] for i in range(k)))  # [B, D*k*h, W]
    return rows.permute(2, 0, 1).reshape(H, k * h) @ x.reshape(B, D, k * h, W)  # [B, D, H, W]


def _resize_and_shift(n: int, N: int, k: int, align_corners: bool, like: Tensor) -> Tensor:
    """Matrices that resize n values to N, zeros around them, and shift these for each of k taps.

    Returns:
        Tensor with shape (k, n, N).
    """
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    resize = F.interpolate(eye[None], N, mode='linear', align_corners=align_corners)[0]  # [n, N]
    return F.pad(resize, (k // 2, k // 2)).unfold(1, N, 1).transpose(0, 1)  # [k, n, N]
