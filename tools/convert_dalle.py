"""Turn the published weights of DALL-E's d-VAE into safetensors: ``convert_dalle.py encoder.pkl``.

Nothing in the files is run: see ``cae_mm.conversion.dalle``.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from cae_mm.conversion.dalle import PUBLISHED, DALLEConversion, convert_dalle


def print_report(source: Path, result: DALLEConversion) -> None:
    """Print sizes, and what identifies the written file."""
    data = result.path.read_bytes()
    print(f'{source}: DALL-E {result.part}, {len(result.state)} tensors')
    print('  ' + _list(result.sizes))
    if any(PUBLISHED[name] != size for name, size in result.sizes.items()):
        print(f'  not the published network, which has {_list(PUBLISHED)}')
    print(f'  {result.path}: {len(data)} bytes\n  sha256 {hashlib.sha256(data).hexdigest()}')


def _list(sizes: dict[str, int]) -> str:
    return ', '.join(f'{name} {size}' for name, size in sizes.items())


def main(argv: list[str] | None = None) -> int:
    """Convert each file; the first bad one ends it with status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sources', nargs='+', type=Path, metavar='SOURCE')
    parser.add_argument('--out-dir', type=Path, default=Path('cae_ckpt'))
    args = parser.parse_args(argv)
    try:
        for source in args.sources:
            print_report(source, convert_dalle(source, args.out_dir))
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
