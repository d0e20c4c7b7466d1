"""Features of labelled folders: read and crop images, run the encoder, keep the result on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from mmengine.config import Config
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from cae_mm.datasets import LoadImage
from cae_mm.evaluation.encoder import Encoder, read_size

CROP_RATIO = 224 / 256  # share of the resized short edge that the crop keeps
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')


def labelled_images(folder: str | Path, size: tuple[int, int]) -> ImageFolder:
    """List the images of a folder whose sub-folders are the classes.

    Args:
        folder: The folder.
        size: Height and width of the central crops.

    Returns:
        Data set of (uint8 tensor (3, H, W), BGR; class index), classes and files by name.

    Raises:
        FileNotFoundError: If there is no such folder, it has no sub-folder, or one without images.
    """
    try:
        return ImageFolder(
            str(folder),
            loader=_load_image,
            transform=partial(central_crop, size=size),
            is_valid_file=lambda path: path.lower().endswith(EXTENSIONS),
        )
    except OSError as error:
        raise FileNotFoundError(
            f'{folder} is no labelled folder: {error}. It needs one sub-folder for each class, '
            f'with images ({" ".join(EXTENSIONS)}) in it'
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

    Bicubic and antialiased (Pillow), the usual protocol on ImageNet.

    Args:
        image: Image with three channels.
        size: Height and width of the crop.

    Returns:
        uint8 tensor with shape (3, H, W).
    """
    scale = max(size[0] / image.height, size[1] / image.width) / CROP_RATIO
    short = max(round(scale * min(image.size)), 1)
    image = TF.resize(image, short, interpolation=TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, list(size)))


def _load_image(path: str) -> Image.Image:
    results = LoadImage().transform(dict(img_path=path))
    assert results is not None  # LoadImage raises
    return Image.fromarray(np.ascontiguousarray(results['img']))  # still BGR


def extract_features(
    encoder: Encoder,
    images: ImageFolder,
    rows: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    title: str | None,
    total: int | None = None,
) -> Iterator[Tensor]:
    """Give the features of some images batch by batch, with a progress bar.

    The global random generators are not touched.

    Args:
        encoder: Its backbone must be in eval mode.
        images: See ``labelled_images``.
        rows: Which of them, in this order.
        batch_size: Images in a batch.
        num_workers: Processes that read images; 0 reads in this one.
        title: Of the bar; None shows none.
        total: Number at which the bar is full; default that of ``rows``, which are its last ones.

    Yields:
        float32 tensors with shape (B, F, D) on the CPU.
    """
    total = len(rows) if total is None else total
    loader = DataLoader(
        Subset(images, rows),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=encoder.device.type == 'cuda',
        generator=torch.Generator(),  # else the loader takes a number from the global one
    )
    with tqdm(
        desc=title,
        total=total,
        initial=total - len(rows),
        unit=' images',
        dynamic_ncols=True,
        leave=False,
        disable=title is None,
    ) as bar:
        for batch, _ in loader:
            features = encoder(batch).cpu()
            yield features
            bar.update(len(features))


def cached_features(
    folder: Path,
    fingerprint: dict[str, str],
    num_rows: int,
    extract: Callable[[range], Iterator[Tensor]],
    report: Callable[[str], None],
) -> np.ndarray:
    """Give the features that lie in ``folder``, after extracting what is missing.

    ``features.npy`` is a memory-mapped array of all rows; ``state.json`` says how many of them are
    finished and what they are features of. It is written after each batch, so that a stopped run
    goes on where it was. With the same batch size the result is then bit for bit that of a run
    that was not stopped; with another one, equal up to rounding.

    Args:
        folder: Made if it is missing.
        fingerprint: What the features depend on. If the folder's is another, all are extracted
            anew.
        num_rows: Number of images.
        extract: Gives the features of a range of rows batch by batch, each (B, F, D).
        report: Is told in words what was found.

    Returns:
        Read-only memory-mapped float32 array with shape (num_rows, F, D).
    """
    array_file, state_file = folder / 'features.npy', folder / 'state.json'
    done = _finished_rows(array_file, state_file, fingerprint, report)
    if done:
        report(f'{folder}: {done} of {num_rows} images are in the cache')
    folder.mkdir(parents=True, exist_ok=True)
    array = open_memmap(array_file, mode='r+') if done else None
    for batch in extract(range(done, num_rows)) if done < num_rows else ():
        if array is None:
            state_file.unlink(missing_ok=True)  # the array under it is about to go
            shape = (num_rows, *batch.shape[1:])
            array = open_memmap(array_file, mode='w+', dtype=np.float32, shape=shape)
        array[done : done + len(batch)] = batch.numpy()
        array.flush()
        done += len(batch)
        _write_json(state_file, {'done': done, 'fingerprint': fingerprint})
    return np.load(array_file, mmap_mode='r')


def make_fingerprint(cfg: Config, encoder: Encoder, images: ImageFolder) -> dict[str, str]:
    """Everything that features depend on, as strings by kind.

    Image files count by name, size and time of change, not by content.
    """
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
        'backbone': repr(sorted(cfg.model.backbone.items())),
        'weights': weights.hexdigest(),
        'images': files.hexdigest(),
        'preprocessing': repr((read_size(cfg), CROP_RATIO, mean, std, normalizer.to_rgb)),
        'features': ', '.join(encoder.features),
    }


def subset_rows(images: ImageFolder, max_images: int | None) -> list[int]:
    """Rows of at most ``max_images`` images, drawn at random, always the same ones."""
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return sorted(rows[:max_images].tolist())


def _finished_rows(
    array_file: Path,
    state_file: Path,
    fingerprint: dict[str, str],
    report: Callable[[str], None],
) -> int:
    if not (state_file.is_file() and array_file.is_file()):
        return 0
    state = json.loads(state_file.read_text())
    stale = [kind for kind, value in fingerprint.items() if state['fingerprint'].get(kind) != value]
    if stale:
        report(f'{array_file} is of other {" and ".join(stale)}: extracting anew')
        return 0
    return state['done']


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write so that a stop at any time leaves the old or the new file, never half of one."""
    draft = path.with_suffix('.tmp')
    draft.write_text(json.dumps(content))
    draft.replace(path)
