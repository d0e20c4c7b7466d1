"""Images/s from tar shards against the folder they were made of, from disk and from memory.

Cold: the system was told to forget the files' contents before (posix_fadvise); what it knows of
folders it keeps, so that opening many files is still faster than on the first run after a start.
"""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import Options, Row, alternate, main
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATASETS
from PIL import Image

from cae_mm.datasets import ShardSampler
from cae_mm.engine.settings import apply_settings

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / 'configs/pretrain/cae-dvae_vit-base-p16_4xb128-amp-coslr-300e_custom.py'
FILES, DECODED = 4000, 400  # read; read, decoded, cropped and masked
SIZE = (375, 500)  # of ImageNet's images, about 110 kB each
SPAN = 1000  # images: a quarter, as if there were many more


def write_images(folder: Path) -> None:
    """Write files in folders of 500, few different ones to be quick."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(20):
        coarse = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC), np.float32)
        pixels = smooth + rng.normal(0, 16, smooth.shape)
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, 'JPEG', quality=90)
        contents.append(stream.getvalue())
    for i in range(FILES):
        path = folder / f'{i // 500:03}' / f'{i:06}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[i % len(contents)])


def forget(folder: Path) -> Callable[[], None]:
    """Make a step that drops the contents of a folder's files from memory."""
    paths = [path for path in folder.rglob('*') if path.is_file()]

    def step() -> None:
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)

    return step


def orders(sampler: DefaultSampler) -> Iterator[list[int]]:
    """The order of each epoch."""
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        yield list(sampler)


def build(cfg: Config, **changes: Any) -> Any:
    """Build the training's dataset."""
    return DATASETS.build(cfg.train_dataloader.dataset | changes)


def steps_of(name: str, folder: Path, cfg: Config) -> dict[str, Callable[[], object]]:
    """Make the steps of one variant; the cold ones fill the memory for those that follow."""
    reading, training = build(cfg, pipeline=[]), build(cfg)
    from_shards = name == 'shards'
    epochs = orders(ShardSampler(reading, SPAN, 0) if from_shards else DefaultSampler(reading))

    def read() -> None:
        for i in next(epochs):
            info = reading.get_data_info(i)
            if 'img_bytes' not in info:
                Path(info['img_path']).read_bytes()

    def decode() -> None:
        for i in few:
            training[i]

    few = next(epochs)[:DECODED]  # the same, cold and warm
    drop = forget(folder)
    return {
        f'{name} forget': drop,
        f'{name}, reading only, cold': read,
        f'{name}, reading only, warm': read,
        f'{name} forget again': drop,
        f'{name}, two crops and a mask, cold': decode,
        f'{name}, two crops and a mask, warm': decode,
    }


def measure(options: Options) -> list[Row]:
    """Write both forms, read them in turns."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as temporary:  # /tmp may be in memory
        folder, shards = Path(temporary, 'folder'), Path(temporary, 'shards')
        write_images(folder)
        tool = [sys.executable, ROOT / 'tools/make_shards.py', folder, shards, '--shard-mb', '100']
        subprocess.run(tool, check=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
        os.sync()  # what is not yet written is not forgotten
        steps = {}
        for name, place in dict(folder=dict(data_root=str(folder)), shards={}).items():
            cfg = Config.fromfile(CONFIG)
            apply_settings(cfg, **(place or dict(shards=str(shards))))
            steps |= steps_of(name, folder if place else shards, cfg)
        seconds = alternate(steps, options)
    rows = []
    for what, count in {'reading only': FILES, 'two crops and a mask': DECODED}.items():
        for state in ('cold', 'warm'):
            one, other = (seconds[f'{name}, {what}, {state}'] for name in ('folder', 'shards'))
            detail = f'{count / other:.0f} images/s from shards, {count / one:.0f} from files'
            rows.append(
                Row(f'tar shards against files: {what}, {state}', one / other, detail=detail)
            )
    return rows


if __name__ == '__main__':
    main(measure, __doc__)
