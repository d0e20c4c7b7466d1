"""Say what a run is going to take before it starts: operations, memory, images/s, hours.

python tools/plan.py CONFIG [--gpus N] [--cfg-options settings.img_size=128 ...]
torchrun --nproc-per-node 8 tools/plan.py CONFIG --gpus 8 --launcher pytorch
"""

import argparse
import sys
from pathlib import Path

from mmengine.dist import is_main_process
from rich.console import Console

from cae_mm.doctor.case import Machine
from cae_mm.engine.cli import add_config_arguments
from cae_mm.plan.plan import make_plan
from cae_mm.plan.report import show


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument(
        '--gpus', type=int, help='of the run, 0: a CPU; default: WORLD_SIZE or what is here'
    )
    parser.add_argument('--images', type=int, help='in the training set, if it is not here')
    parser.add_argument('--steps', type=int, default=3, help='updates to take the time of')
    parser.add_argument('--no-measure', action='store_true', help='count only')
    parser.add_argument(
        '--tflops',
        type=float,
        nargs='+',
        default=[],
        help='that each GPU does, for the hours on GPUs that are not here',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
        help='measure with several processes',
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Plan and print; returns 1 if the run could not start."""
    args = parse_args()
    options = dict(args.cfg_options or {}, launcher=args.launcher)
    steps = 0 if args.no_measure else args.steps
    try:
        plan = make_plan(
            Path(args.config), Machine.detect(args.gpus), options, images=args.images, steps=steps
        )
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    if is_main_process():
        Console().print(show(plan, args.tflops))
    return 0


if __name__ == '__main__':
    sys.exit(main())
