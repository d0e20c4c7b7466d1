"""DALL-E's tokenizer alone: ours against mmpretrain's, on photographs.

Both have the same random weights, as the published ones cannot be shipped. Random networks have
close calls everywhere, so the tokens that reduced precision changes are more than with trained
weights. Ours classifies the 98 masked patches, as in pretraining; mmpretrain's always all.
"""

import mmpretrain.models  # noqa: F401  registers mmpretrain's tokenizer
import numpy as np
import torch
from harness import Options, Row, alternate, main
from mmengine.registry import MODELS
from sklearn.datasets import load_sample_images
from torch import Tensor

import cae_mm.registry  # noqa: F401  registers ours
from cae_mm.precision import choose_precision

BATCH = {'cpu': 8, 'cuda': 128}
GRID = (14, 14)


def make_images(count: int, size: int = 112) -> Tensor:
    """Crops of scikit-learn's photographs in [0.1, 0.9], shape (count, 3, size, size)."""
    photos = load_sample_images().images  # [427, 640, 3] each
    rng = np.random.default_rng(0)
    crops = []
    for i in range(count):
        top, left = rng.integers(427 - 2 * size), rng.integers(640 - 2 * size)
        crops.append(photos[i % len(photos)][top : top + 2 * size : 2, left : left + 2 * size : 2])
    return torch.from_numpy(np.stack(crops)).movedim(-1, 1) / 255 * 0.8 + 0.1


def measure(options: Options) -> list[Row]:
    """Speed in each precision class, and tokens that are the same."""
    device, count = options.device, BATCH[options.device]
    theirs = MODELS.build(dict(type='mmpretrain.DALL-E')).to(device).eval().requires_grad_(False)
    ours = MODELS.build(dict(type='cae_mm.DALLEEncoder')).to(device).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    images = make_images(count).to(device)
    ids = torch.rand(count, 196).argsort(1)[:, :98].sort(1).values.to(device)
    rows, exact = [], theirs(images).argmax(1)
    precisions = {'fp32': torch.float32}
    if choose_precision(device).dtype != torch.float32:
        precisions |= {'reduced precision': torch.bfloat16}
    for name, dtype in precisions.items():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            seconds = alternate(
                {
                    'theirs': lambda: theirs(images).argmax(1),
                    'ours': lambda: ours.targets(images, ids, GRID),
                },
                options,
            )
            same = 100 * (ours.tokenize(images) == exact).float().mean().item()
            they = 100 * (theirs(images).argmax(1) == exact).float().mean().item()
        detail = f'{seconds["theirs"]:.3f} -> {seconds["ours"]:.3f} s for {count} images'
        ratio = seconds['theirs'] / seconds['ours']
        rows.append(Row(f'tokenizer, {name}, cae-mm : mmpretrain', ratio, 2.0, detail=detail))
        target = 100 if dtype == torch.float32 else 99.5
        detail = f'random weights; mmpretrain in this format {they:.2f} %'
        what = f'tokenizer, {name}, tokens as mmpretrain in fp32'
        rows.append(Row(what, same, target, unit=' %', detail=detail))
    return rows


if __name__ == '__main__':
    main(torch.no_grad()(measure), __doc__)
