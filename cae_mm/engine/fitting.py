"""Fit a config to the machine that a run starts on: workers, batch, gathered steps, schedules."""

import os
from typing import Any

import joblib
import torch
from mmengine.config import Config

from cae_mm.engine.data import WORKER_TIMEOUT
from cae_mm.engine.settings import LOADERS, apply_settings, class_name, find_schedulers
from cae_mm.engine.sharding import check_sharding

WORLD_SIZE = {'pytorch': 'WORLD_SIZE', 'slurm': 'SLURM_NTASKS', 'mpi': 'OMPI_COMM_WORLD_SIZE'}
LOCAL_WORLD_SIZE = {
    'pytorch': 'LOCAL_WORLD_SIZE',
    'slurm': 'SLURM_NTASKS_PER_NODE',
    'mpi': 'OMPI_COMM_WORLD_LOCAL_SIZE',
}


def fit_config(cfg: Config) -> list[str]:
    """Apply the settings, fit a config to this machine, and return what to say of it.

    Raises:
        ValueError: If a schedule begins after the last epoch.
    """
    apply_settings(cfg, **(cfg.pop('settings', None) or {}))
    _check_schedules(cfg)
    cpu_batch_size = (cfg.pop('settings', None) or {}).get('cpu_batch_size')
    launcher = cfg.get('launcher', 'none')
    remarks = _fit_loaders(cfg, launcher)
    if torch.cuda.is_available():
        cpu_batch_size = None
    if launcher != 'none':
        cfg.model_wrapper_cfg = wrapper_options(cfg)
    if cfg.get('fsdp'):
        check_sharding(cfg.model)
        if launcher == 'none':
            remarks.append('fsdp: one process, which shares with nobody')
    return remarks + fit_batch(cfg, count_processes(launcher), cpu_batch_size)


def wrapper_options(cfg: Config) -> dict[str, Any]:
    """Options of the wrapper for several processes, those of the config before ours."""
    chosen = cfg.get('model_wrapper_cfg') or {}
    if chosen.get('type', 'MMDistributedDataParallel') != 'MMDistributedDataParallel':
        return chosen
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        gradient_as_bucket_view=True,  # no copy of the gradients
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    if not torch.cuda.is_available():
        wrapper['device_ids'] = None
    return wrapper | dict(chosen)


def _check_schedules(cfg: Config) -> None:
    epochs = (cfg.get('train_cfg') or {}).get('max_epochs')
    for scheduler in find_schedulers(cfg):
        begin = scheduler.get('begin', 0) if scheduler.get('by_epoch', True) else 0
        if epochs and begin >= epochs:
            raise ValueError(
                f'{scheduler["type"]} of param_scheduler begins at epoch {begin}, but '
                f'train_cfg.max_epochs is {epochs}: settings.epochs={epochs} shortens both'
            )


def count_processes(launcher: str) -> int:
    """Number of processes of a run that is about to start."""
    return int(os.environ.get(WORLD_SIZE.get(launcher, ''), 1))


def fit_batch(cfg: Config, processes: int, cpu_batch_size: int | None = None) -> list[str]:
    """Gather gradients over so many steps that the batch is that of the recipe.

    ``auto_scale_lr.base_batch_size`` is the recipe's batch: processes x images x gathered steps.
    Where that does not come out even, the learning rate is scaled linearly. All that a config
    counts in iterations (schedules, checkpoints, validation) is counted in updates and stretched.
    Nothing is changed unless ``auto_scale_lr.enable`` is true; ``accumulative_counts`` of the
    config, if any, is how many steps are gathered, ``cpu_batch_size`` the most images in a step.

    Returns:
        Lines for the log.
    """
    scale: Any = cfg.get('auto_scale_lr') or {}
    if not (scale.get('enable') and cfg.get('train_dataloader') and cfg.get('optim_wrapper')):
        return []
    if 'base_batch_size' not in scale:
        raise ValueError("auto_scale_lr.enable needs the recipe's batch: set base_batch_size in it")
    loader, wrapper, recipe = cfg.train_dataloader, cfg.optim_wrapper, scale['base_batch_size']
    remarks = []
    if cpu_batch_size and loader.batch_size > cpu_batch_size:
        remarks = [f'no GPU: {cpu_batch_size} images a step, settings.batch_size sets others']
        loader.batch_size = cpu_batch_size
    step = processes * loader.batch_size
    steps = wrapper.get('accumulative_counts') or max(round(recipe / step), 1)
    if steps > 1:
        wrapper.accumulative_counts = steps
        _stretch(cfg, steps)
    text = f'batch: {processes} x {loader.batch_size} x {steps} gathered = {step * steps}'
    if step * steps != recipe:
        _scale_rate(cfg, step * steps / recipe)
        text += f', learning rate {wrapper.optimizer.lr:.3g} in proportion to'
    scale.enable = False  # mmengine's own would not count what is gathered
    return [*remarks, f'{text} (the recipe: {recipe})']


def _scale_rate(cfg: Config, factor: float) -> None:
    """Multiply the learning rate, and what schedules make of it that is not a share of it."""
    cfg.optim_wrapper.optimizer.lr *= factor
    for scheduler in find_schedulers(cfg):
        if class_name(scheduler).endswith('LR'):  # others are of momentum
            for key in {'eta_min', 'eta_max'} & scheduler.keys():
                scheduler[key] *= factor


def _stretch(cfg: Config, factor: int) -> None:
    """Multiply what is counted in iterations, so that it happens after the same updates."""
    max_iters = cfg.train_cfg.get('max_iters')
    if max_iters:
        for key in {'max_iters', 'val_begin', 'val_interval'} & cfg.train_cfg.keys():
            cfg.train_cfg[key] *= factor
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if not checkpoint.get('by_epoch', True) and checkpoint.get('interval', -1) > 0:
        checkpoint['interval'] *= factor
    for scheduler in find_schedulers(cfg):
        if not scheduler.get('by_epoch', True):
            _stretch_scheduler(scheduler, factor, max_iters)


def _stretch_scheduler(scheduler: dict[str, Any], factor: int, max_iters: int | None) -> None:
    """Make a scheduler's value after ``factor`` x u steps what it was after u steps."""
    if max_iters:
        scheduler.setdefault('end', max_iters)  # mmengine's default
    if 'CosineAnnealing' in str(scheduler['type']) and 'end' in scheduler:
        scheduler.setdefault('T_max', scheduler['end'] - scheduler.get('begin', 0))  # as well
    for key in {'T_max', 'begin', 'step_size', 'total_steps'} & scheduler.keys():
        scheduler[key] *= factor
    for key in {'milestones', 'periods'} & scheduler.keys():
        scheduler[key] = [factor * steps for steps in scheduler[key]]
    if 'end' in scheduler:  # its last value is reached one step before
        scheduler['end'] = (scheduler['end'] - 1) * factor + 1
    if 'Exponential' in str(scheduler['type']):
        scheduler['gamma'] **= 1 / factor


def _fit_loaders(cfg: Config, launcher: str) -> list[str]:
    """Take no more workers than there are cores for this process, and wait for them so long only.

    Memory is pinned for GPUs only.
    """
    cores = count_cores(launcher)
    wishes = set()
    for loader in (cfg[name] for name in LOADERS if cfg.get(name)):
        if loader.get('num_workers', 0) > cores:
            wishes.add(loader.num_workers)
            loader.num_workers = cores
        if loader.get('num_workers'):
            loader.setdefault('timeout', WORKER_TIMEOUT)
        else:
            loader.persistent_workers, loader.timeout = False, 0
            loader.pop('prefetch_factor', None)  # torch refuses it without workers
        if not torch.cuda.is_available():
            loader.pin_memory = False
    if not wishes:
        return []
    return [f'workers: {cores}, one for each core (the config: {", ".join(map(str, wishes))})']


def count_cores(launcher: str) -> int:
    """Cores for each process of a run on this machine."""
    if launcher == 'slurm' and (own := os.environ.get('SLURM_CPUS_PER_TASK')):
        return min(joblib.cpu_count(), int(own))  # to which Slurm may have bound it already
    processes = int(os.environ.get(LOCAL_WORLD_SIZE.get(launcher, ''), 1))
    return max(joblib.cpu_count() // processes, 1)
