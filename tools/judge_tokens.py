"""Judge a tokenizer in minutes: tokens in use, error of painting, what tokens tell of classes.

python tools/judge_tokens.py CONFIG --train FOLDER \
    --cfg-options model.target_generator.init_cfg.checkpoint=FILE
"""

import argparse
import json

from cae_mm.engine.cli import add_config_arguments, add_device_argument, load_config
from cae_mm.evaluation.tokens import judge_tokens


def main() -> None:
    """Judge, and print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_arguments(parser, 'of a pretraining with tokens; its tokenizer is judged')
    parser.add_argument(
        '--train',
        required=True,
        help='training images, one sub-folder per class; a fifth is held out. Never validation '
        'images, where tokenizers are to be chosen',
    )
    parser.add_argument('--max-images', type=int, help='at most so many; default: all')
    parser.add_argument('--seed', type=int, default=0, help='of the part that is held out')
    add_device_argument(parser)
    parser.add_argument('--num-workers', type=int, help='default: one for each core')
    args = parser.parse_args()
    figures = judge_tokens(
        load_config(args.config, args.cfg_options),
        args.train,
        max_images=args.max_images,
        seed=args.seed,
        device=args.device,
        num_workers=args.num_workers,
    )
    print(json.dumps(figures, indent=2))


if __name__ == '__main__':
    main()
