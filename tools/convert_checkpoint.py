"""Turn CAE weights of another project into a safetensors file with our names.

python tools/convert_checkpoint.py SOURCE OUT [--source official|mmpretrain|passl|timm|huggingface]
    [--part encoder|full] [--num-heads N] [--decoder-heads N]
"""

import argparse
import sys
from pathlib import Path

from cae_mm.conversion.convert import PARTS, Conversion, convert_checkpoint
from cae_mm.conversion.rules import print_counts
from cae_mm.conversion.sources import SOURCES


def print_report(result: Conversion) -> None:
    """Print what became of each key, what was assumed, and the sizes."""
    print_counts(f'{result.source} -> {result.path}', result.counts, result.remarks)
    for part in ('encoder', 'neck'):
        if part in result.metadata:
            print(f'{part}:', ', '.join(f'{k} {v}' for k, v in result.metadata[part].items()))
    print(f'{len(result.state)} tensors written to {result.path}')


def main(argv: list[str] | None = None) -> int:
    """Convert one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path, metavar='SOURCE', help='file or folder to read')
    parser.add_argument(
        'out', type=Path, metavar='OUT', help="file or folder to write; the name gets the part's"
    )
    parser.add_argument('--source', choices=SOURCES, help='default: guessed from the keys')
    parser.add_argument('--part', choices=PARTS, help='default: all that the file has')
    parser.add_argument('--num-heads', type=int, help='heads of the encoder')
    parser.add_argument('--decoder-heads', type=int, help='heads of regressor and decoder')
    args = parser.parse_args(argv)
    try:
        result = convert_checkpoint(
            args.checkpoint,
            args.out,
            source=args.source,
            part=args.part,
            num_heads=args.num_heads,
            decoder_heads=args.decoder_heads,
        )
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print_report(result)
    return 0


if __name__ == '__main__':
    sys.exit(main())
