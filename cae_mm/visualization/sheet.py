"""One PNG out of many pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

DPI = 100
GAP = 4  # pixels between pictures
MARGIN = 24  # pixels for a line of text
RIGHT, WRONG = (0.1, 0.7, 0.2), (0.85, 0.1, 0.1)


def save_sheet(rows: Sequence[Sequence[Tensor]], path: str | Path, **options: Any) -> None:
    """Save as PNG what ``draw_sheet`` draws."""
    save_figure(draw_sheet(rows, **options), path)


def draw_sheet(
    rows: Sequence[Sequence[Tensor]],
    *,
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
    note: str = '',
    side: int = 160,
) -> Figure:
    """Draw rows of pictures, RGB (3, H, W) in [0, 1] of one shape.

    Args:
        rows: Those that are shorter than others end in white.
        titles: One above each column.
        labels: One on the left of each row.
        note: A line below the pictures.
        side: Height of a picture on the sheet in pixels.
    """
    cells = [[_fit(picture, side) for picture in row] for row in rows]
    columns = max(map(len, cells))
    height, width, _ = cells[0][0].shape
    top, left, bottom = (MARGIN if text else GAP for text in (titles, labels, note))
    size = (top + len(rows) * (height + GAP) + bottom, left + columns * (width + GAP) + GAP)
    canvas = np.ones((*size, 3))
    inches = [(pixels + 0.1) / DPI for pixels in size]  # matplotlib < 3.11 truncates 1011.99
    figure = Figure(figsize=(inches[1], inches[0]), dpi=DPI)

    def write(text: str, x: float, y: float, **options: Any) -> None:
        place = (x / size[1], 1 - y / size[0])
        figure.text(*place, text, fontsize=8, ha='center', va='center', **options)

    for i, row in enumerate(cells):
        y = top + i * (height + GAP)
        for j, cell in enumerate(row):
            x = left + j * (width + GAP)
            canvas[y : y + height, x : x + width] = cell
        if labels:
            write(labels[i], MARGIN / 2, y + height / 2, rotation='vertical')
    for j, title in enumerate(titles):
        write(title, left + j * (width + GAP) + width / 2, MARGIN / 2)
    write(note, size[1] / 2, size[0] - MARGIN / 2)
    figure.figimage(canvas)
    return figure


def to_pixels(figure: Figure) -> np.ndarray:
    """Pixels of a figure, as ``save_figure`` would write them: RGB, uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG whose bytes follow from the figure alone; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={'Software': None})


def outline(
    picture: Tensor, box: tuple[int, int, int, int], color: tuple[float, float, float], width: int
) -> Tensor:
    """Draw a frame inside the box (top, left, height, width) of a picture."""
    top, left, h, w = box
    frame = torch.ones(h, w, dtype=torch.bool)
    frame[width : h - width, width : w - width] = False
    picture = picture.clone()
    inside = picture[:, top : top + h, left : left + w]
    inside[:, frame] = torch.tensor(color)[:, None]
    return picture


def frame(picture: Tensor, color: tuple[float, float, float]) -> Tensor:
    """Draw a frame around a whole picture."""
    h, w = picture.shape[1:]
    return outline(picture, (0, 0, h, w), color, max(h // 24, 1))


def _fit(picture: Tensor, side: int) -> np.ndarray:
    """Bring a picture to a height of ``side`` pixels, (H, W, 3); pixels that grow stay squares."""
    h, w = picture.shape[1:]
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    how = Image.Resampling.NEAREST if side >= h else Image.Resampling.LANCZOS
    return np.asarray(image.resize((round(w * side / h), side), how)) / 255
