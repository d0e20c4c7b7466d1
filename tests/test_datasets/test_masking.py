"""Block-wise masks: exact count, every cell reachable, BEiT's distribution."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cae_mm.datasets import CAEMaskGenerator

GRID = (14, 14)
NUM_MASKS = 10_000
SIGMAS = 5  # of 196 cells none is that far off by chance (1e-4); seeds are fixed besides


def draw(count, grid=GRID, **options):
    generator = CAEMaskGenerator(**options)
    return np.stack([generator.generate(grid) for _ in range(count)])


def neighbour_pairs(masks):
    """Mean number of pairs of masked cells that share an edge."""
    vertical = (masks[:, 1:] & masks[:, :-1]).sum((1, 2))
    horizontal = (masks[:, :, 1:] & masks[:, :, :-1]).sum((1, 2))
    return (vertical + horizontal).mean()


def assert_same_frequencies(a, b, n_a, n_b):
    """Two maps of frequencies, from n_a and n_b independent masks, differ by chance only."""
    p = (n_a * a + n_b * b) / (n_a + n_b)
    sigma = np.sqrt(p * (1 - p) * (1 / n_a + 1 / n_b))
    assert (np.abs(a - b) < SIGMAS * sigma + 1e-12).all()


@pytest.fixture(scope='module')
def masks():
    np.random.seed(0)
    return draw(NUM_MASKS)


@pytest.fixture(scope='module')
def random_masks():
    np.random.seed(1)
    return draw(2000, strategy='random')


def test_every_mask_hides_exactly_98(masks):
    assert masks.dtype == bool
    assert (masks.sum((1, 2)) == 98).all()


def test_every_cell_is_reached(masks):
    """The last row and column too, which mmpretrain's generator never masks."""
    frequency = masks.mean(0)
    assert (frequency > 0.05).all()
    assert (frequency < 0.95).all()
    assert frequency.sum() == pytest.approx(98)


@pytest.mark.parametrize('axes', [(0,), (1,), (0, 1)])
def test_no_side_is_preferred(masks, axes):
    """Flipping the masks leaves their distribution alone; halves, to compare independent ones."""
    first, second = masks[: NUM_MASKS // 2].mean(0), masks[NUM_MASKS // 2 :].mean(0)
    assert_same_frequencies(first, np.flip(second, axes), NUM_MASKS // 2, NUM_MASKS // 2)


def test_rows_and_columns_are_treated_alike(masks):
    first, second = masks[: NUM_MASKS // 2].mean(0), masks[NUM_MASKS // 2 :].mean(0)
    assert_same_frequencies(first, second.T, NUM_MASKS // 2, NUM_MASKS // 2)


def test_the_centre_is_masked_more_than_the_corners(masks):
    frequency = masks.mean(0)
    centre = frequency[6:8, 6:8].mean()
    corners = frequency[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert centre > 0.8
    assert corners < 0.1


def test_blocks_are_clustered(masks, random_masks):
    """Of 364 pairs of neighbours, random masks hide 98/196 * 97/195 = 24.9 %."""
    expected = 364 * 98 * 97 / (196 * 195)
    assert neighbour_pairs(random_masks) == pytest.approx(expected, rel=0.01)
    assert neighbour_pairs(masks) > 1.7 * expected


def test_random_masks_are_uniform(random_masks):
    assert (random_masks.sum((1, 2)) == 98).all()
    sigma = math.sqrt(0.25 / len(random_masks))
    assert (np.abs(random_masks.mean(0) - 0.5) < SIGMAS * sigma).all()


def naive_beit_mask(rng, rows=14, columns=14, wanted=98, min_block=16, min_aspect=0.3):
    """BEiT's algorithm 1 in loops, blocks drawn until the number is complete."""
    masked = set()
    while len(masked) < wanted:
        missing = wanted - len(masked)
        area = rng.uniform(min_block, missing)
        aspect = math.exp(rng.uniform(math.log(min_aspect), math.log(1 / min_aspect)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = {
            (row, column)
            for row in range(top, top + height)
            for column in range(left, left + width)
        }
        if 0 < len(block - masked) <= missing:
            masked |= block
    return [[(row, column) in masked for column in range(columns)] for row in range(rows)]


def test_equals_naive_beit(masks):
    rng = random.Random(0)
    naive = np.array([naive_beit_mask(rng) for _ in range(5000)])
    assert (naive.sum((1, 2)) == 98).all()
    assert_same_frequencies(masks.mean(0), naive.mean(0), NUM_MASKS, len(naive))
    # frequencies alone do not see how cells go together
    assert neighbour_pairs(masks) == pytest.approx(neighbour_pairs(naive), rel=0.005)


class RecordingMask(np.ndarray):
    """A mask that notes each block written into it."""

    def __setitem__(self, key, value):
        self.note(self)
        super().__setitem__(key, value)


def record_blocks(monkeypatch, count, **options):
    """Draw masks and return (patches missing before, height, width, new patches) of each block."""
    blocks = []

    def zeros(shape, dtype):
        mask = np.full(shape, False, dtype=dtype)
        wanted = int(0.5 * mask.size)

        def note(block):
            new = int(block.size - np.count_nonzero(block))
            blocks.append((wanted - int(np.count_nonzero(mask)), *block.shape, new))

        view = mask.view(RecordingMask)
        RecordingMask.note = staticmethod(note)
        return view

    with monkeypatch.context() as patch:
        patch.setattr(np, 'zeros', zeros)
        masks = draw(count, **options)
    assert (masks.sum((1, 2)) == 98).all()
    return np.array(blocks)


def test_blocks_have_the_size_and_aspect_of_beit(monkeypatch):
    """A block of h x w comes from an area and an aspect that are within the ranges.

    h = round(sqrt(area * aspect)) and w = round(sqrt(area / aspect)), so each side may be off by
    0.5, and not more: (h + 0.5) * (w + 0.5) >= 16, hence h * w >= 12.
    """
    np.random.seed(2)
    missing, h, w, new = record_blocks(monkeypatch, 2000).T
    full = missing >= 16
    assert full.sum() > 5000
    assert ((h + 0.5) * (w + 0.5) >= 16)[full].all()
    assert (h * w)[full].min() == 12
    assert ((h - 0.5) * (w - 0.5) <= missing)[full].all()
    # once fewer than 16 patches are missing, blocks are between that and 16, overlaps allowed
    assert ((h - 0.5) * (w - 0.5) <= 16)[~full].all()
    assert ((h + 0.5) * (w + 0.5) >= missing)[~full].all()
    # no block hides more than is missing, none hides nothing
    assert (new <= missing).all()
    assert new.min() == 1

    assert ((h + 0.5) / (w - 0.5) >= 0.3).all()
    assert ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all()
    # both ends of the range of aspects are used, alike
    flat, tall = (h / w < 0.4)[full].mean(), (h / w > 1 / 0.4)[full].mean()
    assert flat == pytest.approx(tall, abs=0.03)
    assert flat > 0.02


def test_min_block_and_min_aspect_are_obeyed(monkeypatch):
    np.random.seed(3)
    missing, h, w, _ = record_blocks(monkeypatch, 300, min_block=36, min_aspect=1).T
    assert (h == w).all()
    assert h[missing >= 36].min() == 6


@given(
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    percent=st.integers(1, 99),
    strategy=st.sampled_from(['block', 'random']),
    min_block=st.integers(1, 200),
    min_aspect=st.floats(0.01, 1),
    seed=st.integers(0, 2**32 - 1),
)
@example((14, 14), 60, 'block', 16, 0.3, 0)  # 117.6 is rounded down
@example((30, 30), 60, 'block', 16, 0.3, 0)  # 0.6 * 30 * 30 is 539.99..., in floats
@example((1, 20), 50, 'block', 16, 0.3, 0)  # no block fits
def test_any_mask_hides_the_exact_number(grid, percent, strategy, min_block, min_aspect, seed):
    """Whatever the grid and the options, and the seed of numpy decides which mask it is."""
    h, w = grid
    wanted = h * w * percent // 100
    assume(wanted)
    options = dict(strategy=strategy, min_block=min_block, min_aspect=min_aspect)
    generator = CAEMaskGenerator(mask_ratio=percent / 100, **options)
    np.random.seed(seed)
    mask = generator.generate(grid)
    assert mask.dtype == bool and mask.shape == grid
    assert mask.sum() == wanted
    np.random.seed(seed)
    np.testing.assert_array_equal(generator.generate(grid), mask)


@given(patches=st.integers(2, 2000), data=st.data())
def test_a_share_that_is_a_number_of_patches_hides_that_number(patches, data):
    """75 / 196 hides 75, and what is a little less hides 74."""
    wanted = data.draw(st.integers(1, patches - 1))
    assert CAEMaskGenerator(mask_ratio=wanted / patches).count_masked(patches) == wanted
    less = float(Fraction(wanted, patches) - Fraction(1, 10**6))
    assert CAEMaskGenerator(mask_ratio=less).count_masked(patches) == wanted - 1


def test_draws_are_bounded(monkeypatch):
    """Where no block ever fits, the generator stops drawing instead of spinning."""
    draws = []
    random = np.random.random
    monkeypatch.setattr(np.random, 'random', lambda size: draws.append(size) or random(size))
    assert CAEMaskGenerator().generate((1, 30)).sum() == 15
    assert sum(tries for tries, _ in draws) == 1000


def test_one_patch_wide_masks_vary():
    np.random.seed(0)
    masks = draw(100, (1, 10))
    assert (np.abs(masks.mean(0) - 0.5) < SIGMAS * math.sqrt(0.25 / 100)).all()


def test_transform_takes_the_grid_from_the_image():
    """Height comes first, and of a list of views the first counts."""
    generator = CAEMaskGenerator(patch_size=16)
    view1, view2 = np.zeros((96, 160, 3), np.uint8), np.zeros((48, 80, 3), np.uint8)
    for image in (view1, [view1], [view1, view2]):
        mask = generator(dict(img=image, kept=1))['mask']
        assert mask.dtype == bool
        assert mask.shape == (6, 10)
        assert mask.sum() == 30
    assert CAEMaskGenerator(patch_size=8)(dict(img=view2))['mask'].shape == (6, 10)
    assert generator(dict(img=view1, kept=1)).keys() == {'img', 'kept', 'mask'}


@pytest.mark.parametrize('strategy', ['block', 'random'])
def test_masks_differ(strategy):
    np.random.seed(7)
    first, second = draw(20, strategy=strategy), draw(20, strategy=strategy)
    assert (first != second).any((1, 2)).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(strategy='grid'), "Unknown strategy 'grid': choose 'block' or 'random'"),
        (dict(mask_ratio=0), 'mask_ratio must be between 0 and 1, not 0'),
        (dict(mask_ratio=1.0), r'mask_ratio must be between 0 and 1, not 1\.0'),
        (dict(mask_ratio=75), 'mask_ratio must be between 0 and 1, not 75'),
        (dict(min_aspect=0), r'min_aspect must be in \(0, 1\], not 0'),
        (dict(min_aspect=2), r'min_aspect must be in \(0, 1\], not 2'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CAEMaskGenerator(**options)


def test_wrong_images():
    with pytest.raises(ValueError, match=r'mask_ratio=0\.5 hides no patch of a 1x1 grid'):
        CAEMaskGenerator()(dict(img=np.zeros((16, 16, 3), np.uint8)))
    with pytest.raises(ValueError, match='100x96 pixels cannot be cut into patches of 16x16'):
        CAEMaskGenerator()(dict(img=np.zeros((100, 96, 3), np.uint8)))


def test_repr_names_the_options():
    assert repr(CAEMaskGenerator(8, 0.4, strategy='random')) == (
        "CAEMaskGenerator(strategy='random', mask_ratio=0.4, patch_size=8)"
    )
