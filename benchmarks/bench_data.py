"""From JPEG files to a batch on one core: our pipeline against mmpretrain's for CAE.

    python benchmarks/bench_data.py

Photographs that scikit-image and scikit-learn ship are cropped to the sizes that ImageNet's
images have most often and saved as JPEG (quality 90, 4:2:0). A turn reads, decodes, crops twice,
masks and collates all of them. mmpretrain resizes without antialiasing, ours with it.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import mmpretrain.datasets  # noqa: F401  registers CustomDataset and its transforms
import numpy as np
import skimage
import sklearn
import torch
from harness import Options, Row, alternate, main
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS
from PIL import Image

import cae_mm.registry  # noqa: F401  registers ours

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = [
    Path(skimage.__file__).parent / 'data' / name
    for name in ('astronaut.png', 'coffee.png', 'motorcycle_left.png', 'rocket.jpg')
] + [
    Path(sklearn.__file__).parent / 'datasets' / 'images' / name
    for name in ('china.jpg', 'flower.jpg')
]
SIZES = [(500, 375), (500, 333), (375, 500), (500, 375), (333, 500), (500, 400)]  # width, height
CROPS = 12  # of each photograph
BATCH_SIZE = 24
MMPRETRAIN = [
    dict(type='mmpretrain.LoadImageFromFile'),
    dict(type='mmpretrain.RandomFlip', prob=0.5),
    dict(
        type='mmpretrain.RandomResizedCropAndInterpolationWithTwoPic',
        size=224,
        second_size=112,
        interpolation='bicubic',
        second_interpolation='lanczos',
        scale=(0.08, 1.0),
    ),
    dict(
        type='mmpretrain.BEiTMaskGenerator',
        input_size=(14, 14),
        num_masking_patches=98,  # the paper's; 75 in mmpretrain's config
        max_num_patches=None,
        min_num_patches=16,
    ),
    dict(type='mmpretrain.PackInputs'),
]


def make_photographs(folder: Path) -> None:
    """Write CROPS crops of each photograph, 60 to 100 % of what fits, as JPEG."""
    rng = np.random.default_rng(0)
    for path in PHOTOGRAPHS:
        photograph = Image.open(path).convert('RGB')
        for i in range(CROPS):
            W, H = SIZES[i % len(SIZES)]
            share = rng.uniform(0.6, 1) * min(photograph.width / W, photograph.height / H)
            w, h = int(share * W), int(share * H)
            left = rng.integers(photograph.width - w + 1)
            top = rng.integers(photograph.height - h + 1)
            crop = photograph.crop((left, top, left + w, top + h))
            crop = crop.resize((W, H), Image.Resampling.LANCZOS)
            crop.save(folder / f'{path.stem}_{i:02}.jpg', quality=90, subsampling='4:2:0')


def build_pipelines() -> dict[str, list[dict[str, Any]]]:
    """Return mmpretrain's transforms and those of our configs, as they are and varied."""
    config = Config.fromfile(ROOT / 'configs/_base_/datasets/in1k_two-view_224.py')
    ours = config.train_pipeline
    assert [step['type'] for step in ours][1] == 'cae_mm.TwoViewResizedCrop'

    def varied(**options: Any) -> list[dict[str, Any]]:
        return [ours[0], ours[1] | options, *ours[2:]]

    return {
        'mmpretrain': MMPRETRAIN,
        'cae-mm': ours,
        'bicubic': varied(second_interpolation='bicubic'),
        'one view': varied(second_size=None),
    }


class Epoch:
    """Reads all images of ``folder`` once, batch by batch."""

    def __init__(self, folder: Path, pipeline: list[dict[str, Any]]) -> None:
        dataset = dict(type='mmpretrain.CustomDataset', data_root=str(folder), with_label=False)
        self.dataset = DATASETS.build(dataset | dict(pipeline=pipeline))

    def __len__(self) -> int:
        return len(self.dataset)

    def __call__(self) -> None:
        """Read, decode, crop, mask, pack and collate."""
        for start in range(0, len(self), BATCH_SIZE):
            stop = min(start + BATCH_SIZE, len(self))
            default_collate([self.dataset[i] for i in range(start, stop)])

    def measure_stages(self) -> dict[str, float]:
        """Return seconds of each transform in one epoch."""
        seconds: dict[str, float] = {}
        for i in range(len(self)):
            results = self.dataset.get_data_info(i)
            for transform in self.dataset.pipeline.transforms:
                start = time.perf_counter()
                results = transform(results)
                name = type(transform).__name__
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return seconds


def describe_stages(epoch: Epoch, rounds: int) -> str:
    """Return microseconds per image of each transform, medians."""
    turns = [epoch.measure_stages() for _ in range(rounds)]
    return ', '.join(
        f'{name} {median(turn[name] for turn in turns) / len(epoch) * 1e6:.0f}' for name in turns[0]
    )


def measure(options: Options) -> list[Row]:
    """Compare images per second on one core."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(folder)
        epochs = {name: Epoch(folder, steps) for name, steps in build_pipelines().items()}
        seconds = alternate(epochs, options)
        stages = {n: describe_stages(epochs[n], options.rounds) for n in ('mmpretrain', 'cae-mm')}
    speeds = {name: len(epochs[name]) / seconds[name] for name in epochs}  # images/s

    def row(name: str, what: str, target: float | None = None) -> Row:
        detail = f'{speeds[name]:.0f} / {speeds["mmpretrain"]:.0f} images/s'
        return Row(what, speeds[name] / speeds['mmpretrain'], target, detail=detail)

    return [
        row('cae-mm', "data pipeline of the configs, one core, against mmpretrain's", target=1.3),
        row('bicubic', "same, view 2 bicubic (mmpretrain's stays lanczos)"),
        row('one view', 'same, view 1 only (pixel targets)'),
        *(
            Row(f'{name}: an image', 1e6 / speeds[name], unit=' us', detail=stages[name])
            for name in stages
        ),
    ]


if __name__ == '__main__':
    main(measure, __doc__)
