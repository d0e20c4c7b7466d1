from importlib.util import find_spec

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from cae_mm.visualization import maps
from cae_mm.visualization.maps import (
    CANVAS,
    MAX_NAMED,
    THUMBNAIL,
    class_colors,
    import_umap,
    paint_thumbnails,
    project,
    save_maps,
)

CLASSES, EACH = 3, 15


@pytest.fixture
def features():
    """Three directions, whose lengths say nothing."""
    rng = np.random.default_rng(0)
    directions = np.eye(8)[np.repeat(range(CLASSES), EACH)] + 0.1 * rng.normal(size=(45, 8))
    return (directions * rng.uniform(0.1, 10, size=(45, 1))).astype(np.float32)


def share_of_neighbors(points):
    """How many of the four nearest points are of a point's class."""
    ids = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(return_distance=False)
    return (ids // EACH == np.arange(len(points))[:, None] // EACH).mean()


def test_neighbors_stay_neighbors(features):
    points = project(features, seed=3)
    assert points.shape == (45, 2)
    assert share_of_neighbors(points) > 0.95


def test_seed(features):
    assert np.array_equal(project(features, 0), project(features, 0))


@pytest.mark.skipif(find_spec('umap') is None, reason='umap-learn is not installed')
def test_umap(features):
    """One test, as umap-learn compiles its functions in each process, for ten seconds."""
    points = project(features, 3, 'umap')
    by_hand = import_umap().UMAP(n_neighbors=15, random_state=3, n_jobs=1)
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert np.array_equal(points, by_hand.fit_transform(directions))
    assert not np.array_equal(points, project(features, 4, 'umap'))
    assert share_of_neighbors(points) > 0.95


@pytest.mark.parametrize(('method', 'count'), [('tsne', 30), ('umap', 15)])
def test_too_few_images(features, method, count):
    message = f'{method} looks at {count} neighbours, but there are {count} images'
    with pytest.raises(ValueError, match=message):
        project(features[:count], method=method)


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


@pytest.mark.parametrize('count', [3, MAX_NAMED + 1])
def test_names_are_those_of_points_and_only_a_few(tmp_path, monkeypatch, count):
    monkeypatch.setattr(maps, 'save_figure', lambda figure, path: figures.append(figure))
    figures, points = [], np.array([[0.0, 0.0], [1.0, 1.0]])
    classes = [f'class {i}' for i in range(count)]
    save_maps({'model': points}, [0, 2], classes, [torch.zeros(3, 8, 8)] * 2, tmp_path / 'x.png')
    left, _ = figures[0].axes
    if count == 3:
        assert [text.get_text() for text in left.get_legend().get_texts()] == ['class 0', 'class 2']
    else:
        assert left.get_legend() is None and left.get_xlabel() == f'{count} classes'
