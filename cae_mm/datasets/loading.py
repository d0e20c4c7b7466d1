"""Load image files of every kind that Pillow reads, as they are meant to look."""

import io
import logging
import math
import struct
from contextlib import suppress
from typing import Any

import mmengine.fileio as fileio
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.io import decode_jpeg

from cae_mm.registry import TRANSFORMS

JPEG = b'\xff\xd8'
FRAMES = (0xC0, 0xC1, 0xC2)  # segments with the size: baseline, extended, progressive
EXIF = 0xE1
SIXTEEN_BITS = ('I;16', 'I;16B', 'I;16L', 'I;16N')


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Read ``img_path`` into ``img``: uint8 with shape (H, W, 3), BGR as in all of OpenMMLab.

    A dataset that has the file's content already gives it as ``img_bytes``; ``img_path`` then is
    only what errors and logs name.

    Grayscale, palette, CMYK and alpha images become RGB as Pillow converts them, EXIF orientation
    is applied, and 16-bit images are scaled to 8 bits (mmcv's Pillow backend clips them). Float
    and 32-bit images count as unreadable, since nothing says what their white is.

    Args:
        on_error: 'raise' stops at a file that cannot be read; 'skip' reports it and lets the
            dataset draw another image (mmengine's dataset gives up after 1000 in a row).
        backend_args: Where files are, see ``mmengine.fileio``; None is the local disk.
    """

    def __init__(self, on_error: str = 'raise', backend_args: dict[str, Any] | None = None) -> None:
        if on_error not in ('raise', 'skip'):
            raise ValueError(f"Unknown on_error '{on_error}': choose 'raise' or 'skip'")
        self.on_error = on_error
        self.backend_args = backend_args

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load one image; None lets the dataset draw another."""
        path = results['img_path']
        try:
            content = results.pop('img_bytes', None)
            if content is None:
                content = fileio.get(path, self.backend_args)
            array = decode(content)
        except Exception as error:  # Pillow's decoders raise almost anything on broken files
            unknown = isinstance(error, UnidentifiedImageError)
            message = f'cannot read the image {path}: {"no image file" if unknown else error}'
            if self.on_error == 'raise':
                raise OSError(
                    f'{message}. Fix or remove the file, or set '
                    'settings.transforms.LoadImage.on_error=skip'
                ) from error
            print_log(f'{message}. Skipped', logger='current', level=logging.WARNING)
            return None
        results['img'] = array[..., ::-1]  # RGB -> BGR
        results['img_shape'] = results['ori_shape'] = array.shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(on_error={self.on_error!r})'


def decode(content: bytes) -> np.ndarray:
    """Decode an image file to 8-bit RGB with shape (H, W, 3).

    Colour JPEGs take torchvision's decoder, which gives Pillow's values in two thirds of the time.
    Pillow decides about all else, and about what torchvision refuses.
    """
    with suppress(RuntimeError, struct.error):
        if is_plain_jpeg(content):
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            return pixels.permute(1, 2, 0).numpy()
    with Image.open(io.BytesIO(content)) as image:
        return np.array(to_rgb(image))


def is_plain_jpeg(content: bytes) -> bool:
    """Whether this is a JPEG of three colours, upright, of a size that Pillow finds harmless.

    A JPEG begins with segments: 0xFF, a type, the length in two bytes, the content.
    """
    start = 2 if content[:2] == JPEG else len(content)
    while content[start : start + 1] == b'\xff':
        kind, length = struct.unpack_from('>BH', content, start + 1)
        if kind in FRAMES:
            bits, H, W, channels = struct.unpack_from('>BHHB', content, start + 4)
            return bits == 8 and channels == 3 and H * W <= (Image.MAX_IMAGE_PIXELS or math.inf)
        if kind == EXIF:
            with Image.open(io.BytesIO(content)) as image:
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    return False
        start += 2 + length
    return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an opened image of any mode upright and into 8-bit RGB.

    Raises:
        ValueError: If the image has float or 32-bit values.
    """
    sixteen_bits = image.mode in SIXTEEN_BITS
    sixteen_bits |= image.mode == 'I' and image.format == 'PNG'  # older Pillow's 16-bit PNG
    if image.mode in ('I', 'F') and not sixteen_bits:
        raise ValueError('float and 32-bit images have no fixed range: convert to 8 or 16 bits')
    image = ImageOps.exif_transpose(image)
    if sixteen_bits:
        image = Image.fromarray((np.asarray(image, dtype=np.int64) // 257).astype(np.uint8))
    if 'transparency' in image.info:
        image = image.convert('RGBA')  # Pillow warns of going from such palettes to RGB at once
    return image.convert('RGB')
