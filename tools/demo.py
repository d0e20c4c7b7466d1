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
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS, MODELS, DefaultScope
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cae_mm.checkpoints import load_pretrained
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
    return Path((work_dir / 'last_checkpoint').read_text())


def load_views(cfg: Config, folder: Path, count: int | None = None) -> dict:
    """Load held-out crops whole, in the two views of the config, with masks and labels.

    Args:
        cfg: The pretraining config.
        folder: With one sub-folder per photograph.
        count: Number of crops, spread over the photographs; None for all.
    """
    load, _, crop, mask, pack = cfg.train_dataloader.dataset.pipeline
    crop = dict(crop, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    dataset = DATASETS.build(
        dict(
            type='mmpretrain.CustomDataset',
            data_prefix=str(folder),
            pipeline=[dict(load), crop, dict(mask), dict(pack)],
        )
    )
    indices = np.linspace(0, len(dataset) - 1, count or len(dataset)).astype(int)
    np.random.seed(0)
    return default_collate([dataset[i] for i in indices])


@torch.no_grad()
def extract_features(model: torch.nn.Module, views: Tensor) -> np.ndarray:
    """Mean of the patch tokens of each image, shape (images, D)."""
    tokens = []
    for batch in views.split(128):
        inputs = model.data_preprocessor({'inputs': [batch]})['inputs']
        tokens.append(model.extract_feat(inputs)[0][:, 1:].mean(1))
    return torch.cat(tokens).cpu().numpy()


def classify(model: torch.nn.Module, train_batch: dict, val_batch: dict) -> float:
    """Share of held-out crops that k nearest neighbours assign to the right photograph."""
    features = [extract_features(model, b['inputs'][0]) for b in (train_batch, val_batch)]
    labels = [[s.gt_label.item() for s in b['data_samples']] for b in (train_batch, val_batch)]
    mean, std = features[0].mean(0), features[0].std(0) + 1e-6
    features = [(f - mean) / std for f in features]
    knn = KNeighborsClassifier(NEIGHBORS, metric='cosine', weights='distance')
    return knn.fit(features[0], labels[0]).score(features[1], labels[1])


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
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
        crops = {split: load_views(cfg, folder / 'crops' / split) for split in SPLITS}
        shown = load_views(cfg, folder / 'crops' / 'val', PICTURES)
    model.init_weights()
    model.to(device).eval()
    random_accuracy = classify(model, crops['train'], crops['val'])
    load_pretrained(model, checkpoint)
    accuracy = classify(model, crops['train'], crops['val'])
    masks = torch.stack([sample.mask for sample in shown['data_samples']]).flatten(1)
    picture = folder / 'reconstruction.png'
    save_pictures(
        paint_reconstruction(model, shown['inputs'], masks, model.target_generator), picture
    )
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
