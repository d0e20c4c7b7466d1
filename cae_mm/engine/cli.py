"""What the command lines of all tools have in common."""

import argparse
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from cae_mm.engine.settings import apply_settings, suggest

# what mmengine, and its train.py and test.py in mmpretrain, mmseg and mmdet, look at
RUNNER_KEYS = {*inspect.signature(Runner.__init__).parameters, 'runner_type', 'settings'}
OTHER_KEYS = {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'find_unused_parameters',
    'fsdp',
    'model_wrapper_cfg',
    'tta_model',
}


def add_config_arguments(parser: argparse.ArgumentParser, config: str = 'config file') -> None:
    """Add the config and its overrides, spelled as in mmpretrain."""
    parser.add_argument('config', help=config)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override values of the config, as in settings.img_size=128 '
        'train_dataloader.num_workers=4 key="[a,b]"',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of tools that start a Runner."""
    add_config_arguments(parser)
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch of torch < 2 passes the one, of torch >= 2 the other
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add the device of tools that run without a Runner; one that cannot be used is refused."""
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    text = 'default: the GPU if there is one'
    parser.add_argument('--device', type=_device, default=default, help=text)


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:  # the former of a torch without CUDA
        reason = str(error).partition('\n')[0]
        raise argparse.ArgumentTypeError(
            f'{name} cannot be used here, try cpu or cuda:0: {reason}'
        ) from None
    return name


def load_config(path: str | Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config (it runs as a program), put in options by key with dots, apply its settings."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'no config at {Path(path).absolute()}')
    cfg = Config.fromfile(path)
    known = {*cfg, *RUNNER_KEYS, *OTHER_KEYS}
    for key in options or {}:
        top = key.partition('.')[0]
        if top not in known:
            raise ValueError(f'--cfg-options {key}: nothing looks at {top}{suggest(top, known)}')
    cfg.merge_from_dict(options or {})
    apply_settings(cfg, **(cfg.pop('settings', None) or {}))
    return cfg


def load_run_config(args: argparse.Namespace) -> Config:
    """Read the config of a run with the options of ``add_run_arguments`` applied."""
    cfg = load_config(args.config, args.cfg_options)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    cfg.setdefault('runner_type', 'cae_mm.CAERunner')
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg
