"""A pretraining's model and images, from its config and checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from torch import Tensor

from cae_mm.checkpoints import load_pretrained
from cae_mm.engine.settings import find_datasets
from cae_mm.evaluation.encoder import RANDOM, quiet_init
from cae_mm.models import CAE
from cae_mm.patches import to_pair

STEPS = (
    'cae_mm.LoadImage',
    'cae_mm.TwoViewResizedCrop',
    'cae_mm.CAEMaskGenerator',
    'mmpretrain.PackInputs',
)


def build_cae(cfg: Config, seed: int = 0) -> CAE:
    """Build the CAE of a pretraining config with initial weights by ``seed``."""
    if cfg.model.type != 'cae_mm.CAE':
        raise ValueError(
            f'{cfg.filename} describes {cfg.model.type}, but this picture needs the config of a '
            'pretraining, of cae_mm.CAE'
        )
    torch.manual_seed(seed)
    return MODELS.build(cfg.model)


def load_weights(model: CAE, checkpoint: str | Path) -> CAE:
    """Load a pretraining's checkpoint, or initialise ('random'); the tokenizer has its own file."""
    if checkpoint == RANDOM:
        quiet_init(model.backbone)
        quiet_init(model.neck)
    else:
        load_pretrained(model, checkpoint)
    return model.eval()


def load_views(
    cfg: Config, images: Sequence[str | Path], seed: int, mask_ratio: float | None = None
) -> tuple[list[Tensor], Tensor]:
    """Read images as a pretraining does, but the largest central crops, none mirrored.

    Args:
        cfg: Of the pretraining; of several datasets the first one's pipeline.
        images: Files.
        seed: Of the masks.
        mask_ratio: In place of that of the config.

    Returns:
        Views, uint8 BGR with shapes (B, 3, H, W) and (B, 3, h, w), as far as the config makes
        them, and masks, bool (B, N).
    """
    *_, dataset = find_datasets(dict(train_dataloader=cfg.train_dataloader))
    steps: dict[str, Any] = {s['type']: dict(s) for s in dataset.get('pipeline') or ()}
    for name in STEPS:
        if name not in steps:
            raise ValueError(f'the pipeline of the config has no {name}')
    steps['cae_mm.LoadImage']['on_error'] = 'raise'
    if mask_ratio is not None:
        steps['cae_mm.CAEMaskGenerator']['mask_ratio'] = mask_ratio
    crop = steps['cae_mm.TwoViewResizedCrop']
    height, width = to_pair(crop['size'])
    crop.update(central=True, ratio=(width / height,) * 2, flip_prob=0.0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose([TRANSFORMS.build(steps[name]) for name in STEPS])
    np.random.seed(seed)
    batch = default_collate([pipeline(dict(img_path=str(path))) for path in images])
    masks = torch.stack([sample.mask for sample in batch['data_samples']])
    return batch['inputs'], masks.flatten(1)
