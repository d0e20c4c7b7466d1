"""Make the tokenizer of a second round: clusters of the patch features of a first encoder.

python tools/make_tokenizer.py CONFIG CHECKPOINT --out work_dirs/kmeans/tokenizer.safetensors
"""

import argparse
from pathlib import Path

from cae_mm.conversion.kmeans import VECTORS_OF_A_CENTER, make_tokenizer
from cae_mm.engine.cli import add_config_arguments, add_device_argument, load_config


def main() -> None:
    """Make it, and say how good it is and how a config takes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_arguments(parser, 'of the first round: its encoder, its images')
    parser.add_argument('checkpoint', help="weights of the first round, or 'random'")
    parser.add_argument('--out', type=Path, required=True, help='.safetensors file to write')
    parser.add_argument('--tokens', type=int, default=8192, help='how many; default 8192')
    parser.add_argument('--blocks', type=int, help='of the encoder to keep; default: all')
    help_vectors = f'patches to cluster; default {VECTORS_OF_A_CENTER} for each token'
    parser.add_argument('--vectors', type=int, help=help_vectors)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--prefix', default='backbone.', help="of the encoder's keys in the file")
    add_device_argument(parser)
    args = parser.parse_args()
    if args.out.suffix != '.safetensors':
        parser.error(f'--out is to end with .safetensors, not {args.out.suffix!r}')

    cfg = load_config(args.config, args.cfg_options)
    figures = make_tokenizer(
        cfg,
        args.checkpoint,
        args.out,
        num_tokens=args.tokens,
        blocks=args.blocks,
        vectors=args.vectors,
        seed=args.seed,
        prefix=args.prefix,
        device=args.device,
    )
    print(
        f'{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; of patches that k-means has not '
        f'seen:\n'
        f'  tokens used          {figures["tokens_used"]} of {args.tokens}\n'
        f'  perplexity           {figures["perplexity"]:.1f}\n'
        f'  variance explained   {figures["explained"]:.1%}'
    )


if __name__ == '__main__':
    main()
