"""Attention and transformer blocks that the encoder, the regressor and the decoder share.

Parameter names are those of the official code and of BEiT, so that checkpoints map one to one:
https://github.com/Atten4Vis/CAE/blob/master/models/modeling_cae_helper.py
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cae_mm.models.functional import DropPath, attention, is_plain, scaled_linear
from cae_mm.models.positions import (
    num_relative_positions,
    relative_position_index,
    resize_bias_table,
)
from cae_mm.patches import Grid

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # the eps of all norms of ViTs


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError if a width cannot be split into so many heads."""
    if dim % num_heads:
        raise ValueError(f'a width of {dim} cannot be split into {num_heads} heads')


class PatchEmbed(nn.Module):
    """Linear projection of flat patches, stored as the convolution that other codes use."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def init_weights(self, xavier: bool = False) -> None:
        """Initialise as the official code does, or xavier-uniform as a layer of flat patches."""
        if xavier:
            bound = math.sqrt(6 / sum(self.proj.weight.flatten(1).shape))
            nn.init.uniform_(self.proj.weight, -bound, bound)
        else:
            trunc_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]  # a Conv2d may have none

    def forward(self, patches: Tensor) -> Tensor:
        """Embed ``patches``, shape (B, K, C * p * p), into shape (B, K, D)."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention; q and v have a bias, k has none.

    Args:
        dim: Width D.
        num_heads: Number of heads, a divisor of D.
        bias_grid: If given, a relative position bias is learned for this grid of patches (with a
            class token before them) and resized bicubically for others.
    """

    def __init__(self, dim: int, num_heads: int, bias_grid: Grid | None = None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.bias_grid = bias_grid
        if bias_grid is not None:
            entries = num_relative_positions(bias_grid)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, num_heads))

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        gamma: Tensor | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Attend within ``x``, shape (B, N, D).

        Args:
            x: Tokens; with a relative position bias the class token, then the patches of ``grid``.
            grid: Rows and columns of patches, not needed without relative position bias.
            gamma: Layer scale of the output, shape (D,), or None for none.
            queries: How many tokens, the first ones, attend and are returned; None for all.
        """
        return self.attend(x, self.position_bias(grid, queries), gamma, queries)

    def position_bias(self, grid: Grid | None, queries: int | None = None) -> Tensor | None:
        """Relative position bias, shape (1, heads, Q, 1 + N), or None; arguments of ``forward``."""
        if self.bias_grid is None:
            return None
        grid = grid or self.bias_grid
        table = resize_bias_table(self.relative_position_bias_table, self.bias_grid, grid)
        index = relative_position_index(grid, table.device)  # [1+N, 1+N]
        return F.embedding(index[:queries], table).permute(2, 0, 1)[None]

    def attend(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        gamma: Tensor | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Attend within ``x``, shape (B, N, D).

        Args:
            x: Tokens.
            bias: Float tensor to add to the logits, or bool tensor with False for keys to leave
                out; its shape is broadcast to (B, heads, Q, N).
            gamma: Layer scale of the output, shape (D,), or None for none.
            queries: How many tokens Q, the first ones, attend and are returned; None for all.
        """
        k_bias, weight, plain = torch.zeros_like(self.v_bias), self.qkv.weight, is_plain(self.qkv)
        if queries is None or not plain:
            qkv_bias = torch.cat([self.q_bias, k_bias, self.v_bias])
            qkv = F.linear(x, weight, qkv_bias) if plain else self.qkv(x) + qkv_bias
            q, k, v = qkv.chunk(3, dim=-1)  # each [B, N, D]
            q = q[:, :queries]
        else:
            D = len(k_bias)
            q = F.linear(x[:, :queries], weight[:D], self.q_bias)  # [B, Q, D]
            k, v = F.linear(x, weight[D:], torch.cat([k_bias, self.v_bias])).chunk(2, dim=-1)
        return scaled_linear(attention(q, k, v, self.num_heads, bias), self.proj, gamma)


class WindowAttention(Attention):
    """Self-attention within square windows of patches, as in ViTDet (arXiv 2203.16527).

    Each window sees a copy of the class token, whose outputs are averaged; ViTDet has no class
    token. Windows at the border are filled up with patches that nobody attends to; in ViTDet these
    are attended to. So one window over the whole grid is the same as global attention.
    ``window_size`` is the side of a window in patches.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__(dim, num_heads)
        self.window_size = window_size

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        gamma: Tensor | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """Attend within ``x``, shape (B, 1 + N, D), class token first, N patches of ``grid``."""
        assert grid is not None
        B, w = x.shape[0], self.window_size  # len() would be a constant in an exported graph
        rows, columns = (math.ceil(side / w) for side in grid)  # of windows
        windows = partition_windows(x[:, 1:].unflatten(1, grid), w)  # [B*nW, w*w, D]
        copies = x[:, None, :1].expand(-1, rows * columns, -1, -1).flatten(0, 1)  # [B*nW, 1, D]
        real_keys = self._real_keys(B, grid, x.device)
        y = self.attend(torch.cat([copies, windows], dim=1), real_keys, gamma)
        cls_token = y[:, :1].unflatten(0, (B, -1)).mean(1)  # [B, 1, D]
        y = y[:, 1:].reshape(B, rows, columns, w, w, -1).transpose(2, 3)
        y = y.reshape(B, rows * w, columns * w, -1)[:, : grid[0], : grid[1]]  # [B, h, w, D]
        return torch.cat([cls_token, y.flatten(1, 2)], dim=1)[:, :queries]

    def _real_keys(self, B: int, grid: Grid, device: torch.device) -> Tensor | None:
        """Bool mask of the keys that are no filling, shape (B * nW, 1, 1, 1 + w * w), or None."""
        if grid[0] % self.window_size == grid[1] % self.window_size == 0:
            return None
        real = torch.ones(B, *grid, 1, dtype=torch.bool, device=device)
        real = partition_windows(real, self.window_size).squeeze(-1)  # [B*nW, w*w]
        return F.pad(real, (1, 0), value=True)[:, None, None]


def partition_windows(x: Tensor, size: int) -> Tensor:
    """Cut maps of tokens, shape (B, h, w, D), into windows, shape (B * nW, size * size, D).

    Right and bottom are filled up with zeros where ``size`` does not divide the map.
    """
    h, w, D = x.shape[1:]
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [B, rows, size, columns, size, D]
    return x.transpose(2, 3).reshape(-1, size * size, D)


class CrossAttention(nn.Module):
    """Multi-head cross-attention whose keys and values come from different inputs."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Attend from ``q``, shape (B, M, D), to ``k`` and ``v``, shapes (B, N, D).

        The output is scaled by ``gamma``, shape (D,).
        """
        x = attention(self.q(q), self.k(k), self.v(v), self.num_heads)  # [B, M, D]
        return scaled_linear(x, self.proj, gamma)


class Mlp(nn.Module):
    """Linear, GELU, linear: from width D to D * mlp_ratio and back."""

    def __init__(self, dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Transform ``x``, shape (B, N, D); the output is scaled by ``gamma``, shape (D,)."""
        return scaled_linear(self.fc1(x), self.fc2, gamma, gelu=True)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale: the encoder's and the decoder's.

    Args:
        dim: Width D.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        drop_path: Probability to skip a residual branch of an image.
        layer_scale: Initial value of the two learned per-channel scales; None for no layer scale:
            ones that are not learned, so that files of either kind fit.
        bias_grid: Grid of the relative position bias, None for none.
        window_size: Side of the windows of attention in patches, None for global attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 0.1,
        bias_grid: Grid | None = None,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        if window_size is None:
            self.attn = Attention(dim, num_heads, bias_grid)
        else:
            self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.gamma_1, self.gamma_2 = make_layer_scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid | None = None, queries: int | None = None) -> Tensor:
        """Transform ``x``, shape (B, N, D).

        Args:
            x: Tokens.
            grid: Rows and columns of patches, for relative position bias and windows.
            queries: How many tokens, the first ones, are returned, which saves the work for the
                others; None for all.
        """
        branch = self.attn(self.norm1(x), grid, self.gamma_1, queries)
        x = self.drop_path(x[:, :queries], branch)
        return self.drop_path(x, self.mlp(self.norm2(x), self.gamma_2))


def make_layer_scale(dim: int, value: float | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Scales of a block's two branches, each of shape (dim,): learned from ``value``, or 1."""
    start = torch.full((dim,), 1.0 if value is None else value)
    learned = value is not None
    return nn.Parameter(start, learned), nn.Parameter(start.clone(), learned)


def run_block(block: nn.Module, with_cp: bool, x: Tensor, *args: Any) -> Tensor:
    """Run a block on ``x`` and ``args``; ``with_cp`` recomputes its activations in backward."""
    if with_cp and block.training and x.requires_grad:
        return checkpoint(block, x, *args, use_reentrant=False)
    return block(x, *args)


def linear_drop_path(rate: float, depth: int) -> list[float]:
    """Drop path rates that grow linearly from 0 to ``rate`` over ``depth`` blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def trunc_normal_(tensor: Tensor) -> None:
    """Truncated normal of standard deviation 0.02, cut at one deviation as the official code."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def init_linear_and_norm(module: nn.Module) -> None:
    """Official initialisation, for ``Module.apply``: xavier-uniform linears, identity norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, other formats as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
