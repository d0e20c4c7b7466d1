"""CAE from nothing in a few minutes: tokenizer, pretraining, pictures, evaluation.

    python tools/demo.py              # or: make demo

Crops of photographs that scikit-image and scikit-learn ship are the data: see
``cae_mm/datasets/photographs.py``.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cae_mm.datasets.photographs import cut_crops, shipped_photographs
from cae_mm.engine.cli import load_config
from cae_mm.evaluation.quick_probe import QuickProbe
from cae_mm.precision import choose_precision
from cae_mm.visualization.reconstruction import paint_files
from cae_mm.visualization.sheet import save_sheet

ROOT = Path(__file__).parent.parent
SHOWN = 'astronaut/003 camera/005 chelsea/000 coins/002 motorcycle_left/003 rocket/002'.split()
NEIGHBORS = 10


def train(name: str, work_dir: Path, seed: int) -> Path:
    """Train a config of configs/demo as a user would, and return its last checkpoint."""
    command = [sys.executable, 'tools/train.py', f'configs/demo/{name}.py']
    command += ['--work-dir', str(work_dir), '--cfg-options', f'randomness.seed={seed}']
    print('$ python', *command[1:], flush=True)
    # the log goes to a file anyway; the progress bar is on stderr
    environment = os.environ | {'PYTHONWARNINGS': 'ignore'}
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    return Path(os.path.relpath((work_dir / 'last_checkpoint').read_text()))


def main() -> None:
    """Run all steps and say where everything lies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=0)
    seed = parser.parse_args().seed
    os.chdir(ROOT)
    folder = Path('work_dirs/demo')

    photographs = shipped_photographs()
    print(f'[1/4] crops of {len(photographs)} photographs -> {folder / "crops"}')
    cut_crops(photographs, folder / 'crops')
    print('[2/4] a tokenizer of 256 tokens learns to paint the crops')
    print(f'precision: {choose_precision()}')
    train('dvae_demo', folder / 'dvae', seed)
    print('[3/4] CAE learns to predict the tokens and the latents of masked patches')
    checkpoint = train('cae_demo', folder / 'cae', seed)

    print('[4/4] evaluation and pictures')
    cfg = load_config('configs/demo/cae_demo.py')
    accuracies = []
    for weights in ('random', checkpoint):
        probe = QuickProbe(
            cfg=cfg,
            checkpoint=weights,
            train=folder / 'crops' / 'train',
            val=folder / 'crops' / 'val',
            out=folder / 'probe' / Path(weights).stem,
            features=['mean'],
            probes=['knn'],
            k=[NEIGHBORS],
            seed=seed,
        )
        accuracies.append(probe.run()['results']['mean']['knn'][NEIGHBORS])
    shown = [folder / 'crops' / 'val' / f'{name}.png' for name in SHOWN]
    picture = folder / 'reconstruction.png'
    painted = paint_files(cfg, checkpoint, shown, seed=seed)
    save_sheet([*zip(*painted.values(), strict=True)], picture, titles=[*painted])
    log = max((folder / 'cae').glob('*/*.log'))
    print(
        f'\nWhich of {len(photographs)} photographs is a held-out crop from? '
        f'{NEIGHBORS} nearest neighbours, chance {1 / len(photographs):.1%}:\n'
        f'  random encoder      {accuracies[0]:.1%}\n'
        f'  pretrained encoder  {accuracies[1]:.1%}\n'
        f'picture     {picture}\nlog         {log}\ncheckpoint  {checkpoint}'
    )


if __name__ == '__main__':
    main()
