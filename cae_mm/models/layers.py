"""Layers that the encoder, the regressor and the decoder of CAE share.

Parameter names are those of the official code and of BEiT, so that checkpoints map one to one:
https://github.com/Atten4Vis/CAE/blob/master/models/modeling_cae_helper.py
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

Grid = tuple[int, int]
# images of detection come in hundreds of sizes, whose tables would fill a GPU
MAX_CACHED_GRIDS = 8


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into flat patches.

    Args:
        images: Tensor with shape (B, C, H, W); H and W are multiples of ``patch_size``.
        patch_size: Side p of a patch in pixels.

    Returns:
        Tensor with shape (B, N, C * p * p), N = H/p * W/p in row-major order; the last axis is
        ordered as a convolution's weight (C, p, p).
    """
    B, C, H, W = images.shape
    p = patch_size
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)  # [B, N, C*p*p]


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Take the tokens ``ids`` of each image.

    Args:
        x: Tensor with shape (B, N, D).
        ids: Integer tensor with shape (B, K), values in [0, N).

    Returns:
        Tensor with shape (B, K, D).
    """
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a mask into the indices of visible and of masked patches, both ascending.

    With the mask in host memory (``CAEDataPreprocessor`` leaves it there) no device is waited
    for; with the mask on a device the number of masked patches has to be read back from it.

    Args:
        mask: Bool tensor with shape (B, N), True = masked.

    Returns:
        Two int64 tensors with shapes (B, N - M) and (B, M).

    Raises:
        ValueError: If the images of the batch have different numbers of masked patches, or if all
            or none of the patches are masked.
    """
    counts = mask.sum(1).tolist()
    M, N = counts[0], mask.shape[1]
    if any(count != M for count in counts):
        raise ValueError(
            'all masks of a batch must hide the same number of patches, but they hide '
            f'{sorted(set(counts))}: use cae_mm.CAEMaskGenerator, whose count is exact'
        )
    if not 0 < M < N:
        raise ValueError(
            f'{M} of {N} patches are masked: CAE needs at least one visible and one masked patch '
            '(a mask is True where a patch is masked)'
        )
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # [B, N], visible patches first
    return order[:, : N - M], order[:, N - M :]


def sincos_positions(grid: Grid, dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed 2D sin-cos positions [sin(row), cos(row), sin(column), cos(column)].

    Equals the official table on square grids. The official code mixes up height and width on
    other grids (``build_2d_sincos_position_embedding``), here every grid is right.

    Args:
        grid: Rows and columns of the patch grid.
        dim: Width D, a multiple of 4.
        temperature: Base of the geometric series of wave lengths.

    Returns:
        float32 tensor with shape (rows * columns, D), on the CPU.

    Raises:
        ValueError: If ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f'2D sin-cos positions need a width that is a multiple of 4, not {dim}')
    steps = torch.arange(dim // 4, dtype=torch.float32, device='cpu') / (dim // 4)
    omega = 1.0 / temperature**steps  # [D/4]
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float32, device='cpu'),
        torch.arange(grid[1], dtype=torch.float32, device='cpu'),
        indexing='ij',
    )
    row_angles = rows.reshape(-1, 1) * omega  # [N, D/4]
    column_angles = columns.reshape(-1, 1) * omega  # [N, D/4]
    return torch.cat(
        [row_angles.sin(), row_angles.cos(), column_angles.sin(), column_angles.cos()], dim=1
    )  # [N, D]


class SinCosPositions(nn.Module):
    """Fixed positions for any grid, without parameters and without entries in a state dict.

    Args:
        dim: Width D of a position.
        base_grid: If given, other grids are resized bicubically from this one, as the official
            downstream code does (published numbers depend on it); otherwise every grid gets its
            own exact table.
    """

    def __init__(self, dim: int, base_grid: Grid | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.base_grid = base_grid
        self._tables: dict[tuple[Grid, torch.device], Tensor] = {}

    def forward(self, grid: Grid, device: torch.device) -> Tensor:
        """Return the float32 positions of ``grid``, shape (rows * columns, D)."""
        if (grid, device) not in self._tables:
            if len(self._tables) == MAX_CACHED_GRIDS:
                del self._tables[next(iter(self._tables))]  # the oldest
            self._tables[grid, device] = self._build(grid).to(device)
        return self._tables[grid, device]

    def _build(self, grid: Grid) -> Tensor:
        if self.base_grid is None or grid == self.base_grid:
            return sincos_positions(grid, self.dim)
        table = sincos_positions(self.base_grid, self.dim)
        table = table.T.reshape(1, self.dim, *self.base_grid)  # [1, D, h, w]
        table = F.interpolate(table, size=grid, mode='bicubic', align_corners=False)
        return table.flatten(2)[0].T.contiguous()  # [N, D]


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError if a width cannot be split into so many heads."""
    if dim % num_heads:
        raise ValueError(f'a width of {dim} cannot be split into {num_heads} heads')


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

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Attend within ``x``, shape (B, N, D).

        Args:
            x: Tokens; with a relative position bias the class token, then the patches of ``grid``.
            grid: Rows and columns of patches, not needed without relative position bias.
        """
        return self.attend(x, self._relative_bias(grid or self.bias_grid))

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend within ``x``, shape (B, N, D), with ``bias`` added to the logits.

        Args:
            x: Tokens.
            bias: Float tensor to add, or bool tensor with False for keys to leave out; its shape
                is broadcast to (B, heads, N, N).
        """
        B, N, D = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D/heads]
        if bias is not None and bias.is_floating_point():
            bias = bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # [B, N, D]

    def _relative_bias(self, grid: Grid | None) -> Tensor | None:
        """Bias of all pairs of tokens, shape (1, heads, 1 + N, 1 + N), or None."""
        if self.bias_grid is None or grid is None:
            return None
        table = resize_bias_table(self.relative_position_bias_table, self.bias_grid, grid)
        index = relative_position_index(grid, table.device)  # [1+N, 1+N]
        return F.embedding(index, table).permute(2, 0, 1)[None]


class WindowAttention(Attention):
    """Self-attention within square windows of patches, as in ViTDet (arXiv 2203.16527).

    Each window sees a copy of the class token, whose outputs are averaged; ViTDet has no class
    token. Windows at the border are filled up with patches that nobody attends to; in ViTDet these
    are attended to. So one window over the whole grid is the same as global attention.

    Args:
        dim: Width D.
        num_heads: Number of heads, a divisor of D.
        window_size: Side of a window in patches.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__(dim, num_heads)
        self.window_size = window_size

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Attend within ``x``, shape (B, 1 + N, D), class token first, N patches of ``grid``."""
        assert grid is not None
        B, w = x.shape[0], self.window_size  # len() would be a constant in an exported graph
        rows, columns = (math.ceil(side / w) for side in grid)  # of windows
        windows = partition_windows(x[:, 1:].unflatten(1, grid), w)  # [B*nW, w*w, D]
        copies = x[:, None, :1].expand(-1, rows * columns, -1, -1).flatten(0, 1)  # [B*nW, 1, D]
        y = self.attend(torch.cat([copies, windows], dim=1), self._real_keys(B, grid, x.device))
        cls_token = y[:, :1].unflatten(0, (B, -1)).mean(1)  # [B, 1, D]
        y = y[:, 1:].reshape(B, rows, columns, w, w, -1).transpose(2, 3)
        y = y.reshape(B, rows * w, columns * w, -1)[:, : grid[0], : grid[1]]  # [B, h, w, D]
        return torch.cat([cls_token, y.flatten(1, 2)], dim=1)

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


def num_relative_positions(grid: Grid) -> int:
    """Entries of a relative position table: all offsets, and three with the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


@lru_cache(maxsize=MAX_CACHED_GRIDS)
@torch.inference_mode(False)  # autograd cannot save what was made in inference mode
def relative_position_index(grid: Grid, device: torch.device) -> Tensor:
    """Entry of the relative position table for each pair of tokens, in BEiT's order.

    Args:
        grid: Rows h and columns w of the patches.
        device: Where to put it.

    Returns:
        int64 tensor with shape (1 + h * w, 1 + h * w), class token first; rows are queries. The
        last three entries of a table are class token to patch, patch to class token, and class
        token to itself.
    """
    h, w = grid
    rows = torch.arange(h, device=device).repeat_interleave(w)  # [N]
    columns = torch.arange(w, device=device).repeat(h)  # [N]
    down = rows[:, None] - rows + h - 1  # [N, N], in [0, 2h - 2]
    right = columns[:, None] - columns + w - 1  # [N, N], in [0, 2w - 2]
    index = F.pad(down * (2 * w - 1) + right, (1, 0, 1, 0))  # [1+N, 1+N]
    last = num_relative_positions(grid) - 1
    index[0, :], index[:, 0], index[0, 0] = last - 2, last - 1, last
    return index


def resize_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize a relative position table from one grid to another, bicubically.

    Args:
        table: Shape ((2h - 1) * (2w - 1) + 3, heads) for the grid ``old``.
        old: The grid (h, w) that the table is made for.
        new: The grid that it shall be made for.

    Returns:
        The table for the grid ``new``; the three entries of the class token are kept. The table
        itself if the grids are equal.
    """
    if old == new:
        return table
    offsets, cls_entries = table[:-3], table[-3:]
    maps = offsets.T.reshape(1, -1, 2 * old[0] - 1, 2 * old[1] - 1)  # [1, heads, 2h-1, 2w-1]
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    maps = F.interpolate(maps, size=size, mode='bicubic', align_corners=False)
    return torch.cat([maps[0].flatten(1).T, cls_entries])


class CrossAttention(nn.Module):
    """Multi-head cross-attention whose keys and values come from different inputs.

    Args:
        dim: Width D.
        num_heads: Number of heads, a divisor of D.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``q``, shape (B, M, D), to ``k`` and ``v``, shapes (B, N, D)."""
        x = F.scaled_dot_product_attention(
            self._heads(self.q(q)), self._heads(self.k(k)), self._heads(self.v(v))
        )  # [B, heads, M, D/heads]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, M, D]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, L, D/heads]


class Mlp(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: Width D.
        mlp_ratio: Hidden width over D.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to ``x``, shape (..., D)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with layer scale: the encoder's and the decoder's.

    Args:
        dim: Width D.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        drop_path: Probability to skip a residual branch of an image.
        layer_scale: Initial value of the two learned per-channel scales.
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
        layer_scale: float = 0.1,
        bias_grid: Grid | None = None,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        if window_size is None:
            self.attn = Attention(dim, num_heads, bias_grid)
        else:
            self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Transform ``x``, shape (B, N, D).

        Args:
            x: Tokens.
            grid: Rows and columns of patches, for relative position bias and windows.
        """
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


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


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``size`` as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(size: tuple[int, int], patch_size: int) -> Grid:
    """Rows and columns of patches in an image of ``size`` (height, width) pixels.

    Raises:
        ValueError: If the size is not a multiple of the patch size.
    """
    if size[0] % patch_size or size[1] % patch_size:
        up = tuple(math.ceil(side / patch_size) * patch_size for side in size)
        raise ValueError(
            f'an image of {size[0]}x{size[1]} pixels cannot be cut into patches of '
            f'{patch_size}x{patch_size}: resize or pad it, for example to {up[0]}x{up[1]}'
        )
    return size[0] // patch_size, size[1] // patch_size
