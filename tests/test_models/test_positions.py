"""Fixed positions against formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import equal

from cae_mm.models.positions import SinCosPositions, sincos_positions

CPU = torch.device('cpu')


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


def test_sincos_positions_of_a_square_are_symmetric():
    """Transposing the grid swaps the row half and the column half."""
    table = sincos_positions((5, 5), 8).reshape(5, 5, 2, 4)
    equal(table[:, :, 0], table[:, :, 1].transpose(0, 1))


def test_sincos_positions_of_a_rectangle():
    """One half depends on the row only, the other on the column only; the official code mixes."""
    table = sincos_positions((3, 7), 8).reshape(3, 7, 2, 4)
    equal(table[:, :, 0], table[:, :1, 0].expand(3, 7, 4))
    equal(table[:, :, 1], table[:1, :, 1].expand(3, 7, 4))
    assert len(table.reshape(21, 8).unique(dim=0)) == 21


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
