"""The encoder F of CAE: one ViT backbone for pretraining, probing and every downstream task.

References:
    Paper, section 3.1 "Encoder": https://arxiv.org/abs/2202.03026
    Official code: https://github.com/Atten4Vis/CAE/blob/master/models/modeling_cae_helper.py
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_mm.checkpoints import EncoderDescription, PretrainedModule
from cae_mm.models.archs import resolve_arch
from cae_mm.models.blocks import (
    Block,
    LayerNorm,
    PatchEmbed,
    init_linear_and_norm,
    linear_drop_path,
    run_block,
    trunc_normal_,
)
from cae_mm.models.positions import SinCosPositions, fit_bias_tables
from cae_mm.patches import Grid, gather_tokens, grid_of, patchify, to_pair, unpadded_grids
from cae_mm.registry import MODELS

OUT_TYPES = ('raw', 'cls_token', 'featmap', 'avg_featmap')


@MODELS.register_module()
class CAEViT(PretrainedModule):
    """Vision transformer of CAE.

    Args:
        arch: A name in ``cae_mm.models.archs.ARCHS``, or a dict with the keys of its entries.
        img_size: Height and width in pixels: of the images in pretraining; elsewhere, where any
            size will do, those that relative position tables are made for.
        pretrain_img_size: Height and width in pixels of pretraining, where the checkpoint that is
            loaded does not say; None means ``img_size``. Other sizes get positions resized
            bicubically from these, as in the official downstream code.
        unpadded_positions: Resize positions to each image's own grid of patches, whatever padding
            (zeros, after normalisation) the batch adds at the right and the bottom. False: to the
            grid of the padded batch, as the official downstream code.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        mlp_ratio: Hidden width of the MLPs over the width.
        drop_path_rate: Drop path of the last block; grows linearly from 0 over depth.
        out_indices: Blocks whose outputs ``forward`` returns, in ascending order; -1 is the last.
        out_type: What is returned of each of them: 'raw' tokens (B, 1 + N, D) with the class
            token first, 'cls_token' (B, D), 'featmap' (B, D, H/p, W/p) or 'avg_featmap' (B, D),
            the mean over patches before the final norm (official ``fc_norm``).
        use_rel_pos_bias: Learn a relative position bias in each block: fine-tuning and
            segmentation have it, pretraining has not.
        final_norm: Whether the last block's output is normalised; the official dense prediction
            code does not.
        window_size: Side in patches of the windows that all blocks but ``global_blocks`` attend
            in, as ViTDet for large images; None for global attention everywhere.
        global_blocks: Blocks with global attention where there are windows.
        frozen_stages: Number of blocks that are frozen with everything before them; -1 freezes
            nothing, ``depth`` freezes all, the final norm included.
        with_cp: Recompute each block's activations in the backward pass to save memory.
        xavier_patch_embed: Start the patch embedding xavier-uniform over the flat patch, as MAE
            (arXiv 2111.06377) does: with a standard deviation of 0.036 for 3 x 16 x 16 values and a
            width of 768, of 0.079 for 3 x 8 x 8 and 128. The official code's is 0.011 at any size,
            beside positions of amplitude 1.
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
        xavier_patch_embed: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = resolve_arch(arch)
        self.embed_dims, self.depth = arch['embed_dims'], arch['depth']
        self.patch_size = patch_size
        self.grid = grid_of(to_pair(img_size), patch_size)
        self.out_indices = self._resolve_indices('out_indices', out_indices)
        self.out_type = out_type
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.xavier_patch_embed = xavier_patch_embed
        self.unpadded_positions = unpadded_positions
        self.bias_grid = self.grid if use_rel_pos_bias else None
        self.window_size = window_size
        self.global_blocks = self._resolve_indices('global_blocks', global_blocks)
        self._check_options()

        self.patch_embed = PatchEmbed(in_channels, patch_size, self.embed_dims)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        base_grid = grid_of(to_pair(pretrain_img_size or img_size), patch_size)
        self.positions = SinCosPositions(self.embed_dims, base_grid)
        self.blocks = nn.ModuleList(
            Block(
                self.embed_dims,
                arch['num_heads'],
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                layer_scale=arch['layer_scale'],
                bias_grid=self.bias_grid,
                window_size=None if i in self.global_blocks else window_size,
            )
            for i, rate in enumerate(linear_drop_path(drop_path_rate, self.depth))
        )
        self.norm = LayerNorm(self.embed_dims) if final_norm else nn.Identity()
        self._freeze_stages()

    def _check_options(self) -> None:
        depth, frozen, window = self.depth, self.frozen_stages, self.window_size
        _check_out_type(self.out_type)
        if list(self.out_indices) != sorted(set(self.out_indices)):
            raise ValueError(f'out_indices must ascend, as blocks do: not {self.out_indices}')
        if not -1 <= frozen <= depth:
            raise ValueError(f'frozen_stages must be in [-1, {depth}], not {frozen}')
        if self.bias_grid and self.unpadded_positions:
            raise ValueError(
                'use_rel_pos_bias resizes its tables to the padded batch: leave out '
                'unpadded_positions'
            )
        if self.bias_grid and window is not None:
            raise ValueError('windows have no relative position bias: choose one of the two')
        if window is not None and window < 1:
            raise ValueError(f'window_size must be at least 1, not {window}')
        if window is None and self.global_blocks:
            raise ValueError('global_blocks needs a window_size: without one all blocks are global')

    def init_default_weights(self) -> None:
        """Initialise as the official code does (xavier linears, truncated normal rest)."""
        self.apply(init_linear_and_norm)
        self.patch_embed.init_weights(self.xavier_patch_embed)
        trunc_normal_(self.cls_token)

    def forward_features(
        self, images: Tensor, ids: Tensor | None = None, mask_tokens: Tensor | None = None
    ) -> Tensor:
        """Encode the class token and the patches ``ids``; other patches are not looked at.

        Args:
            images: Normalised images, shape (B, C, H, W), H and W multiples of the patch size.
            ids: Indices of K patches of each image, shape (B, K), or None for all N patches.
            mask_tokens: M tokens with their positions, shape (B, M, D), that are encoded with
                them; None for none.

        Returns:
            Tensor with shape (B, 1 + K, D), or (B, 1 + K + M, D) with mask tokens, after the final
            norm, class token first.
        """
        if ids is not None and (self.bias_grid or self.window_size):
            raise ValueError(
                'pretraining sees some patches only and has no relative position bias and no '
                'windows: leave out use_rel_pos_bias and window_size'
            )
        grid = grid_of(images.shape[-2:], self.patch_size)
        x = self._embed(images, grid, ids)
        if mask_tokens is not None:
            x = torch.cat([x, mask_tokens], dim=1)  # [B, 1+K+M, D]
        for block in self.blocks:
            x = run_block(block, self.with_cp, x, grid)
        return self.norm(x)

    def forward(self, images: Tensor, out_type: str | None = None) -> tuple[Tensor, ...]:
        """Return the outputs of the blocks ``out_indices`` in the form ``out_type``.

        Args:
            images: Normalised images of any size, shape (B, C, H, W). Where the patch size does
                not divide it, zeros (the mean colour) are added at the right and the bottom.
            out_type: None for the option of this name.

        Returns:
            One tensor per index; the final norm is applied to the last block's output only.
        """
        p, (H, W) = self.patch_size, images.shape[-2:]
        if H % p or W % p:
            images = F.pad(images, (0, -W % p, 0, -H % p))
        grid = grid_of(images.shape[-2:], p)
        out_type = out_type or self.out_type
        _check_out_type(out_type)
        x = self._embed(images, grid)
        outs, last = [], max(self.out_indices)
        for i, block in enumerate(islice(self.blocks, last + 1)):  # torch 2.4 exports no slice
            only_cls = i == last and out_type == 'cls_token'
            x = run_block(block, self.with_cp, x, grid, 1 if only_cls else None)
            if i in self.out_indices:
                norm = self.norm if i == self.depth - 1 else nn.Identity()
                outs.append(_format(x, grid, out_type, norm))
        return tuple(outs)

    def describe(self) -> EncoderDescription:
        """Say what weights of this encoder do not tell; mean and std are not known here."""
        p = self.patch_size
        first: Any = self.blocks[0]
        h, w = self.grid
        base_h, base_w = self.positions.base_grid or self.grid
        return EncoderDescription(
            embed_dims=self.embed_dims,
            depth=self.depth,
            num_heads=first.attn.num_heads,
            mlp_ratio=first.mlp.fc1.out_features / self.embed_dims,
            patch_size=p,
            in_channels=self.patch_embed.proj.in_channels,
            img_size=(h * p, w * p),
            pretrain_img_size=(base_h * p, base_w * p),
            use_rel_pos_bias=self.bias_grid is not None,
            final_norm=not isinstance(self.norm, nn.Identity),
            pooled_norm=self.out_type == 'avg_featmap',
            window_size=self.window_size,
            global_blocks=self.global_blocks,
        )

    def set_pretrain_size(self, size: tuple[int, int]) -> None:
        """Resize positions from those for ``size`` pixels from now on."""
        self.positions.set_base_grid(grid_of(size, self.patch_size))

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Make the weights of another ``CAEViT`` fit the options of this one.

        The final norm is left out where this model has none; relative position tables are resized
        bicubically to this model's grid, or zero where there are none.

        Returns:
            A copy of ``state`` with these changes, and a remark for each of them.
        """
        state, remarks, final_norm = dict(state), [], {'norm.weight', 'norm.bias'}
        if isinstance(self.norm, nn.Identity) and state.keys() & final_norm:
            state = {key: value for key, value in state.items() if key not in final_norm}
            remarks.append('the final norm is left out: final_norm=False')
        if self.bias_grid is not None:
            remarks += fit_bias_tables(state, self.state_dict(), self.bias_grid)
        return state, remarks

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return a parameter's layer for layer-wise learning rate decay, and the number of layers.

        As in the official ``get_num_layer_for_vit``: 0 for the embeddings, i + 1 for block i,
        depth + 1 for all the rest (the final norm and what lies outside the backbone, whose
        parameters' names start with ``prefix``).
        """
        blocks, last = f'{prefix}blocks.', self.depth + 1
        if param_name.startswith(blocks):
            return int(param_name.removeprefix(blocks).split('.')[0]) + 1, last + 1
        embeddings = (f'{prefix}cls_token', f'{prefix}patch_embed')
        return 0 if param_name.startswith(embeddings) else last, last + 1

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

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        self.cls_token.requires_grad_(False)
        for module in (self.patch_embed, *self.blocks[: self.frozen_stages]):
            module.eval().requires_grad_(False)
        if self.frozen_stages == self.depth:
            self.norm.eval().requires_grad_(False)

    def _resolve_indices(self, option: str, blocks: int | Sequence[int]) -> tuple[int, ...]:
        indices = [blocks] if isinstance(blocks, int) else list(blocks)
        for index in indices:
            if not -self.depth <= index < self.depth:
                raise ValueError(f'{option} has {index}, but there are {self.depth} blocks')
        return tuple(index % self.depth for index in indices)


def _check_out_type(out_type: str) -> None:
    if out_type not in OUT_TYPES:
        raise ValueError(f"Unknown out_type '{out_type}': choose one of {OUT_TYPES}")


def _format(x: Tensor, grid: Grid, out_type: str, norm: nn.Module) -> Tensor:
    if out_type == 'raw':
        return norm(x)
    if out_type == 'cls_token':
        return norm(x[:, 0])
    if out_type == 'avg_featmap':
        return norm(x[:, 1:].mean(1))
    maps = norm(x[:, 1:]).transpose(1, 2).unflatten(-1, grid)  # [B, D, h, w]
    # mmcv's RoIAlign ignores strides, so transposed maps would pass through convolutions
    # channels last, and be read in the wrong order: open-mmlab/mmcv#2203
    return maps.contiguous()
