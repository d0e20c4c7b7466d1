"""Load image files of every kind that Pillow reads, as they are meant to look."""

import io
from typing import Any

import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from PIL import Image, ImageOps

from cae_mm.registry import TRANSFORMS

WIDE_MODES = ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N')


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Read ``img_path`` into ``img``: uint8 with shape (H, W, 3), BGR as in all of OpenMMLab.

    Grayscale, palette, CMYK and alpha images become RGB as Pillow converts them, EXIF orientation
    is applied, and 16-bit images are scaled to 8 bits (mmcv's Pillow backend clips them).

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
            with Image.open(io.BytesIO(fileio.get(path, self.backend_args))) as image:
                array = np.array(to_rgb(image))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            message = f'cannot read the image {path}: {error}'
            if self.on_error == 'raise':
                raise OSError(
                    f"{message}. Mend or remove the file, or set on_error='skip' in LoadImage"
                ) from error
            print_log(f'{message}. Skipped', logger='current', level='WARNING')
            return None
        results['img'] = array[..., ::-1]  # RGB -> BGR
        results['img_shape'] = results['ori_shape'] = array.shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(on_error={self.on_error!r})'


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an opened image of any mode upright and into 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode in WIDE_MODES:  # 16 bits in PNG and TIFF; 'I' holds the same range
        values = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    return image.convert('RGB')
