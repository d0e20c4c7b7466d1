"""Runs of the Runner in float64 on fixed samples, alone or in two processes on the CPU."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from builders import GRID, PATCH, cae_config, make_batch
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS, HOOKS, MODELS, DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from cae_mm.engine import CAERunner
from cae_mm.engine.processes import unwrap
from cae_mm.engine.sharding import gathered_weights

IMAGES, WIDTH, CLASSES = 12, 16, 3
ENCODER = dict(
    type='cae_mm.CAEViT',
    arch=dict(embed_dims=WIDTH, depth=2, num_heads=2, layer_scale=0.1),
    img_size=GRID[0] * PATCH,
    patch_size=PATCH,
)
STACK = dict(type='StackSamples')


def probe(out_type: str, **head: Any) -> dict[str, Any]:
    """A probe on a frozen encoder."""
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=STACK,
        backbone=dict(ENCODER, out_type=out_type, frozen_stages=2),
        head=dict(num_classes=CLASSES, in_channels=WIDTH, **head),
    )


def upernet() -> dict[str, Any]:
    """UperNet with SyncBN in neck and heads, without dropout."""
    head = dict(
        channels=8,
        dropout_ratio=0,
        num_classes=CLASSES,
        norm_cfg=dict(type='SyncBN'),
        align_corners=False,
        loss_decode=dict(type='mmseg.CrossEntropyLoss'),
    )
    maps = dict(out_indices=(0, 1, 2, 3), out_type='featmap', use_rel_pos_bias=True)
    return dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=STACK,
        backbone=dict(ENCODER, arch=dict(ENCODER['arch'], depth=4), **maps),
        neck=dict(
            type='cae_mm.ViTFeaturePyramid',
            in_channels=WIDTH,
            patch_size=PATCH,
            strides=(1, 2, 4, 4),
        ),
        decode_head=dict(
            type='mmseg.UPerHead', in_channels=[WIDTH] * 4, in_index=[0, 1, 2, 3], **head
        )
        | dict(pool_scales=(1, 2)),
        auxiliary_head=dict(
            type='mmseg.FCNHead', in_channels=WIDTH, in_index=2, num_convs=1, **head
        ),
    )


MODELS_TO_TRAIN: dict[str, Callable[[], dict[str, Any]]] = {
    'cae': lambda: cae_config(data_preprocessor=dict(STACK)),
    'recomputed': lambda: cae_config(
        data_preprocessor=dict(STACK), backbone=dict(with_cp=True), neck=dict(with_cp=True)
    ),
    'linear': lambda: probe('cls_token', type='cae_mm.LinearProbeHead'),
    'attentive': lambda: probe('raw', type='cae_mm.AttentiveProbeHead', num_heads=2),
    'upernet': upernet,
}


@MODELS.register_module()
class StackSamples(BaseDataPreprocessor):
    """Stack samples without changing a number."""

    def __init__(self, batch_augments: None = None) -> None:  # which mmpretrain gives
        super().__init__()

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Stack images, or each of their views (mmengine collates by view)."""
        images = data['inputs']
        views = [images] if isinstance(images[0], torch.Tensor) else images
        views = [torch.stack(tuple(view)) for view in views]
        inputs = views[0] if len(views) == 1 else views
        return dict(inputs=inputs, data_samples=data['data_samples'])


@DATASETS.register_module()
class FixedSamples(Dataset):
    """Float64 images with masks, classes and maps of classes; those of ``broken`` are NaN."""

    def __init__(self, views: int, broken: Sequence[int] = ()) -> None:
        self.views = views
        inputs, self.samples = make_batch(IMAGES)
        self.images = [view.double() for view in inputs]
        self.images[0][list(broken)] = torch.nan

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = DataSample(mask=self.samples[index].mask).set_gt_label(index % CLASSES)
        sample.set_metainfo(dict(img_path=f'{index}.png'))
        labels = self.images[0][index].argmax(0, keepdim=True)  # [1, H, W]
        sample.set_field(PixelData(data=labels), 'gt_sem_seg', dtype=PixelData)
        views = tuple(view[index] for view in self.images)
        return dict(inputs=views if self.views == 2 else views[0], data_samples=sample)


@HOOKS.register_module()
class RecordLosses(Hook):
    """Keep the loss of each step, and what all processes have at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any, outputs: Any) -> None:
        """Keep it."""
        self.losses.append(outputs['loss'].item())


@HOOKS.register_module()
class Look(Hook):
    """Call the encoder before the model was called once, as after the last step of an epoch."""

    def before_train(self, runner: Any) -> None:
        """Call it; a sharded one gathers its weights."""
        with gathered_weights(runner.model), torch.no_grad():
            runner.model.backbone(torch.zeros(1, 3, GRID[0] * PATCH, GRID[1] * PATCH))


def run_config(kind: str, work_dir: Path, processes: int, **changes: Any) -> Config:
    """Two epochs of two updates with six images each, gathered over ``gathered`` steps."""
    gathered = changes.pop('gathered', 1)
    optimizer = dict(type='AdamW', lr=1e-2, weight_decay=0.05)
    if kind in ('linear', 'attentive'):
        optimizer = dict(type='cae_mm.LARS', lr=1.0)
    cfg = dict(
        model=MODELS_TO_TRAIN[kind](),
        train_dataloader=dict(
            batch_size=6 // gathered // processes,
            num_workers=0,
            dataset=dict(type='FixedSamples', views=2 if kind in ('cae', 'recomputed') else 1),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        optim_wrapper=dict(
            type='cae_mm.MixedPrecisionOptimWrapper',
            dtype='float32',  # no autocast: all is float64
            optimizer=optimizer,
            clip_grad=dict(max_norm=1.0),
            accumulative_counts=gathered,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        default_hooks=dict(checkpoint=dict(type='cae_mm.CheckpointHook', interval=1)),
        custom_hooks=[
            dict(type='cae_mm.SafeLoadHook'),
            dict(type='RecordLosses'),
        ],
        default_scope='mmengine',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        log_level='ERROR',
        randomness=dict(seed=0),
        launcher='pytorch' if processes > 1 else 'none',
        work_dir=str(work_dir),
        experiment_name=f'{work_dir.name}-{processes}',
    )
    return Config(cfg | changes)


def train(kind: str, work_dir: Path, processes: int = 1, **changes: Any) -> CAERunner:
    """Train, and return the runner, with the ``losses`` of this process."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    Config.pretty_text, pretty_text = property(repr), Config.pretty_text  # yapf takes seconds
    try:
        with patch.object(Config, 'pretty_text', property(repr)):  # formatting takes longer
            runner = CAERunner.from_cfg(run_config(kind, work_dir, processes, **changes))
            runner.reduced = []
            if isinstance(runner.model, DistributedDataParallel):
                runner.model.register_comm_hook(runner, reduce_and_record)
            runner.train()
    finally:
        torch.set_default_dtype(default)
        Config.pretty_text = pretty_text
    [runner.losses] = [hook.losses for hook in runner.hooks if isinstance(hook, RecordLosses)]
    return runner


def train_faulty(work_dir: Path, processes: int = 1, broken: int = 7, **changes: Any) -> CAERunner:
    """Train a CAE with its guard; the batch of the image ``broken`` has no finite loss."""
    cfg = run_config('cae', work_dir, processes)
    cfg.train_dataloader.dataset.broken = [broken]
    cfg.optim_wrapper.optimizer.fused = True
    guard = dict(type='cae_mm.NumericalFaultHook') | changes.pop('guard', {})
    cfg.custom_hooks.append(guard)
    same = {key: cfg[key] for key in ('train_dataloader', 'optim_wrapper', 'custom_hooks')}
    return train('cae', work_dir, processes, **same, **changes)


def reduce_and_record(runner: CAERunner, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with a bucket of gradients; keep in which iteration."""
    runner.reduced.append(runner.iter)
    return allreduce_hook(None, bucket)


def in_two_processes(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` in two processes that know each other, and return what they do."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_call, (folder, function, args), nprocs=2)
        return [torch.load(f'{folder}/{i}', weights_only=False) for i in range(2)]


def _call(rank: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    rendezvous = f'file://{folder}/rendezvous'
    torch.distributed.init_process_group('gloo', init_method=rendezvous, rank=rank, world_size=2)
    assert is_distributed()
    torch.save(function(*args), f'{folder}/{rank}')
    torch.distributed.destroy_process_group()


def load_from_web(folder: Path, urls: list[str]) -> list[Any]:
    """Load, as one of two processes, from a web that is ``folder``: contents or what is wrong."""

    def download(url: str, path: str) -> None:
        time.sleep(0.5)  # the other one has to wait
        with open(folder / 'downloads', 'a') as file:
            file.write(f'{url}\n')
        shutil.copy(folder / url.rpartition('/')[2], path)

    results = []
    with (
        patch.object(torch.hub, 'get_dir', lambda: str(folder / 'hub')),
        patch.object(torch.hub, 'download_url_to_file', download),
    ):
        for url in urls:
            try:
                results.append(CheckpointLoader.load_checkpoint(url))
            except FileNotFoundError as error:
                results.append(str(error))
    return results


def train_all(
    folder: Path, runs: list[tuple[str, str]], more: Callable[[Path], dict[str, Any]]
) -> dict[Any, dict[str, Any]]:
    """Train as one of two processes: each run, one resumed from one process, one that gathers."""
    results: dict[Any, dict[str, Any]] = {}
    for kind, mode in runs:
        settings = dict(fsdp=mode == 'fsdp')
        runner = train(kind, folder / f'{kind}-{mode}', 2, settings=settings)
        results[kind, mode] = report(runner)
    if ('cae', 'fsdp') in runs:
        file = str(folder / 'cae/epoch_1.pth')
        options = dict(settings=dict(fsdp=True), resume=True, load_from=file)
        options['custom_hooks'] = [*run_config('cae', folder, 2).custom_hooks, dict(type='Look')]
        results['resumed'] = report(train('cae', folder / 'resumed', 2, **options))
    results['gathered'] = report(train('cae', folder / 'gathered', 2, gathered=3))
    for mode in dict.fromkeys(mode for _, mode in runs):
        options = dict(settings=dict(fsdp=mode == 'fsdp'))
        results['faulty', mode] = report(train_faulty(folder / f'faulty-{mode}', 2, **options))
    results['more'] = more(folder)
    return results


def count_calls(runs: dict[str, Config], module: str, names: Sequence[str]) -> dict[str, list[int]]:
    """Train as one of two processes; return how often each run called functions of a module."""
    counts, place = {}, import_module(module)
    for run, cfg in runs.items():
        cfg.merge_from_dict(dict(launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='gloo'))))
        with ExitStack() as stack:
            stack.enter_context(DefaultScope.overwrite_default_scope(cfg.default_scope))
            stack.enter_context(patch.object(Config, 'pretty_text', property(repr)))
            spies = [
                stack.enter_context(patch.object(place, name, wraps=getattr(place, name)))
                for name in names
            ]
            CAERunner.from_cfg(cfg).train()
        counts[run] = [spy.call_count for spy in spies]
    return counts


def report(runner: CAERunner) -> dict[str, Any]:
    """What the tests want to know of a process' run."""
    model = unwrap(runner.model)
    params = [getattr(param, '_local_tensor', param) for param in model.parameters()]
    return dict(
        losses=runner.losses,
        reduced=runner.reduced,
        buffers=dict(model.named_buffers()),
        kept=sum(param.numel() for param in params),
    )
