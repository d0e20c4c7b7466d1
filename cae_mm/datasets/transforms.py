"""Two views of one random crop: one for the encoder, one for the tokenizer.

Reference: official ``RandomResizedCropAndInterpolationWithTwoPic``,
https://github.com/Atten4Vis/CAE/blob/master/furnace/transforms.py
"""

import math
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from cae_mm.datasets.resizing import INTERPOLATIONS, resize
from cae_mm.patches import to_pair
from cae_mm.registry import TRANSFORMS

Size = int | tuple[int, int]


@TRANSFORMS.register_module()
class TwoViewResizedCrop(BaseTransform):
    """Crop at random and resize the crop to two sizes, antialiased.

    Args:
        size: Side, or (height, width), of view 1.
        second_size: The same of view 2; None makes view 1 only (for pixel targets).
        scale: Range of the crop's area over the image's.
        ratio: Range of the crop's width over its height for a square ``size``; others multiply it
            by their own, so that images are stretched as little.
        interpolation: 'bilinear', 'bicubic' or 'lanczos', for view 1.
        second_interpolation: The same for view 2.
        central: Take the largest central crop within that range instead, for evaluation.
        flip_prob: How likely the image is mirrored, left to right, before.
    """

    def __init__(
        self,
        size: Size = 224,
        second_size: Size | None = 112,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = 'bicubic',
        second_interpolation: str = 'lanczos',
        central: bool = False,
        flip_prob: float = 0.0,
    ) -> None:
        for name in (interpolation, second_interpolation):
            if name not in INTERPOLATIONS:
                raise ValueError(f"Unknown interpolation '{name}': choose one of {INTERPOLATIONS}")
        for name, (low, high) in dict(scale=scale, ratio=ratio).items():
            if not 0 < low <= high:
                raise ValueError(f'{name} must be (low, high) with 0 < low <= high')
        self.views = [(to_pair(size), interpolation)]
        if second_size is not None:
            self.views.append((to_pair(second_size), second_interpolation))
        self.scale = scale
        height, width = to_pair(size)
        self.ratio = ratio[0] * (width / height), ratio[1] * (width / height)
        self.central = central
        self.flip_prob = flip_prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replace ``img``, uint8 (H, W, 3), by the list of its views."""
        image = results['img']
        H, W, _ = image.shape
        flipped = self.flip_prob > 0 and np.random.random() < self.flip_prob
        find_crop = self._central_crop if self.central else self._draw_crop
        left, top, width, height = find_crop(W, H)
        if flipped:
            image = image[:, ::-1]
        crop = image[top : top + height, left : left + width]
        results['img'] = resize(crop, self.views)
        results['img_shape'] = self.views[0][0]
        return results

    def _draw_crop(self, W: int, H: int) -> tuple[int, int, int, int]:
        """Draw left, top, width and height of a crop, in pixels."""
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(10):
            area = np.random.uniform(*self.scale) * W * H
            ratio = math.exp(np.random.uniform(low, high))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= W and 0 < height <= H:
                left, top = np.random.randint(W - width + 1), np.random.randint(H - height + 1)
                return left, top, width, height
        return self._central_crop(W, H)

    def _central_crop(self, W: int, H: int) -> tuple[int, int, int, int]:
        """Return the largest central crop within the range of ratios."""
        ratio = min(max(W / H, self.ratio[0]), self.ratio[1])
        width, height = min(W, max(round(H * ratio), 1)), min(H, max(round(W / ratio), 1))
        return (W - width) // 2, (H - height) // 2, width, height

    def __repr__(self) -> str:
        return f'{type(self).__name__}(views={self.views}, scale={self.scale}, ratio={self.ratio})'


@TRANSFORMS.register_module()
class CheckSegMap(BaseTransform):
    """Stop at a map of classes that is not as large as its image; mmsegmentation crops both alike.

    It stands after ``LoadAnnotations``, before or after resizing of the image alone. Where nothing
    was loaded, as in inference, nothing is looked at.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Compare the map with the image as it was loaded."""
        seg_map, size = results.get('gt_seg_map'), tuple(results['ori_shape'][:2])
        if seg_map is not None and seg_map.shape != size:
            raise ValueError(
                f'{results["seg_map_path"]} has shape {seg_map.shape}, its image '
                f'{results["img_path"]} {size} (height, width; EXIF orientation applied). A map '
                'has one channel and the size of its image'
            )
        return results
