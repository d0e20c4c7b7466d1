"""All benchmarks beside what they are to reach: make bench.

Each file ``bench_*.py`` runs in a process of its own; its rows are joined in one table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Row, console, describe_machine, print_rows

HERE = Path(__file__).parent


def main() -> None:
    """Run the benchmarks one after the other and print their rows."""
    names = sorted(path.stem.removeprefix('bench_') for path in HERE.glob('bench_*.py'))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', default=names, help=f'some of: {", ".join(names)}')
    parser.add_argument('--rounds', type=int, default=5, help='timed turns of each variant')
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(names)):
        parser.error(f'no benchmark named {", ".join(unknown)}: choose from {", ".join(names)}')

    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            console.rule(name)
            result = Path(folder) / f'{name}.json'
            command = [sys.executable, HERE / f'bench_{name}.py', '--json', result]
            if subprocess.run([*command, '--rounds', str(args.rounds)]).returncode:
                failed.append(name)
            else:
                rows += [Row(**row) for row in json.loads(result.read_text())]
    print_rows(rows, describe_machine())
    if failed:
        sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
