"""Write weights of this project as another one stores them, after comparing features.

python tools/export_checkpoint.py SOURCE OUT --target mmpretrain|timm|huggingface|official
    [--part encoder|full] [--num-heads N] [--img-size H W] [--pool token|avg]
"""

import argparse
import sys
from pathlib import Path

from cae_mm.conversion.convert import PARTS
from cae_mm.conversion.export import Export, export_checkpoint
from cae_mm.conversion.rules import print_counts
from cae_mm.conversion.targets import TARGETS


def print_report(result: Export, target: str) -> None:
    """Print what became of each key, how features compare, and how the result is loaded."""
    print_counts(f'{result.path} for {target}', result.counts, result.remarks)
    for dtype, error in result.errors.items():
        print(f'features in {dtype} differ by {error:.2g} of the largest')
    if not result.errors:
        print('converted back, all weights are bit for bit the same')
    print(f'written: {result.path}\ncard:    {result.card}\nload it: {result.usage}')


def main(argv: list[str] | None = None) -> int:
    """Export one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path, metavar='SOURCE', help='our checkpoint')
    parser.add_argument(
        'out', type=Path, metavar='OUT', help="file or folder to write; the name gets the part's"
    )
    parser.add_argument('--target', choices=TARGETS, required=True)
    parser.add_argument('--part', choices=PARTS, help='default: all that the target has')
    parser.add_argument('--num-heads', type=int, help='where the file does not tell')
    parser.add_argument('--img-size', type=int, nargs=2, help='where the file does not tell')
    parser.add_argument(
        '--pool',
        choices=('token', 'avg'),
        help='what the final norm is applied to, where the file does not tell: each token '
        '(pretraining), or the mean of the patch tokens (fine-tuning)',
    )
    args = parser.parse_args(argv)
    try:
        result = export_checkpoint(
            args.checkpoint,
            args.out,
            args.target,
            part=args.part,
            num_heads=args.num_heads,
            img_size=tuple(args.img_size) if args.img_size else None,
            pooled=None if args.pool is None else args.pool == 'avg',
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print_report(result, args.target)
    return 0


if __name__ == '__main__':
    sys.exit(main())
