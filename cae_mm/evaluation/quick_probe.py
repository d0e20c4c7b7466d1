"""An encoder judged in minutes: nearest neighbours and linear classifiers on cached features."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from rich.table import Table
from torchvision.datasets import ImageFolder

from cae_mm.evaluation.attentive import attentive_sweep
from cae_mm.evaluation.encoder import FEATURES, RANDOM, Encoder, load_encoder, read_size
from cae_mm.evaluation.features import cached_features, check_same_classes, labelled_images
from cae_mm.evaluation.knn import check_neighbors, knn_accuracies
from cae_mm.evaluation.linear import Split, check_class_sizes, linear_sweep, logistic_regression

ATTENTIVE_EPOCHS = 30
LABELS = {
    'logreg': 'logistic regression',
    'linear': 'linear probe',
    'attentive': 'attentive probe',
}
POOLED = ('knn', 'logreg', 'linear')  # of class token or mean
PROBES = (*POOLED, 'attentive')


@dataclass(frozen=True, kw_only=True)
class QuickProbe:
    """What to judge, and how."""

    cfg: Config  # of the pretraining, or of a model with this backbone
    checkpoint: str | Path  # its weights, or 'random'
    train: str | Path  # folder with one sub-folder per class
    val: str | Path  # the same, images to report on
    out: str | Path | None = None  # where features and results go; None: in work_dirs/quick_probe
    features: Sequence[str] = FEATURES
    probes: Sequence[str] = POOLED
    k: Sequence[int] = (10, 20)  # numbers of neighbours
    epochs: int = 100  # of the linear probe
    seed: int = 0  # of a random encoder, the held-out part and the linear probe
    prefix: str = 'backbone.'  # of the encoder's keys in the checkpoint
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    precision: str = 'auto'  # see ``choose_precision``
    batch_size: int = 64  # of feature extraction
    num_workers: int | None = None  # see ``extract_features``

    @property
    def folder(self) -> Path:
        """Where features and results go."""
        if self.out is not None:
            return Path(self.out)
        is_random = self.checkpoint == RANDOM
        path = Path(self.checkpoint)
        name = f'random-{self.seed}' if is_random else f'{path.absolute().parent.name}_{path.stem}'
        return Path('work_dirs/quick_probe') / f'{Path(self.cfg.filename or "config").stem}_{name}'

    def run(self) -> dict[str, Any]:
        """Check everything, extract features, judge them; return what is in ``results.json``."""
        size = read_size(self.cfg)
        train, val = (labelled_images(folder, size) for folder in (self.train, self.val))
        check_same_classes(train, val)
        if 'knn' in self.probes:
            check_neighbors(self.k, len(train))
        if set(self.probes) - {'knn'}:
            check_class_sizes(np.array(train.targets), train.classes)
        encoder = load_encoder(
            self.cfg,
            self.checkpoint,
            features=self.features,
            prefix=self.prefix,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
        )
        print(f'features in {encoder.precision}')
        results: dict[str, Any] = {}
        if set(self.probes) & set(POOLED):
            fit_to, judge_on = self._load(encoder, train, 'train'), self._load(encoder, val, 'val')
            for i, name in enumerate(self.features):
                splits = ((np.array(array[:, i]), labels) for array, labels in (fit_to, judge_on))
                results[name] = self._judge(*splits)
        if 'attentive' in self.probes:
            result = attentive_sweep(
                self._load(encoder, train, 'train', patches=True),
                self._load(encoder, val, 'val', patches=True),
                seed=self.seed,
                device=self.device,
                epochs=ATTENTIVE_EPOCHS,
            )
            results['patches'] = {'attentive': result}
        report = {
            'config': self.cfg.filename,
            'checkpoint': str(self.checkpoint),
            'seed': self.seed,
            'precision': str(encoder.precision.dtype).removeprefix('torch.'),
            'folders': {'train': str(self.train), 'val': str(self.val)},
            'images': {'train': len(train), 'val': len(val)},
            'classes': train.classes,
            'chance': 1 / len(train.classes),
            'largest_class': float(np.bincount(val.targets).max() / len(val)),
            'epochs': {'linear': self.epochs, 'attentive': ATTENTIVE_EPOCHS},
            'results': results,
        }
        (self.folder / 'results.json').write_text(json.dumps(report, indent=2) + '\n')
        return report

    def _load(
        self, encoder: Encoder, images: ImageFolder, name: str, patches: bool = False
    ) -> Split:
        """Features with their labels, from the cache as far as they are in it."""
        name = f'{name}_patches' if patches else name
        array = cached_features(
            self.folder / name,
            encoder,
            images,
            patches=patches,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            title=f'features of {name}',
        )
        return array, np.array(images.targets)

    def _judge(self, train: Split, val: Split) -> dict[str, Any]:
        """Results of the probes on one kind of features."""
        results: dict[str, Any] = {}
        if 'knn' in self.probes:
            tensors = (torch.as_tensor(array, device=self.device) for array in (*train, *val))
            results['knn'] = knn_accuracies(*tensors, ks=self.k)
        if 'logreg' in self.probes:
            results['logreg'] = logistic_regression(train, val, seed=self.seed)
        if 'linear' in self.probes:
            results['linear'] = linear_sweep(
                train, val, seed=self.seed, device=self.device, epochs=self.epochs
            )
        return results


def make_table(report: dict[str, Any]) -> Table:
    """Accuracies of all features and probes, as a table of rich."""
    counts = report['images']
    table = Table(
        title=f'{report["checkpoint"]}: {counts["train"]} training and {counts["val"]} validation '
        f'images of {len(report["classes"])} classes, chance {report["chance"]:.1%} '
        f'(largest class {report["largest_class"]:.1%})'
    )
    for column in ('feature', 'probe', 'setting', 'accuracy'):
        table.add_column(column, justify='right' if column == 'accuracy' else 'left')
    for feature, probes in report['results'].items():
        for k, accuracy in probes.get('knn', {}).items():
            table.add_row(feature, 'knn', f'k = {k}', f'{accuracy:.1%}')
        for name, label in LABELS.items():
            if result := probes.get(name):
                key = 'C' if name == 'logreg' else 'lr'
                setting = f'{key} = {result[key]:g}'
                table.add_row(feature, label, setting, f'{result["accuracy"]:.1%}')
    return table
