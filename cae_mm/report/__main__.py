"""Write one HTML page, which needs no other file, of a run or of several side by side.

python -m cae_mm.report WORK_DIR [WORK_DIR ...] [--probes RESULTS ...] [--base CONFIG] [--out PAGE]
"""

import argparse
import sys
from pathlib import Path

from cae_mm.engine.cli import load_config
from cae_mm.report.page import write_page
from cae_mm.report.probes import find_results
from cae_mm.report.run import Run
from cae_mm.report.values import flatten


def main(argv: list[str] | None = None) -> None:
    """Read the command line and write the page."""
    parser = argparse.ArgumentParser(
        prog='python -m cae_mm.report', description=__doc__.splitlines()[0]
    )
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR')
    parser.add_argument(
        '--probes',
        nargs='+',
        default=[],
        type=Path,
        metavar='RESULTS',
        help='results.json of tools/quick_probe.py, or folders of them, beside those in WORK_DIR',
    )
    parser.add_argument(
        '--base',
        help='config that those of the runs are compared with; default: with several runs, with '
        'each other, else with the config of this name in configs/',
    )
    parser.add_argument('--out', type=Path, default=Path('report.html'), help='page to write')
    args = parser.parse_args(argv)
    base = flatten(load_config(args.base).to_dict()) if args.base else None
    runs = [Run(folder) for folder in args.work_dirs]
    problems = write_page(runs, find_results(args.probes), args.out, base)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(args.out)


if __name__ == '__main__':
    main()
