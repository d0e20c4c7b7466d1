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
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from reconstruct import load_model, make_batch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cae_mm.visualization import paint_reconstruction, save_pictures

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = (
    'astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field ihc moon '
    'motorcycle_left retina rocket china flower'
).split()
SIDE = 400  # pixels of a photograph's short side
CROP = 80  # pixels of a saved crop
SPLITS = {'train': (0.0, 0.65, 120), 'val': (0.65, 1.0, 30)}  # from, to (of width), crops
PICTURES = 8
NEIGHBORS = 10


def make_crops(folder: Path) -> None:
    """Write train/PHOTOGRAPH/*.png and val/PHOTOGRAPH/*.png, always the same ones."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        photograph = Image.open(find_photograph(name)).convert('L')
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


def find_photograph(name: str) -> Path:
    """Return the file that scikit-image or scikit-learn installed."""
    folders = (
        Path(skimage.__file__).parent / 'data',
        Path(sklearn.__file__).parent / 'datasets' / 'images',
    )
    return next(path for folder in folders for path in folder.glob(f'{name}.*g'))


def train(name: str, work_dir: Path, seed: int) -> Path:
    """Train a config of configs/demo as a user would, and return its last checkpoint."""
    command = [sys.executable, str(ROOT / 'tools' / 'train.py')]
    command += [f'configs/demo/{name}.py', '--work-dir', str(work_dir)]
    command += ['--cfg-options', f'randomness.seed={seed}']
    print('$ python', *command[1:], flush=True)
    # the log goes to a file anyway; the progress bar is on stderr
    environment = os.environ | {'PYTHONWARNINGS': 'ignore'}
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    return Path(os.path.relpath((work_dir / 'last_checkpoint').read_text()))


@torch.no_grad()
def extract_features(model: torch.nn.Module, views: Tensor) -> np.ndarray:
    """Mean of the patch tokens of each image, shape (images, D)."""
    tokens = []
    for batch in views.split(128):
        inputs = model.data_preprocessor({'inputs': [batch]})['inputs']
        tokens.append(model.extract_feat(inputs)[0][:, 1:].mean(1))
    return torch.cat(tokens).cpu().numpy()


def classify(model: torch.nn.Module, crops: dict[str, tuple[Tensor, list[str]]]) -> float:
    """Share of held-out crops that k nearest neighbours assign to the right photograph."""
    features = {split: extract_features(model, views) for split, (views, _) in crops.items()}
    mean, std = features['train'].mean(0), features['train'].std(0) + 1e-6
    features = {split: (values - mean) / std for split, values in features.items()}
    knn = KNeighborsClassifier(NEIGHBORS, metric='cosine', weights='distance')
    knn.fit(features['train'], crops['train'][1])
    return knn.score(features['val'], crops['val'][1])


def main() -> None:
    """Run all steps and say where everything lies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=0)
    seed = parser.parse_args().seed
    os.chdir(ROOT)
    folder = Path('work_dirs/demo')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

    print(f'[1/4] crops of {len(PHOTOGRAPHS)} photographs -> {folder / "crops"}')
    make_crops(folder / 'crops')
    print('[2/4] a tokenizer of 256 tokens learns to paint the crops')
    train('dvae_demo', folder / 'dvae', seed)
    print('[3/4] CAE learns to predict the tokens and the latents of masked patches')
    checkpoint = train('cae_demo', folder / 'cae', seed)

    print('[4/4] pictures and evaluation')
    cfg = Config.fromfile('configs/demo/cae_demo.py')
    crops = {}
    for split in SPLITS:
        paths = sorted((folder / 'crops' / split).glob('*/*.png'))
        views = make_batch(cfg, paths, seed)['inputs'][0]
        crops[split] = views, [path.parent.name for path in paths]
    torch.manual_seed(seed)
    random = MODELS.build(cfg.model)
    random.backbone.init_weights()
    random_accuracy = classify(random.to(device).eval(), crops)
    model = load_model(cfg, checkpoint, device)
    accuracy = classify(model, crops)

    shown = make_batch(cfg, paths[:: len(paths) // PICTURES][:PICTURES], seed)
    masks = torch.stack([sample.mask for sample in shown['data_samples']]).flatten(1)
    pictures = paint_reconstruction(model, shown['inputs'], masks, model.target_generator)
    picture = folder / 'reconstruction.png'
    save_pictures(pictures, picture)
    log = max((folder / 'cae').glob('*/*.log'))
    print(
        f'\nWhich of {len(PHOTOGRAPHS)} photographs is a held-out crop from? '
        f'{NEIGHBORS} nearest neighbours, chance {1 / len(PHOTOGRAPHS):.1%}:\n'
        f'  random encoder      {random_accuracy:.1%}\n'
        f'  pretrained encoder  {accuracy:.1%}\n'
        f'picture     {picture}\nlog         {log}\ncheckpoint  {checkpoint}'
    )


if __name__ == '__main__':
    main()
