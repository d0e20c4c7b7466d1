"""Where a patch is: fixed sin-cos positions, and tables of a learned relative position bias.

References:
    Official code: https://github.com/Atten4Vis/CAE/blob/master/models/modeling_cae_helper.py
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_mm.patches import Grid

# images of detection come in hundreds of sizes, whose tables would fill a GPU
MAX_CACHED_GRIDS = 8
BIAS_TABLE = 'relative_position_bias_table'


def sincos_positions(grid: Grid, dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed 2D sin-cos positions [sin(row), cos(row), sin(column), cos(column)].

    Equals the official table on square grids. The official code mixes up height and width on
    other grids (``build_2d_sincos_position_embedding``), here every grid is right.

    Args:
        grid: Rows and columns of patches.
        dim: Width D, a multiple of 4.
        temperature: Base of the geometric series of wave lengths.

    Returns:
        float32 tensor with shape (rows * columns, D), on the CPU.
    """
    if dim % 4:
        raise ValueError(f'2D sin-cos positions need a width that is a multiple of 4, not {dim}')
    steps = torch.arange(dim // 4, dtype=torch.float32, device='cpu') / (dim // 4)
    omega = 1.0 / temperature**steps  # [D/4]
    angles = [x[:, None] * omega for x in rows_and_columns(grid, torch.device('cpu'))]  # [N, D/4]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def rows_and_columns(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, two int64 tensors with shape (N,)."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])


def resize_bicubically(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize a table with a row per patch, shape (N, D), from one grid to another."""
    maps = table.T.reshape(1, -1, *old)  # [1, D, h, w]
    maps = F.interpolate(maps, size=new, mode='bicubic', align_corners=False)
    return maps[0].flatten(1).T  # [N', D]


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
            table = self._build(grid, device)
            if len(self._tables) == MAX_CACHED_GRIDS:
                del self._tables[next(key for key in self._tables if key[0] != self.base_grid)]
            self._tables[grid, device] = table
        return self._tables[grid, device]

    def set_base_grid(self, base_grid: Grid) -> None:
        """Resize the tables from another base grid from now on."""
        self.base_grid = base_grid
        self._tables.clear()

    def of_padded(self, grid: Grid, own_grids: Tensor) -> Tensor:
        """Return float32 positions that do not depend on how far an image is padded.

        Args:
            grid: Rows h and columns w of the padded batch.
            own_grids: Rows and columns that each image fills, shape (B, 2).

        Returns:
            Tensor with shape (B, h * w, D): those that ``forward`` returns for each image's own
            grid, and in its padding those of the nearest border.
        """
        assert self.base_grid is not None
        table = self(self.base_grid, own_grids.device).T.reshape(1, self.dim, *self.base_grid)
        # centres of the patches; the image's borders are -1 and 1
        y, x = (
            (torch.arange(side, device=own_grids.device) + 0.5) / own_grids[:, axis, None] * 2 - 1
            for axis, side in enumerate(grid)
        )  # [B, h], [B, w]
        points = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=-1)
        positions = F.grid_sample(
            table,
            points.flatten(0, 1)[None],  # [1, B * h, w, 2]
            mode='bicubic',
            padding_mode='border',
            align_corners=False,
        )  # [1, D, B * h, w]
        return positions[0].flatten(1).T.reshape(-1, grid[0] * grid[1], self.dim)

    def _build(self, grid: Grid, device: torch.device) -> Tensor:
        if self.base_grid is None or grid == self.base_grid:
            return sincos_positions(grid, self.dim).to(device)
        table = self(self.base_grid, device)  # resized there: no other one waits for a copy
        return resize_bicubically(table, self.base_grid, grid).contiguous()


def num_relative_positions(grid: Grid) -> int:
    """Entries of a relative position table: all offsets, and three with the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


@lru_cache(maxsize=MAX_CACHED_GRIDS)
@torch.inference_mode(False)  # autograd cannot save what was made in inference mode
def relative_position_index(grid: Grid, device: torch.device) -> Tensor:
    """Entry of the relative position table for each pair of tokens, in BEiT's order.

    Returns:
        int64 tensor with shape (1 + h * w, 1 + h * w), class token first; rows are queries. The
        last three entries of a table are class token to patch, patch to class token, and class
        token to itself.
    """
    h, w = grid
    rows, columns = rows_and_columns(grid, device)  # [N], [N]
    down = rows[:, None] - rows + h - 1  # [N, N], in [0, 2h - 2]
    right = columns[:, None] - columns + w - 1  # [N, N], in [0, 2w - 2]
    index = F.pad(down * (2 * w - 1) + right, (1, 0, 1, 0))  # [1+N, 1+N]
    last = num_relative_positions(grid) - 1
    index[0, :], index[:, 0], index[0, 0] = last - 2, last - 1, last
    return index


def resize_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resize a relative position table from one grid to another, bicubically.

    Args:
        table: Shape ((2h - 1) * (2w - 1) + 3, heads); the class token's three entries are kept.
        old: The grid (h, w) that it is made for.
        new: The grid that it is to be made for.

    Returns:
        The table for the grid ``new``; the table itself if the grids are equal.
    """
    if old == new:
        return table
    sides = [(2 * h - 1, 2 * w - 1) for h, w in (old, new)]  # of the maps of offsets
    return torch.cat([resize_bicubically(table[:-3], *sides), table[-3:]])


def fit_bias_tables(state: dict[str, Tensor], own: dict[str, Tensor], grid: Grid) -> list[str]:
    """Give ``state`` the relative position tables that a model has, for this model's grid.

    Args:
        state: Weights, changed in place: tables of another square grid are resized bicubically,
            and where there are none they start from zero.
        own: State dict of the model.
        grid: Rows and columns of patches that its tables are made for.

    Returns:
        A remark for each of the two changes.

    Raises:
        ValueError: If a table is made for no square grid.
    """
    tables = {key: table for key, table in own.items() if key.endswith(BIAS_TABLE)}
    missing = [key for key in tables if key not in state]
    state |= {key: torch.zeros_like(tables[key]) for key in missing}
    resized = [key for key, table in tables.items() if len(state[key]) != len(table)]
    for key in resized:
        entries = len(state[key])
        side = (math.isqrt(max(entries - 3, 0)) + 1) // 2
        if entries != num_relative_positions((side, side)):
            raise ValueError(
                f'{key} has {entries} entries, which is no relative position table of a square '
                'grid: set img_size to the size that it was trained with'
            )
        state[key] = resize_bias_table(state[key], (side, side), grid)
    changes = {'start from zero': missing, 'are resized bicubically': resized}
    return [f'{len(k)} relative position tables {what}' for what, k in changes.items() if k]
