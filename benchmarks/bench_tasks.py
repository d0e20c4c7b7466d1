"""A training step of each downstream task: our config against mmpretrain's or mmsegmentation's.

    python benchmarks/bench_tasks.py             # or: make bench

A step is all that a Runner does with a batch of uint8 images: normalisation, forward, backward
and the optimizer's step, from initial weights. The baselines are the configs that come with
mmpretrain and mmsegmentation, with these changes:

- linear probe: that of MAE, with ``BEiTViT`` in place of ``VisionTransformer``, as CAE's encoder
  has its layer scale and biases; the rows that say so have ``VisionTransformer`` itself.
- attentive probe, which mmpretrain has not: the same with our head and optimizer.
- UperNet: images of ``PIXELS_OF_UPERNET``, for a step in seconds.

Default against default is what a user gets: ours takes the format that the machine has natively,
theirs float32 (their AMP wants a GPU). The other rows have both in the same format; bfloat16 runs
in our optimizer wrapper then. Peaks are those of processes of their own.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import mmseg.models  # noqa: F401  before processes fork
import torch
from harness import Options, Row, alternate, main, peak_memory
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

import cae_mm.models  # noqa: F401  before processes fork
from cae_mm.precision import choose_precision

CONFIGS = Path(__file__).parents[1] / 'configs'
PIXELS_OF_UPERNET = 128
MAE_LINEAR = 'mmpretrain::mae/benchmarks/vit-base-p16_8xb2048-linear-coslr-90e_in1k.py'
CAE_FINETUNE = 'mmpretrain::cae/benchmarks/beit-base-p16_8xb128-coslr-100e_in1k.py'
BEIT_UPERNET = 'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py'
MAX_ROUNDS = 3


class Task(NamedTuple):
    """Our config, theirs, and images in a step."""

    ours: str
    theirs: str
    batch_size: int


TASKS = {
    'linear probe': Task(
        'linear/vit-base-p16_cae-pre_32xb512-linear-coslr-90e_in1k.py', MAE_LINEAR, 8
    ),
    'attentive probe': Task(
        'attentive/vit-base-p16_cae-pre_32xb256-attentive-coslr-90e_in1k.py', MAE_LINEAR, 8
    ),
    'fine-tuning': Task(
        'finetune/vit-base-p16_cae-pre_32xb128-coslr-100e_in1k.py', CAE_FINETUNE, 4
    ),
    'UperNet': Task(
        'upernet/cae_vit-base_upernet_8xb2-amp-160k_ade20k-512x512.py', BEIT_UPERNET, 2
    ),
}


class Variant(NamedTuple):
    """Whose model, 'ours', 'theirs' or 'theirs, VisionTransformer', and its number format."""

    whose: str
    dtype: str


def measure(options: Options) -> list[Row]:
    """Measure peaks first, since processes fork safely before this one has computed anything."""
    options = replace(options, rounds=min(options.rounds, MAX_ROUNDS))
    own_default = str(choose_precision(options.device).dtype).removeprefix('torch.')
    rows = [
        row for task in TASKS for row in _memory_rows(task, Variant('ours', own_default), options)
    ]
    return rows + [row for task in TASKS for row in _time_rows(task, own_default, options)]


def _memory_rows(task: str, ours: Variant, options: Options) -> list[Row]:
    theirs = Variant('theirs', 'float32')
    peaks = [_peak(task, variant, options.device) for variant in (ours, theirs)]
    return [
        Row(
            f'{task}: peak memory, default against default',
            peaks[0] / peaks[1],
            1.0,
            at_most=True,
            detail=f'{peaks[0]:.2f} against {peaks[1]:.2f} GB',
        )
    ]


def _time_rows(task: str, own_default: str, options: Options) -> list[Row]:
    dtypes = dict.fromkeys(('float32', own_default))
    variants = [Variant(whose, dtype) for dtype in dtypes for whose in ('ours', 'theirs')]
    if task == 'linear probe':
        variants += [Variant('theirs, VisionTransformer', dtype) for dtype in dtypes]
    steps = {variant: make_step(task, variant, options.device) for variant in variants}
    seconds = alternate(steps, options)

    def row(what: str, ours: Variant, theirs: Variant, target: float | None = None) -> Row:
        detail = f'{seconds[ours] * 1e3:.0f} against {seconds[theirs] * 1e3:.0f} ms'
        name = f'{task}, {TASKS[task].batch_size} images: step, {what}'
        return Row(name, seconds[theirs] / seconds[ours], target, detail=detail)

    default = Variant('ours', own_default), Variant('theirs', 'float32')
    rows = [row(f'default ({own_default}) against default (float32)', *default, target=1.2)]
    return rows + [
        row(
            f'{dtype} both{whose.removeprefix("theirs")}',
            Variant('ours', dtype),
            Variant(whose, dtype),
        )
        for whose, dtype in variants
        if whose != 'ours'
    ]


def make_step(task: str, variant: Variant, device: str) -> Callable[[], object]:
    """Return a function that does one training step."""
    cfg = _load_ours(task) if variant.whose == 'ours' else _load_theirs(task, variant.whose)
    cfg.optim_wrapper |= dict(type='cae_mm.MixedPrecisionOptimWrapper', dtype=variant.dtype)
    # mmsegmentation prints each parameter
    quiet = redirect_stdout(io.StringIO())
    with quiet, DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).to(device)
        model.train()
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = make_batch(task)

    def step() -> object:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            return model.train_step(batch, optim_wrapper)

    return step


def make_batch(task: str) -> dict[str, Any]:
    """Random images with labels, or with masks for UperNet, as a data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    batch_size = TASKS[task].batch_size
    side = PIXELS_OF_UPERNET if task == 'UperNet' else 224
    size = (side, side)
    images = torch.randint(256, (batch_size, 3, *size), generator=generator, dtype=torch.uint8)
    if task != 'UperNet':
        samples = [DataSample().set_gt_label(i) for i in range(batch_size)]
    else:
        masks = torch.randint(150, (batch_size, 1, *size), generator=generator)
        samples = [
            SegDataSample(gt_sem_seg=PixelData(data=mask), metainfo=dict(img_shape=size))
            for mask in masks
        ]
    return dict(inputs=list(images), data_samples=samples)


def _load_ours(task: str) -> Config:
    cfg = Config.fromfile(CONFIGS / TASKS[task].ours)
    cfg.model.backbone.init_cfg = None
    if task == 'UperNet':
        cfg.model.backbone.img_size = PIXELS_OF_UPERNET
        cfg.model.data_preprocessor.size = (PIXELS_OF_UPERNET,) * 2
    return cfg


def _load_theirs(task: str, whose: str) -> Config:
    package, _, name = TASKS[task].theirs.partition('::')
    # mmengine.hub.get_config installs a package that it does not find by its upstream name
    folder = Path(import_module(package).__file__).parent / '.mim/configs'
    cfg = Config.fromfile(folder / name)
    cfg.default_scope = package
    if task == 'UperNet':
        cfg.model.pretrained = None
        cfg.model.backbone.img_size = (PIXELS_OF_UPERNET,) * 2
        cfg.model.data_preprocessor.size = (PIXELS_OF_UPERNET,) * 2
        return cfg
    cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    cfg.model.backbone.init_cfg = None
    if TASKS[task].theirs == MAE_LINEAR and whose == 'theirs':
        cfg.model.backbone = dict(
            type='BEiTViT',
            arch='base',
            final_norm=True,
            out_type='cls_token',
            frozen_stages=12,
            use_abs_pos_emb=True,
            use_rel_pos_bias=False,
        )
    if task == 'attentive probe':
        ours = _load_ours(task)
        cfg.model.backbone.out_type = 'raw'
        cfg.model.update(neck=None, head=ours.model.head)
        cfg.optim_wrapper.optimizer = ours.optim_wrapper.optimizer
    return cfg


def _peak(task: str, variant: Variant, device: str) -> float:
    """Peak in GB of a process that makes two steps; forked on CPUs, as imports take longer."""
    with get_context('fork' if device == 'cpu' else 'spawn').Pool(1) as pool:
        return pool.apply(_peak_of_two_steps, (task, variant, device))


def _peak_of_two_steps(task: str, variant: Variant, device: str) -> float:
    step = make_step(task, variant, device)
    for _ in range(2):
        step()
    return peak_memory(device)


if __name__ == '__main__':
    main(measure, __doc__)
