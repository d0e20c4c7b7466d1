"""Judge an encoder in minutes: nearest neighbours and linear classifiers on cached features.

python tools/quick_probe.py CONFIG CHECKPOINT --train FOLDER --val FOLDER
python tools/quick_probe.py CONFIG random --train FOLDER --val FOLDER     # what to compare with
"""

import argparse

from rich.console import Console

from cae_mm.engine.cli import add_config_arguments, add_device_argument, load_config
from cae_mm.evaluation.encoder import FEATURES
from cae_mm.evaluation.quick_probe import POOLED, PROBES, QuickProbe, make_table
from cae_mm.precision import PRECISIONS


def parse_args() -> argparse.Namespace:
    """Read the command line; what is not given is left to ``QuickProbe``."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS
    )
    add_config_arguments(parser, 'of the pretraining, or of a model with this backbone')
    parser.add_argument('checkpoint', help="its weights, or 'random'")
    parser.add_argument('--train', required=True, help='folder with one sub-folder per class')
    parser.add_argument('--val', required=True, help='the same, images to report on')
    parser.add_argument('--out', help='where features and results go; default in work_dirs/')
    parser.add_argument('--feature', choices=[*FEATURES, 'both'], default='both')
    parser.add_argument('--probes', nargs='+', choices=PROBES, help=f'default: {" ".join(POOLED)}')
    parser.add_argument('--k', nargs='+', type=int, help='of the neighbours, default 10 20')
    parser.add_argument('--epochs', type=int, help='of the linear probe, default 100')
    parser.add_argument('--seed', type=int, help='default 0')
    parser.add_argument('--prefix', help="of the encoder's keys in the file, default 'backbone.'")
    add_device_argument(parser)
    parser.add_argument(
        '--precision', choices=PRECISIONS, help='default: what the device does fast'
    )
    parser.add_argument('--batch-size', type=int, help='default 64')
    parser.add_argument('--num-workers', type=int, help='default: one for each core')
    return parser.parse_args()


def main() -> None:
    """Extract, probe, print and write down."""
    options = vars(parse_args())
    cfg = load_config(options.pop('config'), options.pop('cfg_options', None))
    feature = options.pop('feature')
    probe = QuickProbe(cfg=cfg, features=FEATURES if feature == 'both' else [feature], **options)
    report = probe.run()
    Console().print(make_table(report))
    for name, probes in report['results'].items():
        if values := probes.get('logreg', {}).get('not_converged'):
            print(
                f'{name}: logistic regression did not converge for C in {values}, '
                'its accuracy may be a little low'
            )
    print(f'all numbers: {probe.folder / "results.json"}')


if __name__ == '__main__':
    main()
