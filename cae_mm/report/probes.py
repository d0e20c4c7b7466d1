"""Results of quick probes, as rows of one table."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cae_mm.evaluation.quick_probe import LABELS


@dataclass
class Probes:
    """Accuracies of one encoder.

    Attributes:
        checkpoint: Its file, or 'random'.
        data: What it was judged on.
        chance: Accuracy of guessing.
        accuracies: By feature and probe.
    """

    checkpoint: str
    data: str
    chance: float
    accuracies: dict[str, float]


def find_results(places: Iterable[Path]) -> list[Path]:
    """List files, and all ``results.json`` in folders.

    Raises:
        FileNotFoundError: If there is none at one of the places.
    """
    found = []
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob('results.json'))
        if not files:
            raise FileNotFoundError(f'{place} has no results.json of tools/quick_probe.py')
        found += files
    return found


def read_probes(path: Path) -> Probes:
    """Read what ``QuickProbe.run`` wrote.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
        accuracies = {}
        for feature, probes in report['results'].items():
            for k, accuracy in probes.get('knn', {}).items():
                accuracies[f'{feature}, kNN, k = {k}'] = float(accuracy)
            for key in [key for key in LABELS if key in probes]:
                accuracies[f'{feature}, {LABELS[key]}'] = float(probes[key]['accuracy'])
        data = f'{report["images"]["val"]} images of {report["folders"]["val"]}'
        return Probes(str(report['checkpoint']), data, float(report['chance']), accuracies)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} is left out, it has no results of probes: {error!r}') from error
