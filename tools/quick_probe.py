"""Judge an encoder in minutes: nearest neighbours and linear classifiers on cached features.

python tools/quick_probe.py CONFIG CHECKPOINT --train FOLDER --val FOLDER
python tools/quick_probe.py CONFIG random --train FOLDER --val FOLDER     # what to compare with
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from rich.console import Console
from rich.table import Table
from torchvision.datasets import ImageFolder

from cae_mm.evaluation import (
    Encoder,
    cached_features,
    check_class_sizes,
    check_neighbors,
    check_same_classes,
    extract_features,
    knn_accuracies,
    labelled_images,
    linear_sweep,
    load_encoder,
    logistic_regression,
    make_fingerprint,
)
from cae_mm.evaluation.encoder import FEATURES, read_size
from cae_mm.evaluation.linear import Split

SPLITS = ('train', 'val')
PROBES = ('knn', 'logreg', 'linear')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='of the pretraining, or of a model with this backbone')
    parser.add_argument('checkpoint', help="its weights, or 'random'")
    parser.add_argument('--train', required=True, help='folder with one sub-folder per class')
    parser.add_argument('--val', required=True, help='the same, images to report on')
    parser.add_argument('--out', help='where features and results go; default in work_dirs/')
    parser.add_argument('--feature', choices=[*FEATURES, 'both'], default='both')
    parser.add_argument('--probes', nargs='+', choices=PROBES, default=PROBES)
    parser.add_argument('--k', nargs='+', type=int, default=[10, 20], help='of the neighbours')
    parser.add_argument('--epochs', type=int, default=100, help='of the linear probe')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--prefix', default='backbone.', help="of the encoder's keys in the file")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--num-workers', type=int, default=2)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    if args.out is None:
        name = f'random-{args.seed}' if args.checkpoint == 'random' else Path(args.checkpoint).stem
        args.out = Path('work_dirs/quick_probe') / f'{Path(args.config).stem}_{name}'
    return args


def load_images(cfg: Config, args: argparse.Namespace) -> dict[str, ImageFolder]:
    """List both folders and check that the probes can work with them."""
    images = {split: labelled_images(getattr(args, split), read_size(cfg)) for split in SPLITS}
    check_same_classes(images['train'], images['val'])
    if 'knn' in args.probes:
        check_neighbors(args.k, len(images['train']))
    if set(args.probes) - {'knn'}:
        check_class_sizes(np.array(images['train'].targets), images['train'].classes)
    return images


def load_features(
    cfg: Config, encoder: Encoder, images: ImageFolder, split: str, args: argparse.Namespace
) -> np.ndarray:
    """Features of a folder, shape (N, F, D), from the cache as far as they are in it."""

    def extract(rows: range) -> Any:
        options = dict(batch_size=args.batch_size, num_workers=args.num_workers)
        title = f'features of {split}'
        return extract_features(encoder, images, rows, title=title, total=len(images), **options)

    folder = Path(args.out) / split
    fingerprint = make_fingerprint(cfg, encoder, images)
    return cached_features(folder, fingerprint, len(images), extract, print)


def run_probes(train: Split, val: Split, args: argparse.Namespace) -> dict[str, Any]:
    """Results of the probes that were asked for, on one kind of features."""
    device = torch.device(args.device)
    results: dict[str, Any] = {}
    if 'knn' in args.probes:
        tensors = (torch.as_tensor(array, device=device) for array in (*train, *val))
        results['knn'] = knn_accuracies(*tensors, ks=args.k)
    if 'logreg' in args.probes:
        results['logreg'] = logistic_regression(train, val, seed=args.seed)
    if 'linear' in args.probes:
        results['linear'] = linear_sweep(
            train, val, seed=args.seed, device=device, epochs=args.epochs
        )
    return results


def make_table(report: dict[str, Any]) -> Table:
    """Accuracies of all features and probes."""
    counts = report['images']
    table = Table(
        title=f'{report["checkpoint"]}: {counts["train"]} training and {counts["val"]} validation '
        f'images of {len(report["classes"])} classes, chance {report["chance"]:.1%} '
        f'(largest class {report["largest_class"]:.1%})'
    )
    for column in ('feature', 'probe', 'setting', 'accuracy'):
        table.add_column(column, justify='right' if column == 'accuracy' else 'left')
    for feature, probes in report['results'].items():
        rows = [('knn', f'k = {k}', accuracy) for k, accuracy in probes.get('knn', {}).items()]
        for name, label, key in (
            ('logreg', 'logistic regression', 'C'),
            ('linear', 'linear probe', 'lr'),
        ):
            if name in probes:
                rows.append((label, f'{key} = {probes[name][key]:g}', probes[name]['accuracy']))
        for probe, setting, accuracy in rows:
            table.add_row(feature, probe, setting, f'{accuracy:.1%}')
    return table


def main() -> None:
    """Extract, probe, print and write down."""
    args = parse_args()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    images = load_images(cfg, args)
    names = FEATURES if args.feature == 'both' else (args.feature,)
    encoder = load_encoder(
        cfg,
        args.checkpoint,
        features=names,
        prefix=args.prefix,
        seed=args.seed,
        device=args.device,
    )
    features = {split: load_features(cfg, encoder, images[split], split, args) for split in SPLITS}
    labels = {split: np.array(images[split].targets) for split in SPLITS}
    results = {}
    for i, name in enumerate(names):
        train, val = ((np.array(features[split][:, i]), labels[split]) for split in SPLITS)
        results[name] = run_probes(train, val, args)
    report = {
        'config': args.config,
        'checkpoint': args.checkpoint,
        'seed': args.seed,
        'folders': {split: getattr(args, split) for split in SPLITS},
        'images': {split: len(images[split]) for split in SPLITS},
        'classes': images['train'].classes,
        'chance': 1 / len(images['train'].classes),
        'largest_class': float(np.bincount(labels['val']).max() / len(labels['val'])),
        'epochs': args.epochs,
        'results': results,
    }
    results_file = Path(args.out) / 'results.json'
    results_file.write_text(json.dumps(report, indent=2) + '\n')
    Console().print(make_table(report))
    for name, probes in results.items():
        if probes.get('logreg', {}).get('not_converged'):
            print(
                f'{name}: logistic regression did not converge for C in '
                f'{probes["logreg"]["not_converged"]}, its accuracy may be a little low'
            )
    print(f'all numbers: {results_file}')


if __name__ == '__main__':
    main()
