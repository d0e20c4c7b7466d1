"""Paint what CAE makes of images: image, masked input, true and predicted tokens.

python tools/reconstruct.py CONFIG CHECKPOINT IMAGE ... --out reconstruction.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose, default_collate
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope

from cae_mm.checkpoints import load_pretrained
from cae_mm.models import CAE
from cae_mm.patches import to_pair
from cae_mm.visualization import paint_reconstruction, save_pictures

STEPS = (
    'cae_mm.LoadImage',
    'cae_mm.TwoViewResizedCrop',
    'cae_mm.CAEMaskGenerator',
    'mmpretrain.PackInputs',
)


def load_model(cfg: Config, checkpoint: str | Path, device: str) -> CAE:
    """Build the model of a pretraining config with the weights of a checkpoint and its tokenizer.

    Raises:
        ValueError: If the config is not one of CAE, or the weights do not fit.
    """
    if cfg.model.type != 'cae_mm.CAE':
        raise ValueError(f'the config describes {cfg.model.type}, but pictures need cae_mm.CAE')
    model = MODELS.build(cfg.model)
    model.target_generator.init_weights()
    load_pretrained(model, checkpoint)
    return model.to(device).eval()


def load_painter(model: CAE, decoder: str, device: str) -> torch.nn.Module | None:
    """Return what paints the model's tokens: an own d-VAE itself, or DALL-E's decoder."""
    if hasattr(model.target_generator, 'decode_tokens'):
        return model.target_generator
    if model.target_generator.view == 0:  # pixels need no painter
        return None
    painter = MODELS.build(
        dict(type='cae_mm.DALLEDecoder', init_cfg=dict(type='Pretrained', checkpoint=decoder))
    )
    painter.init_weights()
    return painter.to(device).eval()


def make_batch(cfg: Config, images: list[str | Path], seed: int) -> dict:
    """Load images in the views of the config: the largest central crop, no flip, random masks.

    Raises:
        ValueError: If the config's pipeline lacks one of ``STEPS``.
    """
    steps = {step['type']: dict(step) for step in cfg.train_dataloader.dataset.pipeline}
    missing = [name for name in STEPS if name not in steps]
    if missing:
        raise ValueError(f'the pipeline of the config has no {missing[0]}')
    steps['cae_mm.LoadImage']['on_error'] = 'raise'
    crop = steps['cae_mm.TwoViewResizedCrop']
    height, width = to_pair(crop['size'])
    crop.update(central=True, ratio=(width / height,) * 2)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        transforms = [TRANSFORMS.build(steps[name]) for name in STEPS]
    np.random.seed(seed)
    pipeline = Compose(transforms)
    return default_collate([pipeline(dict(img_path=str(path))) for path in images])


def main() -> None:
    """Paint one picture with a row for each image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config of the pretraining')
    parser.add_argument('checkpoint', help='its checkpoint, not an encoder alone')
    parser.add_argument('images', nargs='+', help='image files')
    parser.add_argument('--out', default='reconstruction.png', help='PNG to write')
    parser.add_argument('--seed', type=int, default=0, help='of the masks')
    parser.add_argument(
        '--dalle-decoder',
        default='cae_ckpt/dalle_decoder.safetensors',
        help="for DALL-E's tokens: the converted decoder",
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()

    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = load_model(cfg, args.checkpoint, device)
    painter = load_painter(model, args.dalle_decoder, device)
    batch = make_batch(cfg, args.images, args.seed)
    masks = torch.stack([sample.mask for sample in batch['data_samples']]).flatten(1)
    save_pictures(paint_reconstruction(model, batch['inputs'], masks, painter), args.out)
    print(f'{len(args.images)} images -> {args.out}')


if __name__ == '__main__':
    main()
