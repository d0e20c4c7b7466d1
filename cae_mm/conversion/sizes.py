"""Tell sizes from weights under our names, and compute the tensors that others store."""

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

# Heads by width, where nothing in a file tells them. Ours and those of timm and the like have 64
# values per head, the official models (and PASSL's, which follow them) 12 heads up to width 768.
OUR_HEADS = {arch['embed_dims']: arch['num_heads'] for arch in ARCHS.values()}
OFFICIAL_HEADS = OUR_HEADS | {192: 12, 384: 12}
HEADS = {'official': OFFICIAL_HEADS, 'passl': OFFICIAL_HEADS}
# official fine-tuning without relative position bias looks as timm's: assume what both agree on
HEADS['timm'] = {D: n for D, n in OUR_HEADS.items() if OFFICIAL_HEADS[D] == n}
# the option for the decoder's heads never reaches the official model, which has 12 at any width
DECODER_HEADS = {'official': 12, 'passl': 12}
PRETRAIN_GRID = (14, 14)  # of all published weights: 224 px, patches of 16
CPU = torch.device('cpu')


def describe_weights(
    state: dict[str, Tensor],
    *,
    source: str,
    num_heads: int | None,
    grids: tuple[Grid, Grid],
    pooled_norm: bool,
    remarks: list[str],
) -> EncoderDescription:
    """Describe an encoder by its shapes and by what no shape tells.

    Args:
        state: Weights under our names.
        source: The project that they come from, '' is this one.
        num_heads: If it is known; else that of relative position tables or of published weights.
        grids: Patches of the images, and those of pretraining.
        pooled_norm: Whether the final norm is applied to the mean of the patch tokens.
        remarks: What is assumed is added.

    Raises:
        ValueError: If there is no encoder, or its number of heads is unknown or contradictory.
    """
    try:
        width = state['backbone.cls_token'].shape[-1]
        patch = state['backbone.patch_embed.proj.weight']
        hidden = len(state['backbone.blocks.0.mlp.fc1.weight'])
    except KeyError as error:
        raise ValueError(f'it has no {error}') from error
    tables = [table for key, table in state.items() if key.endswith(TABLE)]
    p = patch.shape[-1]
    img_size, pretrain_img_size = ((rows * p, columns * p) for rows, columns in grids)
    return EncoderDescription(
        embed_dims=width,
        depth=count_blocks(state),
        num_heads=_resolve_heads(width, tables, num_heads, source, remarks),
        mlp_ratio=hidden / width,
        patch_size=p,
        in_channels=patch.shape[1],
        img_size=img_size,
        pretrain_img_size=pretrain_img_size,
        use_rel_pos_bias=bool(tables),
        final_norm='backbone.norm.weight' in state,
        pooled_norm=pooled_norm,
    )


def _resolve_heads(
    width: int, tables: list[Tensor], given: int | None, source: str, remarks: list[str]
) -> int:
    if tables:
        heads = tables[0].shape[1]
        if given not in (None, heads):
            raise ValueError(f'it has relative position tables of {heads} heads, not {given}')
        return heads
    if given is not None:
        return given
    published = HEADS.get(source, OUR_HEADS).get(width)
    if published is None:
        raise ValueError(
            f'it does not tell the number of heads, and width {width} is none that was published: '
            'give --num-heads'
        )
    remarks.append(
        f'{published} heads assumed, as published for width {width}: the file does not tell, '
        '--num-heads does'
    )
    return published


def find_grids(checks: dict[str, tuple[str, Tensor]]) -> tuple[Grid, Grid]:
    """Find the grid whose sin-cos positions a file has, and that from which they are resized.

    Raises:
        ValueError: If there is none.
    """
    table = next((tensor for ours, tensor in checks.values() if ours == 'positions'), None)
    if table is None:
        raise ValueError(
            'it has no absolute positions, as BEiT; a CAEViT always adds its sin-cos table, which '
            'would change all features'
        )
    N, D = table.shape[-2] - 1, table.shape[-1]
    errors: dict[float, tuple[Grid, Grid]] = {}
    for base in (None, PRETRAIN_GRID):
        for h in (h for h in range(1, N + 1) if N % h == 0):
            grid = h, N // h
            error = (fixed_positions(D, grid, base) - table.float()).abs().max().item()
            errors.setdefault(error, (grid, base or grid))
            if error <= position_tolerance(table):
                return errors[error]
    raise ValueError(
        'it has positions that are not the sin-cos table of CAE (the nearest is off by '
        f'{min(errors):.2g}): they were learned or made otherwise, and a CAEViT has no learned ones'
    )


def fixed_positions(dim: int, grid: Grid, base: Grid | None = None) -> Tensor:
    """Our positions as others store them, shape (1, 1 + N, D): the class token's is zero."""
    return F.pad(SinCosPositions(dim, base_grid=base)(grid, CPU), (0, 0, 1, 0))[None]


def fixed_tensors(d: EncoderDescription, neck_width: int | None = None) -> dict[str, Tensor]:
    """Compute the tensors that others store and we do not, by their names in ``Check`` rules.

    Returns:
        'positions' with shape (1, 1 + N, D), 'neck_positions' likewise if there is a neck, and
        for each block an index with shape (1 + N, 1 + N) if there are relative position tables.
    """
    grid, base = (grid_of(size, d.patch_size) for size in (d.img_size, d.pretrain_img_size))
    tensors = {'positions': fixed_positions(d.embed_dims, grid, base)}
    if d.use_rel_pos_bias:
        index = relative_position_index(grid, CPU)
        tensors |= {f'backbone.blocks.{i}.attn.{INDEX}': index for i in range(d.depth)}
    if neck_width is not None:
        tensors['neck_positions'] = fixed_positions(neck_width, grid)
    return tensors


def position_tolerance(table: Tensor) -> float:
    """Return how far a stored table of positions may be off: rounding of its type, of resizing."""
    return max(1e-5, 4 * torch.finfo(table.dtype).eps)


def read_neck_sizes(
    state: dict[str, Tensor],
    encoder: EncoderDescription,
    *,
    source: str,
    num_heads: int | None,
    remarks: list[str],
) -> dict[str, Any] | None:
    """Read the arguments of ``CAENeck`` from shapes, None if there is no neck.

    Args:
        state: Weights under our names.
        encoder: The one that it belongs to.
        source: See ``describe_weights``.
        num_heads: Heads of regressor and decoder, if they are known.
        remarks: What is assumed is added.

    Raises:
        ValueError: If the neck is incomplete, or the heads do not divide the width.
    """
    if not any(key.startswith('neck.') for key in state):
        return None
    try:
        width = state['neck.mask_token'].shape[-1]
        hidden = len(state['neck.regressor.0.mlp.fc1.weight'])
        out_dims = len(state['neck.output.weight'])
    except KeyError as error:
        raise ValueError(f'it has no {error}') from error
    if num_heads is None:
        num_heads = DECODER_HEADS.get(source, encoder.num_heads)
        remarks.append(
            f'{num_heads} heads of regressor and decoder assumed: the file does not tell, '
            '--decoder-heads does'
        )
    if width % num_heads:
        raise ValueError(f'{num_heads} heads do not divide width {width}: --decoder-heads')
    return {
        'in_dims': encoder.embed_dims,
        'embed_dims': width,
        'num_heads': num_heads,
        'regressor_depth': count_blocks(state, 'neck.regressor.'),
        'decoder_depth': count_blocks(state, 'neck.decoder.'),
        'out_dims': out_dims,
        'mlp_ratio': hidden / width,
    }
