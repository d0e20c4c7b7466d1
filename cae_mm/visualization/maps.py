"""Features of labelled images in the plane: points coloured by class, and thumbnails."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from cae_mm.visualization.sheet import frame, save_figure

CANVAS, THUMBNAIL = 900, 28  # pixels of a side
MAX_NAMED = 20  # classes: more have colours that nobody tells apart, and names that hide the points
NEIGHBORS = dict(tsne=30, umap=15)  # that a method looks at


def project(features: np.ndarray, seed: int = 0, method: str = 'tsne') -> np.ndarray:
    """Bring features (N, D) into the plane: float32 (N, 2).

    By scikit-learn's t-SNE or umap-learn's UMAP ('umap'), on features of length 1, whose Euclidean
    neighbours are those by cosine.
    """
    count = NEIGHBORS[method]
    if len(features) <= count:
        raise ValueError(
            f'{method} looks at {count} neighbours, but there are {len(features)} images'
        )
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    if method == 'umap':
        mapping = import_umap().UMAP(n_neighbors=count, random_state=seed, n_jobs=1)
    else:
        mapping = TSNE(perplexity=count, init='pca', random_state=seed, n_jobs=1)
    return mapping.fit_transform(features)


def import_umap() -> Any:
    """Import umap-learn, which takes seconds and warns if TensorFlow is not there for more of it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ImportWarning)
            import umap
    except ImportError as error:
        raise ImportError('a map by UMAP needs its package: pip install umap-learn') from error
    return umap


def class_colors(count: int) -> np.ndarray:
    """A colour for each class, RGB (count, 3) in [0, 1]."""
    if count <= MAX_NAMED:
        return colormaps['tab10' if count <= 10 else 'tab20'](range(count))[:, :3]
    return colormaps['hsv'](np.arange(count) / count)[:, :3]


def paint_thumbnails(points: np.ndarray, pictures: Sequence[Tensor], colors: np.ndarray) -> Any:
    """Put small framed pictures, RGB (3, H, W), where their points are: (CANVAS, CANVAS, 3)."""
    canvas = np.ones((CANVAS, CANVAS, 3), np.float32)
    low, high = points.min(0), points.max(0)
    places = ((points - low) / (high - low) * (CANVAS - THUMBNAIL)).astype(int)
    for (x, y), picture, color in zip(places, pictures, colors, strict=True):
        small = F.interpolate(picture[None], (THUMBNAIL, THUMBNAIL), mode='area')[0]
        y = CANVAS - THUMBNAIL - y  # upwards, as in a plot
        tile = frame(small, tuple(color.tolist())).permute(1, 2, 0).numpy()
        canvas[y : y + THUMBNAIL, x : x + THUMBNAIL] = tile
    return canvas


def save_maps(
    maps: dict[str, np.ndarray],
    labels: Sequence[int],
    classes: Sequence[str],
    pictures: Sequence[Tensor],
    path: str | Path,
) -> None:
    """Save a row for each map: its points coloured by class, and its thumbnails.

    Args:
        maps: Points (N, 2) by title.
        labels: Index of each image's class.
        classes: Their names.
        pictures: RGB (3, H, W) in [0, 1], of each image.
        path: PNG to write.
    """
    figure = Figure(figsize=(12, 6 * len(maps)), layout='constrained')
    palette, ids = class_colors(len(classes)), np.asarray(labels)
    for (title, points), (left, right) in zip(
        maps.items(), figure.subplots(len(maps), 2, squeeze=False), strict=True
    ):
        for index in np.unique(ids):
            mine = points[ids == index]
            left.scatter(*mine.T, s=8, color=palette[index], label=classes[index])
        left.set_title(title)
        if len(classes) <= MAX_NAMED:
            left.legend(fontsize=7, markerscale=2)
        else:
            left.set_xlabel(f'{len(classes)} classes')
        left.set(xticks=[], yticks=[])
        right.imshow(paint_thumbnails(points, pictures, palette[ids]))
        right.axis('off')
    save_figure(figure, path)
