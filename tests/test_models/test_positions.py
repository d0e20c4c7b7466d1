"""Fixed positions against formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import close, equal
from hypothesis import given
from hypothesis import strategies as st

from cae_mm.models.positions import (
    MAX_CACHED_GRIDS,
    SinCosPositions,
    num_relative_positions,
    relative_position_index,
    resize_bias_table,
    resize_bicubically,
    sincos_positions,
)

CPU = torch.device('cpu')
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**32 - 1)


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('grid', [(4, 4), (3, 5), (1, 6)])
def test_sincos_positions_against_loops(grid):
    dim = 16
    table = sincos_positions(grid, dim)
    assert table.dtype == torch.float32
    assert table.shape == (grid[0] * grid[1], dim)
    for row in range(grid[0]):
        for column in range(grid[1]):
            position = table[row * grid[1] + column]
            for i in range(4):
                omega = 1 / 10000 ** (i / 4)
                expected = [
                    math.sin(row * omega),
                    math.cos(row * omega),
                    math.sin(column * omega),
                    math.cos(column * omega),
                ]
                assert position[i::4].tolist() == pytest.approx(expected, abs=1e-6)


@given(grid=grids, dim=st.integers(1, 8).map(lambda n: 4 * n))
def test_sincos_positions_of_any_grid(grid, dim):
    """One half tells the row, the other, alike, the column; the official code mixes them up."""
    h, w = grid
    table = sincos_positions(grid, dim)
    rows, columns = table.reshape(h, w, 2, dim // 2).unbind(2)  # [h, w, D/2] each
    equal(rows, rows[:, :1].expand(h, w, -1))
    equal(columns, columns[:1].expand(h, w, -1))
    transposed = sincos_positions((w, h), dim).reshape(w, h, 2, dim // 2)
    equal(rows, transposed[:, :, 1].transpose(0, 1))
    assert len(table.unique(dim=0)) == h * w
    larger = sincos_positions((h + 2, w + 3), dim).reshape(h + 2, w + 3, dim)
    equal(table.reshape(h, w, dim), larger[:h, :w])  # a patch keeps its position


def test_sincos_positions_refuse_odd_widths():
    with pytest.raises(ValueError, match='a width that is a multiple of 4, not 18'):
        sincos_positions((2, 2), 18)


def test_positions_of_the_base_grid_are_exact():
    equal(SinCosPositions(16, base_grid=(4, 6))((4, 6), CPU), sincos_positions((4, 6), 16))


@pytest.mark.parametrize('grid', [(8, 12), (4, 5), (2, 3)])
def test_positions_of_other_grids_are_resized_bicubically(grid):
    positions = SinCosPositions(16, base_grid=(4, 6))(grid, CPU)
    base = sincos_positions((4, 6), 16).reshape(1, 4, 6, 16).permute(0, 3, 1, 2)
    resized = F.interpolate(base, size=grid, mode='bicubic', align_corners=False)
    equal(positions, resized[0].permute(1, 2, 0).reshape(-1, 16))
    assert (positions - sincos_positions(grid, 16)).abs().max() > 0.01


@given(old=grids, new=grids, seed=seeds)
def test_tables_of_any_grids_are_resized(old, new, seed):
    """Equal grids change nothing, constants stay, and mirrored tables are resized to mirrored ones.

    Rows and columns are treated alike, and no channel sees another.
    """
    table = randn(old[0] * old[1], 3, seed=seed)

    def resize(table, old=old, new=new):
        return resize_bicubically(table, old, new)

    def mirror(table, grid, axis):
        return table.unflatten(0, grid).flip(axis).flatten(0, 1)

    def transpose(table, grid):
        return table.unflatten(0, grid).transpose(0, 1).flatten(0, 1)

    resized = resize(table)
    assert resized.shape == (new[0] * new[1], 3)
    close(resize(torch.full_like(table, 7.0)), torch.full_like(resized, 7.0))
    for axis in (0, 1):
        close(resize(mirror(table, old, axis)), mirror(resized, new, axis))
    close(resize(transpose(table, old), old[::-1], new[::-1]), transpose(resized, new))
    close(resize(table[:, 1:]), resized[:, 1:])
    close(resize(table, new=old), table)


@given(grid=grids)
def test_pairs_of_patches_share_an_entry_if_one_is_as_far_from_the_other(grid):
    """Every entry of a table is used, those of the class token by nothing else."""
    h, w = grid
    index = relative_position_index(grid, CPU)
    assert index.unique().tolist() == list(range(num_relative_positions(grid)))
    patches = index[1:, 1:].tolist()
    places = [divmod(n, w) for n in range(h * w)]
    entries = {
        (y - y2, x - x2, patches[i][j])
        for i, (y, x) in enumerate(places)
        for j, (y2, x2) in enumerate(places)
    }
    offsets = {entry[:2] for entry in entries}
    assert len(entries) == len(offsets) == len({entry[2] for entry in entries})
    *_, outward, inward, itself = range(num_relative_positions(grid))
    assert (index[0, 1:] == outward).all() and (index[1:, 0] == inward).all()
    assert index[0, 0] == itself and itself not in index[1:, 1:]


@given(old=grids, new=grids, seed=seeds)
def test_relative_position_tables_of_any_grids_are_resized(old, new, seed):
    """The class token's entries stay; looking the other way stays looking the other way."""
    table = randn(num_relative_positions(old), 2, seed=seed)
    resized = resize_bias_table(table, old, new)
    assert (resized is table) == (old == new)
    assert resized.shape == (num_relative_positions(new), 2)
    equal(resized[-3:], table[-3:])
    backwards = torch.cat([table[:-3].flip(0), table[-3:]])
    close(resize_bias_table(backwards, old, new)[:-3], resized[:-3].flip(0))


def test_positions_of_padded_images():
    """Each image has those of its own grid, and beyond it those of its border."""
    positions, grids = SinCosPositions(16, base_grid=(4, 6)), [(4, 6), (3, 7), (9, 2), (1, 1)]
    padded = positions.of_padded((9, 7), torch.tensor(grids))
    assert padded.shape == (4, 63, 16) and padded.dtype == torch.float32
    for table, (h, w) in zip(padded.unflatten(1, (9, 7)), grids, strict=True):
        own = positions((h, w), CPU).unflatten(0, (h, w))
        torch.testing.assert_close(table[:h, :w], own, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        padded.unflatten(1, (9, 7))[0, 7, 6], sincos_positions((4, 6), 16)[-1]
    )


def test_without_a_base_grid_each_grid_is_exact():
    positions = SinCosPositions(16)
    for grid in ((4, 4), (3, 9)):
        equal(positions(grid, CPU), sincos_positions(grid, 16))


def test_positions_are_cached_and_not_saved():
    positions = SinCosPositions(16, base_grid=(4, 4))
    assert positions((2, 3), CPU) is positions((2, 3), CPU)
    assert positions((4, 4), CPU) is not positions((2, 3), CPU)
    assert not list(positions.parameters())
    assert not positions.state_dict()
    assert positions.double()((4, 4), CPU).dtype == torch.float32


def test_other_grids_do_not_drive_out_the_one_that_they_are_made_of(monkeypatch):
    built = []
    monkeypatch.setattr(
        'cae_mm.models.positions.sincos_positions',
        lambda *args: built.append(args) or sincos_positions(*args),
    )
    positions = SinCosPositions(16, base_grid=(4, 4))
    first = positions((2, 3), CPU)
    for rows in range(5, 5 + 2 * MAX_CACHED_GRIDS):
        positions((rows, 3), CPU)
    assert len(positions._tables) == MAX_CACHED_GRIDS
    equal(positions((2, 3), CPU), first)  # made anew
    assert built == [((4, 4), 16)]
