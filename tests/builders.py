"""Tiny models, batches and folders that the tests share, and tools run in this process."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from PIL import Image

import cae_mm.registry  # noqa: F401
from cae_mm.engine.settings import apply_settings

ROOT = Path(__file__).parent.parent
PATCH, GRID, WIDTH, VOCAB = 4, (4, 4), 16, 32
SHALLOW = dict(
    backbone=dict(arch=dict(embed_dims=WIDTH, depth=1, num_heads=2, layer_scale=0.1)),
    neck=dict(regressor_depth=1),
)
IMAGE = np.random.default_rng(0).integers(256, size=(40, 48, 3), dtype=np.uint8)
# configs of the tasks after pretraining, and the classes of their tiny models
TASKS = {
    'mmpretrain': 'configs/finetune/vit-base-p16_cae-pre_8xb128-coslr-100e_custom.py',
    'mmseg': 'configs/upernet/cae_vit-mini_upernet_1xb2-amp-800i_ade20k-256x256.py',
    'mmdet': 'configs/mask_rcnn/cae_vit-mini_mask-rcnn_1xb4-amp-25e_coco-256px.py',
}
CLASSES = {
    'mmpretrain': dict(classes=['cat', 'dog']),
    'mmseg': dict(classes=['sky', 'sea', 'sun'], palette=[[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    'mmdet': dict(classes=['ant', 'bee'], palette=[(9, 8, 7), (6, 5, 4)]),
}


def cae_config(**changes: Any) -> dict[str, Any]:
    """A CAE of width 16 on images of 16 px with tokens of a tiny d-VAE."""
    config = dict(
        type='cae_mm.CAE',
        backbone=dict(
            type='cae_mm.CAEViT',
            arch=dict(embed_dims=WIDTH, depth=2, num_heads=2, layer_scale=0.1),
            img_size=(GRID[0] * PATCH, GRID[1] * PATCH),
            patch_size=PATCH,
        ),
        neck=dict(
            type='cae_mm.CAENeck',
            in_dims=WIDTH,
            embed_dims=WIDTH,
            num_heads=2,
            regressor_depth=2,
            decoder_depth=1,
            out_dims=VOCAB,
        ),
        head=dict(type='cae_mm.CAEPretrainHead'),
        target_generator=dict(
            type='cae_mm.DiscreteVAE',
            vocab_size=VOCAB,
            codebook_dims=8,
            hidden_dims=8,
            num_res_blocks=1,
        ),
    )
    for key, value in changes.items():
        if isinstance(value, dict) and 'type' not in value:
            config[key] = config[key] | value
        else:
            config[key] = value
    return config


PIPELINE = [
    dict(type='cae_mm.LoadImage'),
    dict(type='cae_mm.TwoViewResizedCrop', size=GRID[0] * PATCH, second_size=8 * GRID[0]),
    dict(type='cae_mm.CAEMaskGenerator', patch_size=PATCH, min_block=2),
    dict(type='mmpretrain.PackInputs'),
]


def loader_config(root: Path, batch_size: int = 2, **dataset: Any) -> dict[str, Any]:
    """A loader of a folder, by default of what ``cae_config`` trains on."""
    return dict(
        batch_size=batch_size,
        num_workers=0,
        drop_last=True,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
        dataset=dict(
            type='mmpretrain.CustomDataset',
            data_root=str(root),
            with_label=False,
            pipeline=PIPELINE,
        )
        | dataset,
    )


def build_cae(**changes: Any) -> torch.nn.Module:
    """Build and initialise it, seeded."""
    torch.manual_seed(0)
    model = MODELS.build(cae_config(**changes))
    model.init_weights()
    return model


def make_batch(
    batch_size: int = 3, grid: tuple[int, int] = GRID, masked: int = 7
) -> tuple[list[torch.Tensor], list[DataSample]]:
    """Two normalised views and samples with masks, seeded."""
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(batch_size, 3, grid[0] * side, grid[1] * side, generator=generator)
        for side in (PATCH, 8)
    ]
    N = grid[0] * grid[1]
    masks = torch.rand(batch_size, N, generator=generator).argsort(1) < masked
    return views, [DataSample(mask=mask) for mask in masks]


def take_step(
    model: torch.nn.Module, views: Any, masks: Any, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients."""
    model.zero_grad()
    samples = [DataSample(mask=mask) for mask in masks]
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model(views, samples, mode='loss')
    (losses['loss_main'] + losses['loss_align']).backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    return losses, {name: grad for name, grad in gradients.items() if grad is not None}


def equal(a: Any, b: Any) -> None:
    """Assert that tensors are the same bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    """Assert that tensors are the same up to rounding in float64."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def randomize(module: torch.nn.Module, std: float = 0.3) -> Any:
    """Make all parameters differ from each other and from 0 and 1, seeded."""
    torch.manual_seed(0)
    for param in module.parameters():
        torch.nn.init.normal_(param, std=std)
    return module


def make_images(folder: Path, classes: dict[str, int], count: int) -> Path:
    """A labelled folder with images of noise, for each class up to a brightness."""
    rng = np.random.default_rng(0)
    for name, brightness in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(brightness, size=(24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{i}.png')
    return folder


def run_tool(name: str, *arguments: Any) -> None:
    """Run a tool as from the command line, in this process to save the imports."""
    tool, argv = str(ROOT / 'tools' / name), sys.argv
    sys.argv = [tool, *map(str, arguments)]
    try:
        runpy.run_path(tool, run_name='__main__')
    finally:
        sys.argv = argv


def assert_same_steps(
    one: torch.nn.Module,
    other: torch.nn.Module,
    views: Any,
    masks: Any,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Losses and gradients to 1e-5 of the largest value of each; bfloat16 rounds elsewhere.

    The gradient of ``norm_k.bias`` is nothing but rounding: a softmax does not see it.
    """
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    results = [take_step(model, views, masks, dtype) for model in (one, other)]
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        least = 1e-3 * max(value.abs().max() for value in theirs.values())
        for name, value in theirs.items():
            scale = value.abs().max().clamp(min=least)
            torch.testing.assert_close(ours[name] / scale, value / scale, rtol=0, atol=tolerance)


def shrink_task(scope: str) -> Config:
    """Read the config of a tiny model for two classes, three where two would be one."""
    cfg = Config.fromfile(ROOT / TASKS[scope])
    model = cfg.model
    arch = dict(embed_dims=32, depth=4, num_heads=2, layer_scale=0.1)
    model.backbone.update(arch=arch, init_cfg=None)
    if scope == 'mmpretrain':
        apply_settings(cfg, img_size=32)
        model.head.update(in_channels=32, num_classes=2)
        return cfg
    model.backbone.out_indices = (0, 1, 2, 3)
    if scope == 'mmseg':
        apply_settings(cfg, img_size=64)
        model.neck.in_channels = 32
        model.decode_head.update(in_channels=[32] * 4, channels=8, num_classes=3)
        model.auxiliary_head.update(in_channels=32, channels=8, num_classes=3)
        # what one process makes of the recipes' SyncBN is looked at too
        model.neck.norm_cfg = model.decode_head.norm_cfg = dict(type='SyncBN')
        return cfg
    apply_settings(cfg, transforms=dict(Resize=dict(scale=(96, 64))))
    model.neck[0].in_channels, model.neck[1].in_channels = 32, [32] * 4
    model.roi_head.bbox_head.num_classes = model.roi_head.mask_head.num_classes = 2
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)
    return cfg


def save_trained(scope: str, path: Path) -> Config:
    """Write a file as a Runner does, with weights at random, for the config that is returned."""
    cfg = shrink_task(scope)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg.model)
    model.init_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    content = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=CLASSES[scope]))
    torch.save(content, path)
    return cfg
