"""The encoder F of CAE: one ViT backbone for pretraining, probing and every downstream task.

References:
    Paper, section 3.1 "Encoder": https://arxiv.org/abs/2202.03026
    Official code: https://github.com/Atten4Vis/CAE/blob/master/models/modeling_cae_helper.py
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from cae_mm.checkpoints import EncoderDescription, PretrainedModule
from cae_mm.models.blocks import Block, init_linear_and_norm, linear_drop_path, trunc_normal_
from cae_mm.models.positions import SinCosPositions, num_relative_positions, resize_bias_table
from cae_mm.patches import Grid, gather_tokens, grid_of, patchify, to_pair, unpadded_grids
from cae_mm.registry import MODELS

# Sizes: paper, "Training Details" (S, B, L) and "Downstream Tasks" (H).
# Layer scale: official scripts, --layer_scale_init_value (S, B: 0.1, L: 1e-5).
ARCHS: dict[str, dict[str, Any]] = {
    # of the demo and the comparison on Imagenette: trains on a CPU
    'mini': dict(embed_dims=192, depth=6, num_heads=3, layer_scale=0.1),
    # the official cae_tiny has 12 heads; 3 is the standard ViT-Ti
    'tiny': dict(embed_dims=192, depth=12, num_heads=3, layer_scale=0.1),
    # the paper says "standard ViT-S", that is 6 heads; the official cae_small has 12
    'small': dict(embed_dims=384, depth=12, num_heads=6, layer_scale=0.1),
    'base': dict(embed_dims=768, depth=12, num_heads=12, layer_scale=0.1),
    'large': dict(embed_dims=1024, depth=24, num_heads=16, layer_scale=1e-5),
    'huge': dict(embed_dims=1280, depth=32, num_heads=16, layer_scale=1e-5),
}
BIAS_TABLE = 'relative_position_bias_table'
OUT_TYPES = ('raw', 'cls_token', 'featmap', 'avg_featmap')


class PatchEmbed(nn.Module):
    """Linear projection of flat patches, stored as the convolution that other codes use."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def init_weights(self) -> None:
        """Initialise as the official code does."""
        trunc_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]  # a Conv2d may have none

    def forward(self, patches: Tensor) -> Tensor:
        """Embed ``patches``, shape (B, K, C * p * p), into shape (B, K, D)."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


@MODELS.register_module()
class CAEViT(PretrainedModule):
    """Vision transformer of CAE.

    Args:
        arch: 'mini', 'tiny', 'small', 'base', 'large', 'huge', or a dict with the keys
            ``embed_dims``, ``depth``, ``num_heads`` and ``layer_scale``.
        img_size: Height and width in pixels that relative position tables are made for, and
            positions if ``pretrain_img_size`` does not say otherwise. In pretraining the images
            must have this size; elsewhere any size will do, tables and positions are resized.
        pretrain_img_size: Height and width in pixels of pretraining, for which the fixed positions
            are exact, where the checkpoint that is loaded does not say; None means ``img_size``.
            Other sizes get positions resized bicubically from these, as in the official
            downstream code.
        unpadded_positions: Resize positions to each image's own grid of patches, so that they do
            not depend on how far it is padded at the right and the bottom (with zeros, after
            normalisation). False: to the grid of the padded batch, as the official downstream code.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        mlp_ratio: Hidden width of the MLPs over the width.
        drop_path_rate: Drop path of the last block; grows linearly from 0 over depth.
        out_indices: Blocks whose outputs ``forward`` returns, in ascending order, counted from 0;
            negative numbers count from the end.
        out_type: What is returned of each of them: 'raw' tokens (B, 1 + N, D) with the class
            token first, 'cls_token' (B, D), 'featmap' (B, D, H/p, W/p) or 'avg_featmap' (B, D),
            the mean over patches, to which the final norm is applied (official ``fc_norm``).
        use_rel_pos_bias: Learn a relative position bias in each block, from zero: fine-tuning and
            segmentation have it, pretraining has not.
        final_norm: Whether the last block's output is normalised. The official dense prediction
            code does not; the final norm's weights in a checkpoint are then left out.
        window_size: Side in patches of the windows that all blocks but ``global_blocks`` attend
            in, as ViTDet for large images; None for global attention everywhere.
        global_blocks: Blocks with global attention where there are windows, counted from 0.
        frozen_stages: Number of blocks that are frozen with everything before them; -1 freezes
            nothing, ``depth`` freezes all, the final norm included.
        with_cp: Recompute each block's activations in the backward pass to save memory.
        init_cfg: ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')`` or None.
    """

    def __init__(
        self,
        *,
        arch: str | dict[str, Any] = 'base',
        img_size: int | tuple[int, int] = 224,
        pretrain_img_size: int | tuple[int, int] | None = None,
        unpadded_positions: bool = False,
        patch_size: int = 16,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'raw',
        use_rel_pos_bias: bool = False,
        final_norm: bool = True,
        window_size: int | None = None,
        global_blocks: Sequence[int] = (),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = _resolve_arch(arch)
        self.embed_dims = arch['embed_dims']
        self.depth = arch['depth']
        self.patch_size = patch_size
        self.grid = grid_of(to_pair(img_size), patch_size)
        self.out_indices = self._resolve_indices('out_indices', out_indices)
        if out_type not in OUT_TYPES:
            raise ValueError(f"Unknown out_type '{out_type}': choose one of {OUT_TYPES}")
        self.out_type = out_type
        if not -1 <= frozen_stages <= self.depth:
            raise ValueError(f'frozen_stages must be in [-1, {self.depth}], not {frozen_stages}')
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        if use_rel_pos_bias and unpadded_positions:
            raise ValueError(
                'use_rel_pos_bias resizes its tables to the padded batch: leave out '
                'unpadded_positions'
            )
        self.unpadded_positions = unpadded_positions
        if use_rel_pos_bias and window_size is not None:
            raise ValueError('windows have no relative position bias: choose one of the two')
        if window_size is not None and window_size < 1:
            raise ValueError(f'window_size must be at least 1, not {window_size}')
        if window_size is None and global_blocks:
            raise ValueError('global_blocks needs a window_size: without one all blocks are global')
        self.bias_grid = self.grid if use_rel_pos_bias else None
        self.window_size = window_size
        windows: list[int | None] = [window_size] * self.depth
        for index in self._resolve_indices('global_blocks', global_blocks):
            windows[index] = None

        self.patch_embed = PatchEmbed(in_channels, patch_size, self.embed_dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        pretrain_grid = grid_of(to_pair(pretrain_img_size or img_size), patch_size)
        self.positions = SinCosPositions(self.embed_dims, base_grid=pretrain_grid)
        self.blocks = nn.ModuleList(
            Block(
                self.embed_dims,
                arch['num_heads'],
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                layer_scale=arch['layer_scale'],
                bias_grid=self.bias_grid,
                window_size=window,
            )
            for rate, window in zip(
                linear_drop_path(drop_path_rate, self.depth), windows, strict=True
            )
        )
        self.norm = nn.LayerNorm(self.embed_dims, eps=1e-6) if final_norm else nn.Identity()
        self._freeze_stages()

    def init_default_weights(self) -> None:
        """Initialise as the official code does (xavier linears, truncated normal rest)."""
        self.apply(init_linear_and_norm)
        self.patch_embed.init_weights()
        trunc_normal_(self.cls_token)

    def forward_features(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Encode the class token and the patches ``ids``; other patches are not looked at.

        Args:
            images: Normalised images, shape (B, C, H, W), H and W multiples of the patch size.
            ids: Indices of K patches of each image, shape (B, K), or None for all N patches.

        Returns:
            Tensor with shape (B, 1 + K, D) after the final norm, class token first.

        Raises:
            ValueError: If ``ids`` are given to a model with relative position bias or windows.
        """
        if ids is not None and (self.bias_grid or self.window_size):
            raise ValueError(
                'pretraining sees some patches only and has no relative position bias and no '
                'windows: leave out use_rel_pos_bias and window_size'
            )
        grid = grid_of((images.shape[-2], images.shape[-1]), self.patch_size)
        x = self._embed(images, grid, ids)
        for block in self.blocks:
            x = self._run(block, x, grid)
        return self.norm(x)  # [B, 1+K, D]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the blocks ``out_indices`` in the form ``out_type``.

        Args:
            images: Normalised images of any size, shape (B, C, H, W). Where the patch size does
                not divide it, zeros (the mean colour) are added at the right and the bottom.

        Returns:
            One tensor per index; the final norm is applied to the last block's output only.
        """
        H, W = images.shape[-2:]
        p = self.patch_size
        if H % p or W % p:
            images = F.pad(images, (0, -W % p, 0, -H % p))
        grid = grid_of((images.shape[-2], images.shape[-1]), p)
        x = self._embed(images, grid)
        outs = []
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, grid)
            if i in self.out_indices:
                outs.append(self._format(x, grid, last=i == self.depth - 1))
        return tuple(outs)

    def describe(self) -> EncoderDescription:
        """Say what weights of this encoder do not tell; mean and std are not known here."""
        first: Any = self.blocks[0]
        h, w = self.grid
        base_h, base_w = self.positions.base_grid or self.grid
        return EncoderDescription(
            embed_dims=self.embed_dims,
            depth=self.depth,
            num_heads=first.attn.num_heads,
            mlp_ratio=first.mlp.fc1.out_features / self.embed_dims,
            patch_size=self.patch_size,
            in_channels=self.patch_embed.proj.in_channels,
            img_size=(h * self.patch_size, w * self.patch_size),
            pretrain_img_size=(base_h * self.patch_size, base_w * self.patch_size),
            use_rel_pos_bias=self.bias_grid is not None,
            final_norm=not isinstance(self.norm, nn.Identity),
            pooled_norm=self.out_type == 'avg_featmap',
        )

    def set_pretrain_size(self, size: tuple[int, int]) -> None:
        """Resize positions from those for ``size`` pixels from now on."""
        self.positions.set_base_grid(grid_of(size, self.patch_size))

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Make the weights of another ``CAEViT`` fit the options of this one.

        Args:
            state: Weights of an encoder, without prefix; left as it is.

        Returns:
            The weights with the final norm left out where this model has none, and with relative
            position tables for this model's grid: resized bicubically, or zero where there are
            none. And one remark for each of these changes.
        """
        state, remarks = dict(state), []
        if isinstance(self.norm, nn.Identity):
            dropped = [
                key for key in ('norm.weight', 'norm.bias') if state.pop(key, None) is not None
            ]
            if dropped:
                remarks.append('the final norm is left out: final_norm=False')
        tables = {k: v for k, v in self.state_dict().items() if k.endswith(BIAS_TABLE)}
        missing = [key for key in tables if key not in state]
        if missing:
            state |= {key: torch.zeros_like(tables[key]) for key in missing}
            remarks.append(f'{len(missing)} relative position tables start from zero')
        resized = [key for key, table in tables.items() if len(state[key]) != len(table)]
        for key in resized:
            state[key] = self._resize_table(key, state[key])
        if resized:
            remarks.append(f'{len(resized)} relative position tables are resized bicubically')
        return state, remarks

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return a parameter's layer for layer-wise learning rate decay, and the number of layers.

        As in the official ``get_num_layer_for_vit``: 0 for the embeddings, i + 1 for block i,
        depth + 1 for all the rest (the final norm and what lies outside the backbone).

        Args:
            param_name: Name of the parameter, with ``prefix``.
            prefix: The backbone's place in the model, for example 'backbone.'.
        """
        num_layers = self.depth + 2
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        if name.startswith(('cls_token', 'patch_embed')):
            return 0, num_layers
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1, num_layers
        return num_layers - 1, num_layers

    def train(self, mode: bool = True) -> 'CAEViT':
        """Set the mode; frozen blocks stay in eval mode (no drop path)."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _embed(self, images: Tensor, grid: Grid, ids: Tensor | None = None) -> Tensor:
        patches = patchify(images, self.patch_size)  # [B, N, C*p*p]
        if self.unpadded_positions:
            positions = self.positions.of_padded(grid, unpadded_grids(patches, grid))  # [B, N, D]
        else:
            positions = self.positions(grid, images.device)[None]  # [1, N, D]
        positions = positions.to(self.cls_token.dtype)
        if ids is not None:
            patches = gather_tokens(patches, ids)  # [B, K, C*p*p]
            positions = gather_tokens(positions.expand(len(ids), -1, -1), ids)  # [B, K, D]
        x = self.patch_embed(patches) + positions
        # the class token's position is zero in the official code: nothing to add
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)  # len() is a constant when exported
        return torch.cat([cls_token, x], dim=1)  # [B, 1+K, D]

    def _run(self, block: nn.Module, x: Tensor, grid: Grid) -> Tensor:
        if self.with_cp and self.training and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid)

    def _format(self, x: Tensor, grid: Grid, last: bool) -> Tensor:
        norm = self.norm if last else nn.Identity()
        if self.out_type == 'raw':
            return norm(x)
        if self.out_type == 'cls_token':
            return norm(x[:, 0])
        if self.out_type == 'avg_featmap':
            return norm(x[:, 1:].mean(1))
        maps = norm(x[:, 1:]).transpose(1, 2).unflatten(-1, grid)  # [B, D, h, w]
        # mmcv's RoIAlign ignores strides, so transposed maps would pass through convolutions
        # channels last, and be read in the wrong order: open-mmlab/mmcv#2203
        return maps.contiguous()

    def _resize_table(self, key: str, table: Tensor) -> Tensor:
        """Resize a relative position table, made for a square grid, to this model's grid."""
        assert self.bias_grid is not None
        side = (math.isqrt(max(len(table) - 3, 0)) + 1) // 2
        if len(table) != num_relative_positions((side, side)):
            raise ValueError(
                f'{key} has {len(table)} entries, which is no relative position table of a square '
                'grid: set img_size to the size that it was trained with'
            )
        return resize_bias_table(table, (side, side), self.bias_grid)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = [self.patch_embed, *self.blocks[: self.frozen_stages]]
        if self.frozen_stages == self.depth:
            frozen.append(self.norm)
        self.cls_token.requires_grad_(False)
        for module in frozen:
            module.eval().requires_grad_(False)

    def _resolve_indices(self, option: str, blocks: int | Sequence[int]) -> tuple[int, ...]:
        indices = [blocks] if isinstance(blocks, int) else list(blocks)
        for index in indices:
            if not -self.depth <= index < self.depth:
                raise ValueError(f'{option} has {index}, but there are {self.depth} blocks')
        return tuple(index % self.depth for index in indices)


def _resolve_arch(arch: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f"Unknown arch '{arch}': choose one of {tuple(ARCHS)} or give a dict")
        return ARCHS[arch]
    if set(arch) != set(ARCHS['base']):
        raise ValueError(f'arch needs exactly the keys {sorted(ARCHS["base"])}, not {sorted(arch)}')
    return arch
