"""Evaluate a checkpoint of a probe, of fine-tuning or of a downstream model.

python tools/test.py CONFIG CHECKPOINT [--out metrics.json] [--dump predictions.pkl]
torchrun --nproc-per-node 8 tools/test.py CONFIG CHECKPOINT --launcher pytorch
"""

import argparse

import mmengine
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from cae_mm.engine.cli import add_common_arguments, load_config


def parse_args() -> argparse.Namespace:
    """Read the command line; the options are those of mmpretrain's tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='weights to evaluate')
    parser.add_argument('--out', help='write the metrics to this .json file')
    parser.add_argument('--dump', help='write all predictions to this .pkl file')
    parser.add_argument('--show-dir', help='paint predictions into this folder')
    return parser.parse_args()


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Put what the command line says into the config."""
    if cfg.get('test_dataloader') is None:
        raise ValueError(
            f'{args.config} has no test_dataloader: it describes pretraining, which is judged by '
            'the configs of probes and fine-tuning'
        )
    cfg.load_from = args.checkpoint
    if args.dump:
        evaluators = cfg.test_evaluator
        evaluators = [evaluators] if isinstance(evaluators, dict) else evaluators
        cfg.test_evaluator = [*evaluators, dict(type='DumpResults', out_file_path=args.dump)]
    if args.show_dir:
        hooks = cfg.default_hooks
        hooks.setdefault('visualization', dict(type='VisualizationHook'))
        hooks.visualization.update(enable=True, out_dir=args.show_dir)
    return cfg


def main() -> None:
    """Build the Runner and evaluate."""
    args = parse_args()
    cfg = merge_args(load_config(args), args)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    metrics = runner.test()
    if args.out and is_main_process():
        mmengine.dump(metrics, args.out, indent=2)


if __name__ == '__main__':
    main()
