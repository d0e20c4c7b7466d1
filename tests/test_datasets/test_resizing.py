"""Resizing: Pillow's values up to rounding, Lanczos' by its definition, any view of an array."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from cae_mm.datasets.resizing import INTERPOLATIONS, WIDTH_STEP, resize

# (H, W) of an image and (h, w) of the result: smaller, larger, both, equal, thin
SIZES = [
    ((90, 2 * WIDTH_STEP + 7), (32, 24)),
    ((20, 30), (48, 64)),
    ((100, 9), (16, 32)),
    ((40, WIDTH_STEP), (40, WIDTH_STEP)),
    ((1, 50), (8, 8)),
    ((1, 1), (3, 2)),
]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def smooth(H, W, phase=0.0):
    """A picture without extremes, whose channels differ."""
    rows, columns = np.mgrid[:H, :W]
    waves = [np.sin(rows / 5 + c + phase) * np.cos(columns / (4 + c)) for c in range(3)]
    return np.stack([128 + 80 * wave for wave in waves], axis=-1).astype(np.uint8)


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
@given(
    before=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    # few heights: torch compiles Lanczos' sums for each of them
    after=st.tuples(st.sampled_from([3, 8, 32, 48]), st.integers(1, 70)),
    phase=st.floats(0, 7),
    steps=st.tuples(*[st.sampled_from([1, -1])] * 3),
)
@example((40, WIDTH_STEP), (40, WIDTH_STEP), 0.0, (1, 1, 1))
@example((1, 1), (3, 2), 0.0, (1, 1, 1))
def test_any_size_equals_pillow(interpolation, before, after, phase, steps):
    """Of views that run backwards too: flipped images, and BGR as a view of RGB."""
    image = smooth(*before, phase)[tuple(slice(None, None, step) for step in steps)]
    [resized] = resize(image, [(after, interpolation)])
    how = Image.Resampling[interpolation.upper()]
    theirs = Image.fromarray(image.copy()).resize(after[::-1], how)
    assert resized.dtype == np.uint8
    assert resized.shape == (*after, 3)
    difference = np.abs(resized - np.asarray(theirs, dtype=float))
    assert difference.max() <= 2  # Pillow rounds its weights and between two passes
    assert (difference > 1).mean() < 0.01


def lanczos_matrix(n_in, n_out):
    """Weights (n_out, n_in) of Lanczos' kernel with three lobes, widened where it shrinks."""
    stretch = max(n_in / n_out, 1)
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        for j in range(n_in):
            x = (j + 0.5 - (i + 0.5) * n_in / n_out) / stretch
            matrix[i, j] = np.sinc(x) * np.sinc(x / 3) if abs(x) < 3 else 0
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(('before', 'after'), SIZES)
def test_lanczos_by_its_definition(rng, before, after):
    """On noise, whose values overshoot beyond 0 and 255; each of two passes rounds."""
    image = rng.choice(np.array([0, 255], dtype=np.uint8), (*before, 3))
    rows, columns = (lanczos_matrix(*sizes) for sizes in zip(before, after, strict=True))
    exact = np.einsum('ih,jw,hwc->ijc', rows, columns, image.astype(float))
    [resized] = resize(image, [(after, 'lanczos')])
    np.testing.assert_allclose(resized, exact.clip(0, 255), atol=1.5)


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
def test_all_values_are_kept(interpolation):
    """A plain image stays what it is, from 0 to 255: weights sum to 1."""
    for value in range(256):
        image = np.full((70, 90, 3), value, dtype=np.uint8)
        [resized] = resize(image, [((16, 12), interpolation)])
        assert (resized == value).all()


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
def test_crops_see_nothing_of_the_rest(rng, interpolation):
    image = rng.integers(256, size=(60, 75, 3), dtype=np.uint8)
    crop = image[10:50, 20:60]
    expected = resize(crop.copy(), [((16, 16), interpolation)])
    np.testing.assert_array_equal(resize(crop, [((16, 16), interpolation)]), expected)


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
def test_planar_images_too(rng, interpolation):
    """Channels first in memory, as a tensor of torchvision would be."""
    image = rng.integers(256, size=(3, 60, 75), dtype=np.uint8).transpose(1, 2, 0)
    expected = resize(image.copy(), [((16, 24), interpolation)])
    np.testing.assert_allclose(resize(image, [((16, 24), interpolation)]), expected, atol=1)
