"""Image files as the encoder sees them, and their crops as pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from cae_mm.evaluation.features import central_crop, load_image, subset_rows


def find_images(
    places: Iterable[str | Path], count: int | None = None, seed: int = 0
) -> list[Path]:
    """List files, and of each folder the images in it and below it, sorted.

    Args:
        places: Files and folders.
        count: Take at most so many of a folder, drawn at random.
        seed: Of what is drawn.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_file():
            found.append(place)
            continue
        files = sorted(p for p in place.rglob('*') if p.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise FileNotFoundError(f'{place} is neither an image nor a folder with images in it')
        found += [files[row] for row in subset_rows(files, count, seed)]
    return found


class ImageFiles(Dataset):
    """Central crops of image files, as ``labelled_images`` gives them, without classes."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return a crop, uint8 (3, H, W), BGR, and 0 in place of a class."""
        return central_crop(load_image(self.paths[row]), self.size), 0

    def __len__(self) -> int:
        return len(self.paths)

    def load(self) -> Tensor:
        """Return all crops, uint8 (B, 3, H, W), BGR."""
        return torch.stack([self[row][0] for row in range(len(self))])


def to_picture(crop: Tensor) -> Tensor:
    """Turn uint8 BGR, shape (..., 3, H, W), into RGB in [0, 1]."""
    return crop.flip(-3) / 255
