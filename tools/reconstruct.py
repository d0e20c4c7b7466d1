"""Paint what CAE makes of images: image, masked input, true and predicted tokens.

python tools/reconstruct.py CONFIG CHECKPOINT IMAGE ... --out reconstruction.png
"""

import argparse

from cae_mm.engine.cli import add_config_arguments, load_config
from cae_mm.visualization import DALLE_DECODER, paint_files, save_pictures


def main() -> None:
    """Paint one picture with a row for each image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_arguments(parser, 'config of the pretraining')
    parser.add_argument('checkpoint', help='its checkpoint, not an encoder alone')
    parser.add_argument('images', nargs='+', help='image files')
    parser.add_argument('--out', default='reconstruction.png', help='PNG to write')
    parser.add_argument('--seed', type=int, default=0, help='of the masks')
    parser.add_argument(
        '--dalle-decoder',
        default=DALLE_DECODER,
        help="for DALL-E's tokens: the converted decoder",
    )
    args = parser.parse_args()

    cfg = load_config(args.config, args.cfg_options)
    pictures = paint_files(
        cfg, args.checkpoint, args.images, decoder=args.dalle_decoder, seed=args.seed
    )
    save_pictures(pictures, args.out)
    print(f'{len(args.images)} images -> {args.out}')


if __name__ == '__main__':
    main()
