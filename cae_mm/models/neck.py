"""The latent contextual regressor H and the decoder G of CAE.

References:
    Paper, section 3.1 "Regressor" and "Decoder": https://arxiv.org/abs/2202.03026
    Official code: https://github.com/Atten4Vis/CAE/blob/master/models/modeling_cae_helper.py
"""

from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from cae_mm.models.blocks import (
    Block,
    CrossAttention,
    LayerNorm,
    Mlp,
    init_linear_and_norm,
    linear_drop_path,
    make_layer_scale,
    run_block,
    trunc_normal_,
)
from cae_mm.models.functional import DropPath
from cae_mm.models.positions import SinCosPositions
from cae_mm.patches import Grid
from cae_mm.registry import MODELS


class RegressorBlock(nn.Module):
    """Cross-attention block: masked patches ask, visible and masked patches answer.

    Its options are those of ``Block``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.norm_q = LayerNorm(dim)
        self.norm_k = LayerNorm(dim)
        self.norm_v = LayerNorm(dim)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.gamma_1, self.gamma_2 = make_layer_scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_m: Tensor, z_v: Tensor, pos_m: Tensor, pos: Tensor) -> Tensor:
        """Update the masked patches.

        Args:
            x_m: Current estimate of the masked patches, shape (B, M, D).
            z_v: Latents of the visible patches, shape (B, V, D); never updated.
            pos_m: Positions of the masked patches, shape (B, M, D).
            pos: Positions of the visible, then of the masked patches, shape (B, V + M, D).
        """
        x = torch.cat([z_v, x_m], dim=1)  # [B, V+M, D]
        q, k, v = self.norm_q(x_m + pos_m), self.norm_k(x + pos), self.norm_v(x)
        x = self.drop_path(x_m, self.attn(q, k, v, self.gamma_1))
        x = self.norm2(x)  # the second residual starts from the normalised x
        return self.drop_path(x, self.mlp(x, self.gamma_2))  # [B, M, D]


@MODELS.register_module()
class CAENeck(BaseModule):
    """Regressor and decoder, with the projection before them where their width differs.

    Args:
        in_dims: Width of the encoder.
        embed_dims: Width D of regressor and decoder.
        num_heads: Number of attention heads.
        regressor_depth: Number of cross-attention blocks. 0: no regressor, the encoder predicts
            from mask tokens among its input, as in BEiT (arXiv 2106.08254).
        decoder_depth: Number of self-attention blocks. 0: no decoder, a linear layer predicts the
            targets (paper, section 4.5 "Decoder and alignment").
        out_dims: Size of the vocabulary, or values per patch for pixel targets.
        mlp_ratio: Hidden width of the MLPs over the width.
        drop_path_rate: Drop path of the last block of either; grows linearly from 0.
        layer_scale: Initial layer scale of either. The paper's L uses 1e-5 like its encoder; in
            the official code the flag never arrives and L has 0.1. None for no layer scale.
        with_cp: Recompute each block's activations in the backward pass to save memory.
    """

    def __init__(
        self,
        *,
        in_dims: int = 768,
        embed_dims: int = 768,
        num_heads: int = 12,
        regressor_depth: int = 4,
        decoder_depth: int = 4,
        out_dims: int = 8192,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = 0.1,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        if not regressor_depth and in_dims != embed_dims:
            raise ValueError(
                f'regressor_depth=0 puts mask tokens into the encoder: embed_dims is {embed_dims}, '
                f'but must be {in_dims}, as in_dims'
            )
        self.with_cp = with_cp
        self.in_dims = in_dims
        self.out_dims = out_dims
        self.projection: nn.Module = nn.Identity()
        if in_dims != embed_dims:
            self.projection = nn.Sequential(nn.Linear(in_dims, embed_dims), LayerNorm(embed_dims))
        self.positions = SinCosPositions(embed_dims)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, layer_scale=layer_scale)
        self.regressor = nn.ModuleList(
            RegressorBlock(embed_dims, num_heads, drop_path=rate, **options)
            for rate in linear_drop_path(drop_path_rate, regressor_depth)
        )
        self.regressor_norm = LayerNorm(embed_dims) if regressor_depth else nn.Identity()
        self.decoder = nn.ModuleList(
            Block(embed_dims, num_heads, drop_path=rate, **options)
            for rate in linear_drop_path(drop_path_rate, decoder_depth)
        )
        self.decoder_norm = LayerNorm(embed_dims) if decoder_depth else nn.Identity()
        self.output = nn.Linear(embed_dims, out_dims)

    def init_weights(self) -> None:
        """Initialise as the official code does."""
        self.apply(init_linear_and_norm)
        trunc_normal_(self.mask_token)

    def project(self, z: Tensor) -> Tensor:
        """Bring latents of the encoder, shape (B, L, in_dims), to width D."""
        return self.projection(z)

    def mask_tokens(self, ids_m: Tensor, grid: Grid) -> Tensor | None:
        """Mask tokens with positions for the encoder, shape (B, M, D); None with a regressor."""
        return None if self.regressor else self.mask_token + self._positions(grid, ids_m)

    def regress(self, z_v: Tensor, ids_v: Tensor, ids_m: Tensor, grid: Grid) -> Tensor:
        """Predict the latents of the masked patches from those of the visible ones.

        Args:
            z_v: Projected latents of the visible patches without class token, shape (B, V, D);
                where there is no regressor, followed by those of the mask tokens.
            ids_v: Indices of the visible patches, shape (B, V).
            ids_m: Indices of the masked patches, shape (B, M).
            grid: Rows and columns of patches.

        Returns:
            Z_m with shape (B, M, D).
        """
        if not self.regressor:
            return z_v[:, ids_v.shape[1] :]
        pos_v, pos_m = self._positions(grid, ids_v), self._positions(grid, ids_m)
        pos = torch.cat([pos_v, pos_m], dim=1)  # [B, V+M, D]
        x_m = self.mask_token.expand(*ids_m.shape, -1)  # [B, M, D]
        for block in self.regressor:
            x_m = run_block(block, self.with_cp, x_m, z_v, pos_m, pos)
        return self.regressor_norm(x_m)

    def decode(self, z_m: Tensor, ids_m: Tensor, grid: Grid) -> Tensor:
        """Predict the targets of patches from their latents alone.

        Args:
            z_m: Latents, shape (B, M, D): the regressor's or projected ones of the encoder.
            ids_m: Indices of these patches, shape (B, M).
            grid: Rows and columns of patches.

        Returns:
            Logits or pixels with shape (B, M, out_dims).
        """
        x = z_m + self._positions(grid, ids_m) if self.decoder else z_m
        for block in self.decoder:
            x = run_block(block, self.with_cp, x)
        return self.output(self.decoder_norm(x))

    def _positions(self, grid: Grid, ids: Tensor) -> Tensor:
        return self.positions(grid, ids.device).to(self.mask_token.dtype)[ids]  # [B, K, D]
