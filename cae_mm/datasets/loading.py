"""Load image files of every kind that Pillow reads, as they are meant to look."""

import io
import logging
import math
import os
import stat
import struct
from contextlib import suppress
from typing import Any

import mmengine.fileio as fileio
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import decode_jpeg

from cae_mm.datasets.unreadable import Unreadable, get_found
from cae_mm.registry import TRANSFORMS

JPEG = b'\xff\xd8'
FRAMES = (0xC0, 0xC1, 0xC2)  # segments with the size: baseline, extended, progressive
EXIF = 0xE1
# what may stand before: tables, restart interval, data of applications, comments
BEFORE_FRAME = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
SIXTEEN_BITS = ('I;16', 'I;16B', 'I;16L', 'I;16N')
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_BYTES = 2**30  # of a file, which is read as a whole
MAX_SKIPPED = 1000  # images for one batch, as many as mmengine draws for one image


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Read ``img_path`` into ``img``: uint8 with shape (H, W, 3), BGR as in all of OpenMMLab.

    A dataset that has the file's content already gives it as ``img_bytes``; ``img_path`` then is
    only what errors and logs name. An ``img`` that an inferencer has read already stays as it is.

    Grayscale, palette, CMYK and alpha images become RGB as Pillow converts them, EXIF orientation
    is applied, and 16-bit images are scaled to 8 bits (mmcv's Pillow backend clips them). Float
    and 32-bit images count as unreadable, since nothing says what their white is.

    Args:
        on_error: 'raise' stops at a file that cannot be read; 'skip' lets the dataset draw another
            image, and reports it: in training to ``UnreadableImagesHook``, else in the log.
        backend_args: Where files are, see ``mmengine.fileio``; None is the local disk.
    """

    def __init__(self, on_error: str = 'raise', backend_args: dict[str, Any] | None = None) -> None:
        if on_error not in ('raise', 'skip'):
            raise ValueError(f"Unknown on_error '{on_error}': choose 'raise' or 'skip'")
        self.on_error = on_error
        self.backend_args = backend_args

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load one image; None lets the dataset draw another."""
        if 'img' in results:
            return results
        path = results['img_path']
        try:
            content = results.pop('img_bytes', None)
            if content is None:
                content = read_file(path, self.backend_args)
            array = decode(content)
        except Exception as error:  # Pillow's decoders raise almost anything on broken files
            reason = explain(error)
            message = f'cannot read the image {printable(path)}: {reason}'
            if self.on_error == 'raise':
                raise OSError(
                    f'{message}. Fix or remove the file, or set '
                    'settings.transforms.LoadImage.on_error=skip'
                ) from error
            self._report(Unreadable(path, reason), message)
            return None
        results['img'] = array[..., ::-1]  # RGB -> BGR
        results['img_shape'] = results['ori_shape'] = array.shape[:2]
        return results

    def _report(self, image: Unreadable, message: str) -> None:
        found = get_found()
        if found is None:
            print_log(f'{message}. Skipped', logger='current', level=logging.WARNING)
            return
        found.append(image)
        if len(found) == MAX_SKIPPED:
            raise OSError(f'{MAX_SKIPPED} images for one batch, the last: {message}')

    def __repr__(self) -> str:
        return f'{type(self).__name__}(on_error={self.on_error!r})'


def read_file(path: str, backend_args: dict[str, Any] | None = None) -> bytes:
    """Read a file; on the local disk neither a pipe nor one of more than ``MAX_BYTES``.

    A pipe would be waited for for ever, and what is no image may be larger than the memory.
    """
    with suppress(OSError):  # it is on other storage, or reading it says what is wrong
        info = os.stat(path)
        if stat.S_ISFIFO(info.st_mode) or stat.S_ISCHR(info.st_mode):
            raise ValueError('a pipe or device, no file')
        if info.st_size > MAX_BYTES:
            raise ValueError(f'the file has {info.st_size} bytes, the limit is {MAX_BYTES}')
    return fileio.get(path, backend_args)


def explain(error: Exception) -> str:
    """Say in one line why an image cannot be read, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return 'no image file'
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ' '.join(text.split()) or type(error).__name__


def printable(path: str) -> str:
    """Replace what is not UTF-8 in a name by backslashes and digits: logs could not hold it."""
    return path.encode(errors='backslashreplace').decode()


def decode(content: bytes) -> np.ndarray:
    """Decode an image file to 8-bit RGB with shape (H, W, 3).

    Colour JPEGs take torchvision's decoder, which gives Pillow's values in two thirds of the time.
    Pillow decides about all else, and about what torchvision refuses.

    Raises:
        Exception: Of almost any type, if it cannot be read.
    """
    if not content:
        raise ValueError('the file is empty')
    with suppress(RuntimeError, struct.error):
        if is_plain_jpeg(content):
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            return pixels.permute(1, 2, 0).numpy()
    with Image.open(io.BytesIO(content)) as image:
        return np.array(to_rgb(image))


def is_plain_jpeg(content: bytes) -> bool:
    """Whether this is a JPEG of three colours, upright, of a size that Pillow finds harmless.

    A JPEG begins with segments: 0xFF, a type, the length in two bytes, the content. A file with
    anything else before its size is not plain: decoders may find another size than this does.
    """
    start = 2 if content[:2] == JPEG else len(content)
    while content[start : start + 1] == b'\xff':
        kind, length = struct.unpack_from('>BH', content, start + 1)
        if kind in FRAMES:
            bits, H, W, channels = struct.unpack_from('>BHHB', content, start + 4)
            return bits == 8 and channels == 3 and H * W <= (Image.MAX_IMAGE_PIXELS or math.inf)
        if kind not in BEFORE_FRAME:
            return False
        if kind == EXIF:
            with Image.open(io.BytesIO(content)) as image:
                if find_turn(image) is not None:
                    return False
        start += 2 + length
    return False


def find_turn(image: Image.Image) -> Image.Transpose | None:
    """Find what turns an image upright; nothing, as in viewers, where EXIF cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises almost anything on broken data
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an opened image of any mode upright and into 8-bit RGB; of several, the first.

    Raises:
        ValueError: If the image has float or 32-bit values.
    """
    sixteen_bits = image.mode in SIXTEEN_BITS
    sixteen_bits |= image.mode == 'I' and image.format == 'PNG'  # older Pillow's 16-bit PNG
    if image.mode in ('I', 'F') and not sixteen_bits:
        raise ValueError('float and 32-bit images have no fixed range: convert to 8 or 16 bits')
    image.load()
    turn = find_turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if sixteen_bits:
        image = Image.fromarray((np.asarray(image, dtype=np.int64) // 257).astype(np.uint8))
    if 'transparency' in image.info:
        image = image.convert('RGBA')  # Pillow warns of going from such palettes to RGB at once
    return image if image.mode == 'RGB' else image.convert('RGB')
