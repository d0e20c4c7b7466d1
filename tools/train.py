"""Train whatever a config describes: a tokenizer, CAE, a probe, a downstream model.

python tools/train.py CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--amp]
    [--cfg-options train_dataloader.batch_size=32 ...]
torchrun --nproc-per-node 8 tools/train.py CONFIG --launcher pytorch
"""

import argparse

from mmengine.config import Config
from mmengine.registry import RUNNERS

from cae_mm.engine.cli import add_run_arguments, load_run_config


def parse_args() -> argparse.Namespace:
    """Read the command line; the options are those of mmpretrain's tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='continue from this checkpoint, or from the last one in the work directory; without '
        'one begin, with load_from if the config has it',
    )
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision in the format that the machine has'
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate in training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='keep to the batch of the recipe (our configs do anyway)',
    )
    return parser.parse_args()


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Put what the command line says into the config."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        cfg.optim_wrapper.update(type='cae_mm.MixedPrecisionOptimWrapper', dtype='auto')
        cfg.optim_wrapper.pop('loss_scale', None)
    if args.resume == 'auto' and cfg.get('load_from'):
        hooks = [hook.get('type') for hook in cfg.get('custom_hooks') or ()]
        if 'cae_mm.SafeLoadHook' not in hooks:  # mmengine would resume from load_from
            raise ValueError(
                '--resume beside a load_from: whether the run begins with that or goes on is '
                "decided by dict(type='cae_mm.SafeLoadHook'), add it to custom_hooks"
            )
        cfg.resume = 'auto'
    elif args.resume == 'auto':
        cfg.resume, cfg.load_from = True, None
    elif args.resume:
        cfg.resume, cfg.load_from = True, args.resume
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise ValueError(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    return cfg


def main() -> None:
    """Build the Runner and train."""
    args = parse_args()
    cfg = merge_args(load_run_config(args), args)
    runner = RUNNERS.build(cfg)
    runner.train()


if __name__ == '__main__':
    main()
