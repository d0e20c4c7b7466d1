"""One step with complementary masks, two samples of each image, against a step with one of each.

    python benchmarks/bench_complement.py

A step is tokenizer, forward, backward, gradient clipping and AdamW of ViT-B with DALL-E's tokens,
224 px, 98 of 196 patches masked, random weights. Both are steps of one model on one batch.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Options, Row, alternate, main
from mmengine.config import Config
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

import cae_mm.registry  # noqa: F401  registers ours
from cae_mm.precision import choose_precision

CONFIG = 'configs/pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
BATCH, PATCHES = 4, 196


def make_step(device: str) -> Callable[[bool, str], None]:
    """Return a training step, a function of ``complementary_masks`` and of the precision."""
    config = Config.fromfile(Path(__file__).parents[1] / CONFIG).model
    config.target_generator.init_cfg = None
    model: Any = MODELS.build(config).to(device).train()
    views = [torch.rand(BATCH, 3, side, side, device=device) for side in (224, 112)]
    masks = torch.rand(BATCH, PATCHES).argsort(1) < PATCHES // 2
    samples = [DataSample(mask=mask) for mask in masks]
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def step(complementary: bool, precision: str) -> None:
        model.complementary_masks = complementary
        with choose_precision(device, precision).autocast(device):
            loss, _ = model.parse_losses(model(views, samples, mode='loss'))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(options: Options) -> list[Row]:
    """Compare in float32 and in what this device computes in."""
    step, rows = make_step(options.device), []
    native = str(choose_precision(options.device).dtype).removeprefix('torch.')
    for precision in dict.fromkeys(['float32', native]):
        steps = {'one': partial(step, False, precision), 'two': partial(step, True, precision)}
        seconds = alternate(steps, options)
        one, two = seconds['one'], seconds['two']
        what = f'complementary masks, ViT-B, batch {BATCH}, {precision}'
        detail = f'{two:.2f} s and {one:.2f} s'
        rows += [
            Row(f'{what}: seconds a step', two / one, 1.4, at_most=True, detail=detail),
            Row(f'{what}: samples/s', 2 * one / two),
        ]
    return rows


if __name__ == '__main__':
    main(measure, __doc__)
