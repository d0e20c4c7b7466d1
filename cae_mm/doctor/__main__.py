"""Tells what is wrong and how to fix it, with the installation or with a config.

python -m cae_mm.doctor
python -m cae_mm.doctor CONFIG [CHECKPOINT] [--gpus N] [--cfg-options KEY=VALUE ...]
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from cae_mm.dependencies import check_dependencies
from cae_mm.doctor import installation


def check_config(args: argparse.Namespace) -> int:
    """Prints what is wrong with a config; returns 1 if there is an error, else 0."""
    try:
        check_dependencies()
    except ImportError as error:
        print(error)
        return 1
    report = import_module('cae_mm.doctor.report')  # needs all that was looked for
    return report.main(args.config, args.checkpoint, args.gpus, args.cfg_options)


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 1 if something essential is wrong, else 0."""
    parser = argparse.ArgumentParser(
        prog='python -m cae_mm.doctor', description=__doc__.splitlines()[0]
    )
    parser.add_argument('config', nargs='?', type=Path, help='a config to check')
    parser.add_argument('checkpoint', nargs='?', type=Path, help='weights to start from or to test')
    parser.add_argument(
        '--gpus', type=int, help='GPUs of the run, 0: CPU; default: WORLD_SIZE or what is here'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='as for tools/train.py'
    )
    parser.add_argument(
        '--ckpt-dir', type=Path, default=Path('cae_ckpt'), help='folder of the tokenizer weights'
    )
    args = parser.parse_args(argv)
    if args.config:
        return check_config(args)

    rows, problems = installation.check_packages()
    installation.print_rows('Packages', rows)
    if not any(problem.essential for problem in problems):
        rows, broken = installation.check_registries()
        installation.print_rows('Registry scope cae_mm', rows)
        problems += broken
    installation.print_rows('mmcv with compiled operators', installation.check_operators())
    installation.print_rows('Devices', installation.check_devices())
    title = f'Tokenizer weights in {args.ckpt_dir}'
    installation.print_rows(title, installation.check_weights(args.ckpt_dir))
    print('What is wrong' if problems else 'Nothing is wrong.')
    for problem in problems:
        kind = '' if problem.essential else ' (optional)'
        print(f'  {problem.text}{kind}\n    {problem.command}')
    return int(any(problem.essential for problem in problems))


if __name__ == '__main__':
    sys.exit(main())
