"""Evaluate a checkpoint of a probe, of fine-tuning or of a downstream model.

python tools/test.py CONFIG CHECKPOINT [--out metrics.json] [--dump predictions.pkl]
    [--show-dir PICTURES]
torchrun --nproc-per-node 8 tools/test.py CONFIG CHECKPOINT --launcher pytorch
"""

import argparse
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import RUNNERS

from cae_mm.engine.cli import add_run_arguments, load_run_config


def parse_args() -> argparse.Namespace:
    """Read the command line; the options are those of mmpretrain's tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_arguments(parser)
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
        paint_into(args.show_dir, cfg)
    return cfg


def paint_into(folder: str, cfg: Config) -> None:
    """Switch on the hook that paints predictions, each package's in its own way."""
    # mmdet puts a relative folder below the work directory, and below itself with each image
    folder = str(Path(folder).absolute())
    hooks = {
        'mmpretrain': dict(type='VisualizationHook', enable=True, interval=1, out_dir=folder),
        'mmseg': dict(type='SegVisualizationHook', draw=True, interval=1),
        'mmdet': dict(type='DetVisualizationHook', draw=True, test_out_dir=folder),
    }
    scope = cfg.get('default_scope')
    if scope not in hooks:
        raise ValueError(f'--show-dir: default_scope must be one of {[*hooks]}, not {scope!r}')
    shown = cfg.default_hooks.get('visualization', {})
    cfg.default_hooks.visualization = dict(shown, **hooks[scope])
    if scope == 'mmseg':  # its hook leaves pictures to the visualizer
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend', img_save_dir=folder)]


def main() -> None:
    """Build the Runner and evaluate."""
    args = parse_args()
    cfg = merge_args(load_run_config(args), args)
    runner = RUNNERS.build(cfg)
    metrics = runner.test()
    if args.out and is_main_process():
        mmengine.dump(metrics, args.out, indent=2)


if __name__ == '__main__':
    main()
