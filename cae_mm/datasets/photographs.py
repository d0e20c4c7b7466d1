"""A small data set without labels or downloads: crops of photographs, and held-out ones.

Held-out crops come from a part of each photograph that no training crop shows, so an encoder can be
judged by the photograph that a crop is from. Crops are grayscale, with brightness and contrast
evened out, so that neither tells the photographs apart.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SHIPPED = (
    'astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field ihc moon '
    'motorcycle_left retina rocket china flower'
).split()
SIDE = 400  # pixels of a photograph's short side
CROP = 80  # pixels of a saved crop
WIDEST = 140  # pixels that a crop is cut from, at most
HELD_OUT = 0.35  # share of the width


def shipped_photographs() -> list[Path]:
    """List the photographs that scikit-image and scikit-learn bring along."""
    import skimage
    import sklearn

    places = (
        Path(skimage.__file__).parent / 'data',
        Path(sklearn.__file__).parent / 'datasets' / 'images',
    )
    found = {name: [p for place in places for p in place.glob(f'{name}.*g')] for name in SHIPPED}
    if missing := [name for name, paths in found.items() if not paths]:
        raise FileNotFoundError(
            f'scikit-image and scikit-learn here have no {", ".join(missing)}: install the '
            'versions of constraints/'
        )
    return [path for paths in found.values() for path in paths]


def cut_crops(photographs: Sequence[Path], folder: Path, train: int = 120, val: int = 30) -> None:
    """Write train/PHOTOGRAPH/*.png and val/PHOTOGRAPH/*.png, always the same ones.

    Args:
        photographs: Image files with different names.
        folder: Its ``train`` and ``val`` are replaced, if they are there.
        train: Crops of each photograph, from the left of it.
        val: Held-out crops of each, from the right.
    """
    names = [path.stem for path in photographs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'several photographs are called {", ".join(twice)}: rename them')
    for split in ('train', 'val'):
        shutil.rmtree(folder / split, ignore_errors=True)
    rng = np.random.default_rng(0)
    for path in photographs:
        photograph = Image.open(path).convert('L')
        scale = SIDE / min(photograph.size)
        photograph = photograph.resize([round(side * scale) for side in photograph.size])
        W = photograph.width
        for split, begin, end, count in (
            ('train', 0, int((1 - HELD_OUT) * W), train),
            ('val', int((1 - HELD_OUT) * W), W, val),
        ):
            target = folder / split / path.stem
            target.mkdir(parents=True)
            for i in range(count):
                _cut(photograph, begin, end, rng).save(target / f'{i:03}.png')


def _cut(photograph: Image.Image, begin: int, end: int, rng: np.random.Generator) -> Image.Image:
    """Cut a square of random size and place, from column ``begin`` to ``end``, and even it out."""
    side = int(rng.integers(CROP, WIDEST))
    left = int(rng.integers(begin, end - side + 1))
    top = int(rng.integers(photograph.height - side + 1))
    crop = photograph.crop((left, top, left + side, top + side)).resize((CROP, CROP))
    pixels = np.asarray(crop, dtype=np.float64)
    pixels = 128 + 50 * (pixels - pixels.mean()) / max(pixels.std(), 10)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
