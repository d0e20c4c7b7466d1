"""CAE from nothing in a few minutes: tokenizer, pretraining, pictures, evaluation.

    python tools/demo.py              # or: make demo

Crops of photographs that scikit-image and scikit-learn ship are the data, grayscale and with
brightness and contrast evened out, so that neither tells the photographs apart. Held-out crops
come from a part of each photograph that is never trained on.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image

from cae_mm.engine.cli import load_config
from cae_mm.evaluation.quick_probe import QuickProbe
from cae_mm.precision import choose_precision
from cae_mm.visualization.reconstruction import paint_files
from cae_mm.visualization.sheet import save_sheet

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = (
    'astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field ihc moon '
    'motorcycle_left retina rocket china flower'
).split()
PLACES = (
    Path(skimage.__file__).parent / 'data',
    Path(sklearn.__file__).parent / 'datasets' / 'images',
)
SIDE = 400  # pixels of a photograph's short side
CROP = 80  # pixels of a saved crop
SPLITS = {'train': (0.0, 0.65, 120), 'val': (0.65, 1.0, 30)}  # from, to (of width), crops
SHOWN = 'astronaut/003 camera/005 chelsea/000 coins/002 motorcycle_left/003 rocket/002'.split()
NEIGHBORS = 10


def make_crops(folder: Path) -> None:
    """Write train/PHOTOGRAPH/*.png and val/PHOTOGRAPH/*.png, always the same ones."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        [path] = (path for place in PLACES for path in place.glob(f'{name}.*g'))
        photograph = Image.open(path).convert('L')
        scale = SIDE / min(photograph.size)
        photograph = photograph.resize([round(side * scale) for side in photograph.size])
        W, H = photograph.size
        for split, (begin, end, count) in SPLITS.items():
            target = folder / split / name
            target.mkdir(parents=True)
            for i in range(count):
                side = rng.integers(CROP, 140)
                left = rng.integers(int(begin * W), int(end * W) - side + 1)
                top = rng.integers(H - side + 1)
                crop = photograph.crop((left, top, left + side, top + side)).resize((CROP, CROP))
                pixels = np.asarray(crop, dtype=np.float64)
                pixels = 128 + 50 * (pixels - pixels.mean()) / max(pixels.std(), 10)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target / f'{i:03}.png')


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

    print(f'[1/4] crops of {len(PHOTOGRAPHS)} photographs -> {folder / "crops"}')
    make_crops(folder / 'crops')
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
        f'\nWhich of {len(PHOTOGRAPHS)} photographs is a held-out crop from? '
        f'{NEIGHBORS} nearest neighbours, chance {1 / len(PHOTOGRAPHS):.1%}:\n'
        f'  random encoder      {accuracies[0]:.1%}\n'
        f'  pretrained encoder  {accuracies[1]:.1%}\n'
        f'picture     {picture}\nlog         {log}\ncheckpoint  {checkpoint}'
    )


if __name__ == '__main__':
    main()
