"""Pictures that show what CAE makes of an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from torch import Tensor

from cae_mm.checkpoints import load_pretrained
from cae_mm.models import CAE
from cae_mm.models.targets.rgb import RGBTarget, patch_statistics
from cae_mm.models.targets.tokenizer import Tokenizer
from cae_mm.patches import split_mask, to_pair

GRAY = 0.5
DALLE_DECODER = 'cae_ckpt/dalle_decoder.safetensors'
STEPS = (
    'cae_mm.LoadImage',
    'cae_mm.TwoViewResizedCrop',
    'cae_mm.CAEMaskGenerator',
    'mmpretrain.PackInputs',
)


def paint_files(
    cfg: Config,
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    decoder: str | Path = DALLE_DECODER,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run ``paint_reconstruction`` on the largest central crops of image files.

    Config and checkpoint are of a pretraining, not of an encoder alone; ``decoder`` are converted
    weights of DALL-E's, needed for its tokens only; ``seed`` is of the masks.
    """
    if cfg.model.type != 'cae_mm.CAE':
        raise ValueError(f'the config describes {cfg.model.type}, but pictures need cae_mm.CAE')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = MODELS.build(cfg.model)
    _check_paintable(model.target_generator)
    model.target_generator.init_weights()
    load_pretrained(model, checkpoint)
    painter: Any = model.target_generator  # an own d-VAE paints its tokens, pixels need no painter
    if painter.view == 1 and not hasattr(painter, 'decode_tokens'):
        init_cfg = dict(type='Pretrained', checkpoint=decoder)
        painter = MODELS.build(dict(type='cae_mm.DALLEDecoder', init_cfg=init_cfg))
        painter.init_weights()
    batch = _load_batch(cfg, images, seed)
    masks = torch.stack([sample.mask for sample in batch['data_samples']]).flatten(1)  # [B, N]
    model.to(device).eval()
    return paint_reconstruction(model, batch['inputs'], masks, painter.to(device).eval())


@torch.no_grad()
def paint_reconstruction(
    model: CAE, views: Sequence[Tensor], masks: Tensor, painter: Any = None
) -> dict[str, Tensor]:
    """Paint what CAE sees, and what it makes of the rest.

    Args:
        model: In eval mode.
        views: As a data loader returns them: uint8 BGR, shapes (B, 3, H, W) and (B, 3, h, w); the
            second is needed for token targets only.
        masks: Bool tensor on the host, shape (B, N), True = masked.
        painter: For token targets, what paints them: a ``DiscreteVAE``, a ``KMeansTokenizer`` or
            a ``DALLEDecoder``.

    Returns:
        Titles and RGB images in [0, 1], on the host: the image, the masked input, for tokens what
        the true ones look like, and the prediction put into what is visible.
    """
    _check_paintable(model.target_generator)
    preprocessor, generator = model.data_preprocessor, model.target_generator
    inputs = preprocessor({'inputs': list(views)})['inputs']
    image, grid = _denormalize(model, inputs[0], 0), model.backbone.grid
    ids_m = split_mask(masks)[1].to(image.device)  # [B, M]
    hidden = masks.to(image).view(-1, 1, *grid)
    hidden = F.interpolate(hidden, image.shape[-2:]).bool()  # [B, 1, H, W]
    pictures = {'image': image, 'masked': image.masked_fill(hidden, GRAY)}
    predicted = model.reconstruct(inputs[0], masks)  # [B, M, K]
    if isinstance(generator, RGBTarget):
        if generator.norm_patch:  # only the true patch tells its brightness and contrast
            mean, std = patch_statistics(RGBTarget().targets(inputs[0], ids_m, grid))
            predicted = predicted * std + mean
        patches = predicted.new_zeros(*masks.shape, predicted.shape[-1])
        patches.scatter_(1, ids_m.unsqueeze(-1).expand_as(predicted), predicted)
        p = model.backbone.patch_size
        painted = F.fold(patches.transpose(1, 2), image.shape[-2:], p, stride=p)  # [B, 3, H, W]
        pictures['predicted'] = _denormalize(model, painted, 0).where(hidden, image)
    else:
        view = generator.view
        tokens = generator.tokenize(inputs[view])  # [B, h, w]
        guess = tokens.flatten(1).scatter(1, ids_m, predicted.argmax(-1)).view_as(tokens)
        pictures['true tokens'] = _denormalize(model, painter.decode_tokens(tokens), view)
        pictures['predicted tokens'] = _denormalize(model, painter.decode_tokens(guess), view)
    return {title: picture.clamp(0, 1).cpu() for title, picture in pictures.items()}


def save_pictures(pictures: dict[str, Tensor], path: str | Path) -> None:
    """Save what was painted as PNG: a row for each image, a column for each title."""
    rows, columns = len(next(iter(pictures.values()))), len(pictures)
    size = (2 * columns, 2 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
    for column, (title, images) in zip(axes.T, pictures.items(), strict=True):
        column[0].set_title(title)
        for cell, image in zip(column, images, strict=True):
            cell.imshow(image.permute(1, 2, 0).numpy(), interpolation='nearest')
            cell.axis('off')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _check_paintable(target: Any) -> None:
    if not isinstance(target, RGBTarget | Tokenizer):
        raise ValueError(
            f'what a {type(target).__name__} makes of an image cannot be painted: pictures need '
            'pixels or tokens as targets'
        )


def _denormalize(model: CAE, image: Tensor, view: int) -> Tensor:
    preprocessor = model.data_preprocessor
    return (image.float() * preprocessor.stds[view] + preprocessor.means[view]) / 255


def _load_batch(cfg: Config, images: Sequence[str | Path], seed: int) -> dict[str, Any]:
    """Images in the views of a pretraining config: central crop, no flip, random masks."""
    steps = {step['type']: dict(step) for step in cfg.train_dataloader.dataset.pipeline}
    for name in STEPS:
        if name not in steps:
            raise ValueError(f'the pipeline of the config has no {name}')
    steps['cae_mm.LoadImage']['on_error'] = 'raise'
    crop = steps['cae_mm.TwoViewResizedCrop']
    height, width = to_pair(crop['size'])
    crop.update(central=True, ratio=(width / height,) * 2)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose([TRANSFORMS.build(steps[name]) for name in STEPS])
    np.random.seed(seed)
    return default_collate([pipeline(dict(img_path=str(path))) for path in images])
