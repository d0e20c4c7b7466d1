"""Where attention looks: of the class token, of a probe's query, of the regressor.

Fused attention returns no weights, so hooks on the attention modules compute them anew from the
same inputs; the forward pass itself stays as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn

from cae_mm.models import CAE, AttentiveProbeHead, CAEViT
from cae_mm.models.blocks import Attention, CrossAttention, WindowAttention
from cae_mm.patches import Grid, gather_tokens, split_mask

BRIGHTEST = 0.99  # quantile of a sheet's weights that is painted brightest


def self_attention_weights(
    attn: Attention, x: Tensor, grid: Grid | None = None, queries: int | None = None
) -> Tensor:
    """Weights with which ``attn(x, grid, queries=queries)`` adds up values.

    Returns:
        Float tensor with shape (B, heads, Q, L), the sum over L is 1.
    """
    if isinstance(attn, WindowAttention):
        raise ValueError('windows have no attention over the whole image: set window_size=None')
    D = x.shape[-1]
    q = F.linear(x[:, :queries], attn.qkv.weight[:D], attn.q_bias)
    k = F.linear(x, attn.qkv.weight[D : 2 * D])
    return _weights(q, k, attn.num_heads, attn.position_bias(grid, queries))


def cross_attention_weights(attn: CrossAttention, q: Tensor, k: Tensor) -> Tensor:
    """Weights with which ``attn(q, k, v)`` adds up values, (B, heads, M, L), as above."""
    return _weights(attn.q(q), attn.k(k), attn.num_heads)


def _weights(q: Tensor, k: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    q, k = (x.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k))
    logits = q @ k.mT * q.shape[-1] ** -0.5  # [B, heads, Q, L]
    return (logits if bias is None else logits + bias).softmax(-1)


@contextmanager
def record_attention(attn: nn.Module, queries: int | None = None) -> Iterator[list[Tensor]]:
    """Collect the weights of each forward pass of ``attn`` within the context.

    Args:
        attn: An ``Attention`` or a ``CrossAttention`` in a model.
        queries: How many tokens' weights, the first ones, are wanted of an ``Attention``.
    """
    recorded: list[Tensor] = []

    def record(module: Any, args: tuple[Any, ...]) -> None:
        if isinstance(module, CrossAttention):
            recorded.append(cross_attention_weights(module, *args[:2]))
        else:
            x, grid = args[:2]
            recorded.append(self_attention_weights(module, x, grid, queries))

    handle = attn.register_forward_pre_hook(record)
    try:
        yield recorded
    finally:
        handle.remove()


@torch.no_grad()
def class_attention(encoder: CAEViT, images: Tensor, layer: int = -1) -> Tensor:
    """Attention of the class token to the patches in a block of the encoder.

    Args:
        encoder: In eval mode.
        images: Normalised, shape (B, C, H, W).
        layer: Index of the block, -1 is the last.

    Returns:
        Shape (B, heads, N). The sum over N is 1 less what the class token gives to itself.
    """
    with record_attention(_pick(encoder.blocks, layer).attn, queries=1) as recorded:
        encoder.forward_features(images)
    return recorded[0][:, :, 0, 1:]


@torch.no_grad()
def probe_attention(encoder: CAEViT, head: nn.Module, images: Tensor) -> Tensor:
    """Attention of an attentive probe's learned query to the patches; see ``class_attention``."""
    if not isinstance(head, AttentiveProbeHead):
        raise ValueError(
            f'{type(head).__name__} has no learned query: give config and checkpoint of an '
            'attentive probe (configs/attentive)'
        )
    with record_attention(head.attn) as recorded:
        head.pre_logits((encoder.forward_features(images),))
    return recorded[0][:, :, 0]


@torch.no_grad()
def regressor_attention(
    model: CAE, images: Tensor, masks: Tensor, patches: Tensor, layer: int = -1
) -> Tensor:
    """Cross-attention of one masked patch of each image to all patches in the regressor.

    Args:
        model: In eval mode.
        images: Normalised, shape (B, C, H, W).
        masks: Bool tensor on the host, shape (B, N), True = masked.
        patches: Index of a masked patch of each image, shape (B,), on the host.
        layer: Index of the regressor's block, -1 is the last.

    Returns:
        Shape (B, heads, N), the sum over N is 1. Keys of masked patches are their estimates so far.
    """
    if not model.neck.regressor:
        raise ValueError(
            'the model has no regressor: model.neck.regressor_depth of its config is 0'
        )
    ids_v, ids_m = split_mask(masks)
    asked = (ids_m == patches[:, None]).int()  # [B, M]
    if not asked.any(1).all():
        raise ValueError('the regressor is asked for masked patches only: one of these is visible')
    with record_attention(_pick(model.neck.regressor, layer).attn) as recorded:
        model.reconstruct(images, masks)
    rows = torch.arange(len(masks)), slice(None), asked.argmax(1)
    weights = recorded[0].cpu()[rows]  # [B, heads, V+M], visible patches first
    order = torch.cat([ids_v, ids_m], dim=1).argsort(1)  # [B, N]
    return gather_tokens(weights.mT, order).mT


def nearest_masked(masks: Tensor, grid: Grid, place: tuple[int, int]) -> Tensor:
    """Index of the masked patch of each image, shape (B,), nearest to (row, column)."""
    rows, columns = (torch.arange(side) for side in grid)
    distance = (rows[:, None] - place[0]) ** 2 + (columns - place[1]) ** 2  # [h, w]
    return distance.flatten().expand(masks.shape).masked_fill(~masks, distance.max() + 1).argmin(1)


def with_mean(weights: Tensor) -> Tensor:
    """Put the mean over heads before the heads: (B, heads, N) -> (B, 1 + heads, N)."""
    return torch.cat([weights.mean(1, keepdim=True), weights], dim=1)


def attended_share(weights: Tensor) -> Tensor:
    """Perplexity of attention (..., N) over the number of patches: 1 is uniform, 1/N one patch."""
    p = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp() / weights.shape[-1]


def overlay(picture: Tensor, weights: Tensor, grid: Grid, top: float) -> Tensor:
    """Colour a picture, RGB (3, H, W), by weights (N,): dark is 0, yellow ``top`` or more."""
    heat = (weights.float().cpu() / top).clamp(0, 1).view(1, 1, *grid)
    heat = F.interpolate(heat, picture.shape[1:], mode='bilinear')[0, 0]  # [H, W]
    colors = torch.from_numpy(colormaps['inferno'](heat.numpy())[..., :3]).float()
    gray = picture.mean(0, keepdim=True)
    return 0.35 * gray + 0.65 * colors.permute(2, 0, 1)


def paint_attention(
    pictures: Tensor, weights: Tensor, grid: Grid, top: float
) -> list[list[Tensor]]:
    """Rows of a sheet: each picture (3, H, W), then its overlays by its K maps, (B, K, N)."""
    return [
        [picture, *(overlay(picture, weight, grid, top) for weight in maps)]
        for picture, maps in zip(pictures, weights, strict=True)
    ]


def attention_scale(maps: Sequence[Tensor]) -> tuple[float, str]:
    """Weight that is painted brightest, of maps (B, K, N), and what a sheet says of it."""
    top = float(np.quantile(np.concatenate([each.flatten() for each in maps]), BRIGHTEST))
    uniform = top * maps[-1].shape[-1]
    return top, f'yellow: {uniform:.1f} times uniform attention or more; black: none'


def attention_titles(heads: int) -> list[str]:
    """Columns of a sheet of ``paint_attention``, with the maps of ``with_mean``."""
    return ['', 'mean', *(f'head {i}' for i in range(1, heads + 1))]


def _pick(blocks: Any, layer: int) -> Any:
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(
            f'there is no block {layer} among {len(blocks)}: the first is 0, the last -1'
        )
    return blocks[layer]
