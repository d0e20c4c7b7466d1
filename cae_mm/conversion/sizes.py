"""Tell sizes from weights under our names, and compute the tensors that others store."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cae_mm.checkpoints import EncoderDescription
from cae_mm.conversion.rules import count_blocks
from cae_mm.conversion.sources import INDEX, TABLE
from cae_mm.models.archs import ARCHS
from cae_mm.models.positions import SinCosPositions, relative_position_index
from cae_mm.patches import Grid, grid_of

# The official models have 12 heads up to width 768, and PASSL's follow them; ours and those of timm
# and the like have 64 values per head. Official fine-tuning without relative position bias looks
# as timm's, so that nothing can be assumed there.
SMALL_HEADS = {'official': 12, 'passl': 12, 'timm': None}
# the option for the decoder's heads never reaches the official model, which has 12 at any width
DECODER_HEADS = {'official': 12, 'passl': 12}
PRETRAIN_GRID = (14, 14)  # of all published weights: 224 px, patches of 16
CPU = torch.device('cpu')


def describe_weights(
    state: dict[str, Tensor],
    *,
    source: str,
    num_heads: int | None,
    img_size: tuple[int, int] = (224, 224),
    pooled_norm: bool,
) -> tuple[EncoderDescription, list[str]]:
    """Describe an encoder by its shapes and by what no shape tells, and say what was assumed.

    Without ``num_heads`` it is that of relative position tables, or of what ``source`` published
    ('' is this project).
    """
    width = _tensor(state, 'backbone.cls_token').shape[-1]
    patch = _tensor(state, 'backbone.patch_embed.proj.weight')
    tables = [table for key, table in state.items() if key.endswith(TABLE)]
    heads, remarks = num_heads, []
    if tables:
        heads = tables[0].shape[1]
        if num_heads not in (None, heads):
            raise ValueError(f'it has relative position tables of {heads} heads, not {num_heads}')
    elif heads is None:
        heads = _published_heads(width, source)
        remarks.append(
            f'{heads} heads assumed, as published for width {width}: the file does not tell, '
            '--num-heads does'
        )
    description = EncoderDescription(
        embed_dims=width,
        depth=count_blocks(state),
        num_heads=heads,
        mlp_ratio=len(_tensor(state, 'backbone.blocks.0.mlp.fc1.weight')) / width,
        patch_size=patch.shape[-1],
        in_channels=patch.shape[1],
        img_size=img_size,
        pretrain_img_size=img_size,
        use_rel_pos_bias=bool(tables),
        final_norm=any(key.startswith('backbone.norm.') for key in state),
        pooled_norm=pooled_norm,
    )
    return description, remarks


def _tensor(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f'it has no {key!r}')
    return state[key]


def _published_heads(width: int, source: str) -> int:
    published = {arch['embed_dims']: arch['num_heads'] for arch in ARCHS.values()}.get(width)
    heads = SMALL_HEADS.get(source, published) if width in (192, 384) else published
    if heads is None:
        raise ValueError(
            f'it does not tell the number of heads, and width {width} is none that was published: '
            'give --num-heads'
        )
    return heads


def find_sizes(checks: dict[str, tuple[str, Tensor]], p: int) -> tuple[Grid, Grid]:
    """Find the size of images, and that of pretraining, whose sin-cos positions a file has."""
    table = next((tensor for ours, tensor in checks.values() if ours == 'positions'), None)
    if table is None or not table.numel():
        raise ValueError(
            'it has no absolute positions, as BEiT; a CAEViT always adds its sin-cos table, which '
            'would change all features'
        )
    N, D = table.shape[-2] - 1, table.shape[-1]
    nearest = math.inf
    for base in (None, PRETRAIN_GRID):
        for grid in ((h, N // h) for h in range(1, N + 1) if N % h == 0):
            error = (fixed_positions(D, grid, base) - table.float()).abs().max().item()
            if error <= position_tolerance(table):
                rows, columns = base or grid
                return (grid[0] * p, grid[1] * p), (rows * p, columns * p)
            nearest = min(nearest, error)
    raise ValueError(
        'it has positions that are not the sin-cos table of CAE (the nearest is off by '
        f'{nearest:.2g}): they were learned or made otherwise, and a CAEViT has no learned ones'
    )


def fixed_positions(dim: int, grid: Grid, base: Grid | None = None) -> Tensor:
    """Our positions as others store them, shape (1, 1 + N, D): the class token's is zero."""
    return F.pad(SinCosPositions(dim, base_grid=base)(grid, CPU), (0, 0, 1, 0))[None]


def fixed_tensors(d: EncoderDescription, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the tensors that others store and we do not, by their names in ``Check`` rules."""
    grid, base = (grid_of(size, d.patch_size) for size in (d.img_size, d.pretrain_img_size))
    tensors = {'positions': fixed_positions(d.embed_dims, grid, base)}
    if d.use_rel_pos_bias:
        index = relative_position_index(grid, CPU)
        tensors |= {f'backbone.blocks.{i}.attn.{INDEX}': index for i in range(d.depth)}
    if 'neck.mask_token' in state:
        tensors['neck_positions'] = fixed_positions(state['neck.mask_token'].shape[-1], grid)
    return tensors


def position_tolerance(table: Tensor) -> float:
    """Return how far a stored table of positions may be off: rounding of its type, of resizing."""
    return max(1e-5, 4 * torch.finfo(table.dtype).eps)


def read_neck_sizes(
    state: dict[str, Tensor], in_dims: int, num_heads: int
) -> dict[str, Any] | None:
    """Read the arguments of ``CAENeck`` from shapes, None if there is no neck."""
    if not any(key.startswith('neck.') for key in state):
        return None
    width = _tensor(state, 'neck.mask_token').shape[-1]
    if width % num_heads:
        raise ValueError(f'{num_heads} heads do not divide width {width}: --decoder-heads')
    return {
        'in_dims': in_dims,
        'embed_dims': width,
        'num_heads': num_heads,
        'regressor_depth': count_blocks(state, 'neck.regressor.'),
        'decoder_depth': count_blocks(state, 'neck.decoder.'),
        'out_dims': len(_tensor(state, 'neck.output.weight')),
        'mlp_ratio': len(_tensor(state, 'neck.regressor.0.mlp.fc1.weight')) / width,
    }
