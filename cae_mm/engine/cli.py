"""What the command lines of ``tools/train.py`` and ``tools/test.py`` have in common."""

import argparse
import os
from pathlib import Path

import torch
from mmengine.config import Config, DictAction


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every tool with a config takes, spelled as in mmpretrain."""
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override values of the config, as in train_dataloader.batch_size=32 '
        'train_dataloader.dataset.pipeline.2.size=128 key="[a,b]"',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch of torch < 2 passes the one, of torch >= 2 the other
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config with the common options applied.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    if not Path(args.config).is_file():
        raise FileNotFoundError(f'no config at {Path(args.config).absolute()}')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if not torch.cuda.is_available():
        _fit_to_cpu(cfg)
    return cfg


def _fit_to_cpu(cfg: Config) -> None:
    """Change what would fail or warn without a GPU, which mmengine takes for granted."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name):
            cfg[name].pin_memory = False
    if cfg.launcher == 'pytorch':  # several processes on CPUs
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
        )
