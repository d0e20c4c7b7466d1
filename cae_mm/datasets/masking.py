"""Masks for masked image modeling: bool arrays, True = masked.

Reference: BEiT's block-wise masking (algorithm 1 of https://arxiv.org/abs/2106.08254), as in
https://github.com/Atten4Vis/CAE/blob/master/furnace/masking_generator.py
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from cae_mm.patches import Grid, grid_of
from cae_mm.registry import TRANSFORMS

DRAWS = 25  # at once; 98 of 14x14 takes 17 on average
MAX_TRIES = 1000  # draws of a block; at 98 of 14x14 about 1 mask in 3000 needs more than 200


@TRANSFORMS.register_module()
class CAEMaskGenerator(BaseTransform):
    """Draw a mask that hides exactly the wanted number of patches.

    Where blocks cannot complete the number (a grid one patch wide, say) single patches do.

    Args:
        patch_size: Side of a patch in pixels; with the image it gives the grid.
        mask_ratio: Share of patches to hide, rounded down: 0.5 gives 98 of 196.
        strategy: 'block' (BEiT's, the paper's) or 'random' (each set equally likely).
        min_block: Least number of patches of a drawn block.
        min_aspect: Least height over width of a block; the greatest is its inverse.
    """

    def __init__(
        self,
        patch_size: int = 16,
        mask_ratio: float = 0.5,
        *,
        strategy: str = 'block',
        min_block: int = 16,
        min_aspect: float = 0.3,
    ) -> None:
        if strategy not in ('block', 'random'):
            raise ValueError(f"Unknown strategy '{strategy}': choose 'block' or 'random'")
        if not 0 < mask_ratio < 1:
            raise ValueError(f'mask_ratio must be between 0 and 1, not {mask_ratio}')
        if not 0 < min_aspect <= 1:
            raise ValueError(f'min_aspect must be in (0, 1], not {min_aspect}')
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.strategy = strategy
        self.min_block = min_block
        self.max_log_aspect = -math.log(min_aspect)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``mask``, bool with shape (H/p, W/p), for the (first) image."""
        image = results['img'][0] if isinstance(results['img'], list) else results['img']
        results['mask'] = self.generate(grid_of(image.shape[:2], self.patch_size))
        return results

    def count_masked(self, patches: int) -> int:
        """Number of patches to hide; 0.6 of 900 is 540, though 0.6 * 30 * 30 is 539.99... ."""
        return math.floor(self.mask_ratio * patches + 1e-9)

    def generate(self, grid: Grid) -> np.ndarray:
        """Draw one mask for ``grid`` (rows, columns)."""
        h, w = grid
        num_masked = self.count_masked(h * w)
        if num_masked == 0:
            raise ValueError(f'mask_ratio={self.mask_ratio} hides no patch of a {h}x{w} grid')
        mask = np.zeros(grid, dtype=bool)
        if self.strategy == 'block':
            self._add_blocks(mask, num_masked)
        # 'random' draws all patches here; 'block' what the last blocks could not fill
        missing = num_masked - np.count_nonzero(mask)
        if missing:
            mask.flat[np.random.choice(np.flatnonzero(~mask), missing, replace=False)] = True
        return mask

    def _add_blocks(self, mask: np.ndarray, num_masked: int) -> None:
        H, W = mask.shape
        missing = num_masked
        for u_area, u_aspect, u_top, u_left in _draw_uniform(MAX_TRIES):
            # BEiT's bounds: once fewer than min_block patches are missing, the block may be as
            # small as that, or overlap what is masked already
            area = self.min_block + u_area * (missing - self.min_block)
            aspect = math.exp((2 * u_aspect - 1) * self.max_log_aspect)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < H and 0 < w < W):
                continue
            top, left = int(u_top * (H - h + 1)), int(u_left * (W - w + 1))
            block = mask[top : top + h, left : left + w]
            new = h * w - np.count_nonzero(block)
            if 0 < new <= missing:
                block[:] = True
                missing -= new
                if missing == 0:
                    return

    def __repr__(self) -> str:
        options = f'mask_ratio={self.mask_ratio}, patch_size={self.patch_size}'
        return f'{type(self).__name__}(strategy={self.strategy!r}, {options})'


def _draw_uniform(count: int) -> Iterator[list[float]]:
    """Draw four numbers in [0, 1) ``count`` times; numpy is slow at drawing single ones."""
    for _ in range(0, count, DRAWS):
        yield from np.random.random((DRAWS, 4)).tolist()
