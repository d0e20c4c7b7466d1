import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from cae_mm.visualization.maps import CANVAS, THUMBNAIL, class_colors, paint_thumbnails, project

CLASSES, EACH = 3, 15


@pytest.fixture
def features():
    """Three directions, whose lengths say nothing."""
    rng = np.random.default_rng(0)
    directions = np.eye(8)[np.repeat(range(CLASSES), EACH)] + 0.1 * rng.normal(size=(45, 8))
    return (directions * rng.uniform(0.1, 10, size=(45, 1))).astype(np.float32)


def test_neighbors_stay_neighbors(features):
    points = project(features, seed=3)
    assert points.shape == (45, 2)
    ids = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(return_distance=False)
    assert (ids // EACH == np.arange(45)[:, None] // EACH).mean() > 0.95


def test_seed(features):
    assert np.array_equal(project(features, 0), project(features, 0))


def test_too_few_images(features):
    with pytest.raises(ValueError, match='looks at 30 neighbours, but there are 30 images'):
        project(features[:30])


@pytest.mark.parametrize('count', [10, 20, 50])
def test_classes_differ_in_colour(count):
    colors = class_colors(count)
    assert colors.shape == (count, 3) and len({*map(tuple, colors)}) == count


def test_thumbnails_lie_where_points_are():
    points = np.array([[0.0, 0.0], [2.0, 4.0]])
    pictures = [torch.zeros(3, 40, 40), torch.full((3, 40, 40), 0.5)]
    canvas = paint_thumbnails(points, pictures, np.array([[1.0, 0, 0], [0, 0, 1.0]]))
    assert canvas.shape == (CANVAS, CANVAS, 3)
    low_left, top_right = canvas[-THUMBNAIL:, :THUMBNAIL], canvas[:THUMBNAIL, -THUMBNAIL:]
    assert low_left[0, 0].tolist() == [1, 0, 0] and (low_left[4:-4, 4:-4] == 0).all()
    assert top_right[0, 0].tolist() == [0, 0, 1] and (top_right[4:-4, 4:-4] == 0.5).all()
    assert (canvas[: CANVAS // 2, : CANVAS // 2] == 1).all()
