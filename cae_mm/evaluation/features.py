"""Features of labelled folders: read and crop images, run the encoder, keep the result."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import torchvision.transforms.functional as TF
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from tqdm import tqdm

from cae_mm.datasets import LoadImage
from cae_mm.datasets.resumable import start_worker
from cae_mm.evaluation.encoder import Encoder

CROP_RATIO = 224 / 256  # share of the resized short edge that the crop keeps


def labelled_images(folder: str | Path, size: tuple[int, int]) -> ImageFolder:
    """List the images of a folder whose sub-folders are the classes, for crops of ``size``.

    Returns:
        Data set of (uint8 tensor (3, H, W), BGR; class index), classes and files by name.
    """
    crop = partial(central_crop, size=size)
    try:
        return ImageFolder(str(folder), loader=load_image, transform=crop)
    except OSError as error:
        raise FileNotFoundError(
            f'{folder} is no labelled folder: {error}. It needs one sub-folder for each class, '
            f'with images ({" ".join(IMG_EXTENSIONS)}) in it'
        ) from error


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raise ValueError if two labelled folders do not have the same sub-folders."""
    for one, other in ((train, val), (val, train)):
        extra = sorted(set(one.classes) - set(other.classes))
        if extra:
            raise ValueError(
                f'{one.root} and {other.root} need the same classes, but {len(extra)} of the '
                f'former are not in the latter: {", ".join(extra[:5])}'
            )


def central_crop(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Resize so that the crop keeps 224/256 of the short edge, crop the centre.

    Bicubic and antialiased (Pillow), the usual protocol on ImageNet. Returns uint8 (3, h, w).
    """
    scale = max(size[0] / image.height, size[1] / image.width) / CROP_RATIO
    short = max(round(scale * min(image.size)), 1)
    image = TF.resize(image, short, interpolation=TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, list(size)))


def load_image(path: str | Path) -> Image.Image:
    """Read any image file that ``LoadImage`` can, as BGR."""
    results = LoadImage().transform(dict(img_path=str(path)))
    assert results is not None  # LoadImage raises
    return Image.fromarray(np.ascontiguousarray(results['img']))


def extract_features(
    encoder: Encoder,
    images: ImageFolder,
    rows: Sequence[int],
    *,
    batch_size: int,
    num_workers: int | None = None,
    title: str | None = None,
    patches: bool = False,
) -> Iterator[Tensor]:
    """Yield the features of the images ``rows``, float32 (B, F, D) on the CPU, batch by batch.

    With ``patches`` they are the tokens of the patches, (B, N, D), instead. The backbone must be in
    eval mode. The global random generators are not touched. ``title`` None shows no progress.
    ``num_workers`` is the number of threads that read the images of a batch between two runs of an
    encoder on the CPU, 0 or None for one for each core; for a GPU it is the number of processes
    that read ahead, None for one for each core, up to four.
    """
    load = _load_with_threads if encoder.device.type == 'cpu' else _load_with_processes
    encode = encoder.patches if patches else encoder
    bar = dict(unit=' images', dynamic_ncols=True, leave=False, disable=title is None)
    with tqdm(desc=title, total=len(rows), **bar) as progress:
        for batch in load(images, rows, batch_size, num_workers):
            yield encode(batch).cpu()
            progress.update(len(batch))


def _load_with_threads(
    images: ImageFolder, rows: Sequence[int], batch_size: int, num_workers: int | None
) -> Iterator[Tensor]:
    """Read with all cores while the encoder does not need them: sharing them slows down both.

    Threads will do, as images are decoded and resized without Python's lock.
    """
    with ThreadPoolExecutor(num_workers or joblib.cpu_count()) as pool:
        for start in range(0, len(rows), batch_size):
            batch = pool.map(images.__getitem__, rows[start : start + batch_size])
            yield torch.stack([image for image, _ in batch])


def _load_with_processes(
    images: ImageFolder, rows: Sequence[int], batch_size: int, num_workers: int | None
) -> Iterator[Tensor]:
    """Read ahead while the GPU encodes."""
    loader = DataLoader(
        Subset(images, rows),
        batch_size=batch_size,
        num_workers=min(joblib.cpu_count(), 4) if num_workers is None else num_workers,
        pin_memory=True,
        worker_init_fn=partial(start_worker, None),
        generator=torch.Generator(),  # else the loader takes a number from the global one
    )
    return (batch for batch, _ in loader)


def cached_features(
    folder: Path, encoder: Encoder, images: ImageFolder, *, patches: bool = False, **loading: Any
) -> np.ndarray:
    """Return the features that lie in ``folder``, after extracting what is missing; say which.

    ``features.npy`` is a memory-mapped array of all rows; ``state.json`` says how many of them are
    finished and what they are features of: all that they depend on. It is written after each
    batch, so that a stopped run goes on where it was. With the same batch size the result is then
    bit for bit that of a run that was not stopped; with another one, equal up to rounding.
    Features of anything else are replaced; ``patches`` and ``loading`` are options of
    ``extract_features``.

    Returns:
        Read-only memory-mapped float32 array with shape (n, F, D), with ``patches`` (n, N, D).
    """
    array_file, state_file = folder / 'features.npy', folder / 'state.json'
    fingerprint = make_fingerprint(encoder, images, patches)
    done = 0
    if state_file.is_file() and array_file.is_file():
        state = json.loads(state_file.read_text())
        old = state['fingerprint']
        if stale := [kind for kind, value in fingerprint.items() if old.get(kind) != value]:
            print(f'{array_file} is of other {" and ".join(stale)}: extracting anew')
        else:
            done = state['done']
            print(f'{folder}: {done} of {len(images)} images are in the cache')
    folder.mkdir(parents=True, exist_ok=True)
    array = open_memmap(array_file, mode='r+') if done else None
    for batch in extract_features(
        encoder, images, range(done, len(images)), patches=patches, **loading
    ):
        if array is None:
            shape = (len(images), *batch.shape[1:])
            old = array_file.stat().st_size if array_file.exists() else 0
            _check_space(folder, 4 * math.prod(shape) - old)
            state_file.unlink(missing_ok=True)  # the array under it is about to go
            array = open_memmap(array_file, mode='w+', dtype=np.float32, shape=shape)
        array[done : done + len(batch)] = batch.numpy()
        array.flush()
        done += len(batch)
        draft = state_file.with_suffix('.tmp')  # a stop leaves the old or the new file, not half
        draft.write_text(json.dumps({'done': done, 'fingerprint': fingerprint}))
        draft.replace(state_file)
    return np.load(array_file, mmap_mode='r')


def _check_space(folder: Path, needed: int) -> None:
    """Raise OSError if so many bytes have no room; writing to memory would end in SIGBUS."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f'{folder}: features take {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free: '
            'probe fewer images, or say another folder (--out)'
        )


def make_fingerprint(encoder: Encoder, images: ImageFolder, patches: bool) -> dict[str, str]:
    """Everything that features depend on; of images the name, size and time of change."""
    weights = hashlib.sha256()
    for name, value in encoder.backbone.state_dict().items():
        weights.update(name.encode())
        weights.update(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    files = hashlib.sha256()
    for path, _ in images.samples:
        status = os.stat(path)
        key = (os.path.relpath(path, images.root), status.st_size, status.st_mtime_ns)
        files.update(repr(key).encode())
    normalizer = encoder.normalizer
    mean, std = (values[0].flatten().tolist() for values in (normalizer.means, normalizer.stds))
    return {
        'backbone': repr(sorted(encoder.cfg.model.backbone.items())),
        'weights': weights.hexdigest(),
        'images': files.hexdigest(),
        'preprocessing': repr((encoder.size, CROP_RATIO, mean, std, normalizer.to_rgb)),
        'features': 'patches' if patches else ', '.join(encoder.features),
        'precision': str(encoder.precision.dtype),
    }


def subset_rows(images: Sized, max_images: int | None, seed: int = 0) -> list[int]:
    """Rows of at most ``max_images`` images, drawn at random, the same ones by the same seed."""
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return sorted(rows[:max_images].tolist())
