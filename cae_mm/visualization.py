"""Pictures that show what CAE makes of an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from cae_mm.models import CAE
from cae_mm.models.layers import split_mask
from cae_mm.models.targets.rgb import RGBTarget, patch_statistics

GRAY = 0.5


@torch.no_grad()
def paint_reconstruction(
    model: CAE, views: Sequence[Tensor], masks: Tensor, painter: Any = None
) -> dict[str, Tensor]:
    """Paint what CAE sees, and what it makes of the rest.

    Args:
        model: In eval mode.
        views: As a data loader gives them: uint8 BGR, shapes (B, 3, H, W) and (B, 3, h, w); the
            second is needed for token targets only.
        masks: Bool tensor on the host, shape (B, N), True = masked.
        painter: For token targets, what paints them: a ``DiscreteVAE`` or a ``DALLEDecoder``.

    Returns:
        Titles and RGB images in [0, 1], on the host: the image, the masked input, for tokens what
        the true ones give, and the prediction put into what is visible.
    """
    preprocessor, generator = model.data_preprocessor, model.target_generator
    inputs = preprocessor({'inputs': list(views)})['inputs']
    image, grid = _denormalize(model, inputs[0], 0), model.backbone.grid
    hidden = _masks_as_images(masks, grid, image)
    pictures = {'image': image, 'masked': image.where(~hidden, torch.full_like(image, GRAY))}
    predicted = model.reconstruct(inputs[0], masks)  # [B, M, K]
    if isinstance(generator, RGBTarget):
        if generator.norm_patch:  # only the true patch tells its brightness and contrast
            true = RGBTarget().targets(inputs[0], split_mask(masks)[1].to(image.device), grid)
            mean, std = patch_statistics(true)
            predicted = predicted * std + mean
        filled = _fill_patches(model, inputs[0], masks, predicted)
        pictures['predicted'] = _denormalize(model, filled, 0)
    else:
        tokens = generator.tokenize(inputs[1])  # [B, h, w]
        ids_m = split_mask(masks)[1].to(tokens.device)
        guess = tokens.flatten(1).scatter(1, ids_m, predicted.argmax(-1)).view_as(tokens)
        pictures['true tokens'] = _denormalize(model, painter.decode_tokens(tokens), 1)
        pictures['predicted tokens'] = _denormalize(model, painter.decode_tokens(guess), 1)
    return {title: picture.clamp(0, 1).cpu() for title, picture in pictures.items()}


def save_pictures(pictures: dict[str, Tensor], path: str | Path) -> None:
    """Save a table of images as PNG: a row for each image, a column for each title.

    Args:
        pictures: From ``paint_reconstruction``.
        path: Where to; parents are made.
    """
    rows, columns = len(next(iter(pictures.values()))), len(pictures)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2 * columns, 2 * rows + 0.4), squeeze=False, layout='constrained'
    )
    for j, (title, images) in enumerate(pictures.items()):
        axes[0, j].set_title(title)
        for i, image in enumerate(images):
            axes[i, j].imshow(image.permute(1, 2, 0).numpy(), interpolation='nearest')
            axes[i, j].axis('off')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _denormalize(model: CAE, image: Tensor, view: int) -> Tensor:
    preprocessor = model.data_preprocessor
    return (image.float() * preprocessor.stds[view] + preprocessor.means[view]) / 255


def _masks_as_images(masks: Tensor, grid: tuple[int, int], image: Tensor) -> Tensor:
    """Enlarge masks (B, N) to bool images (B, 1, H, W)."""
    masks = masks.to(image.device).view(-1, 1, *grid)
    patch = image.shape[-2] // grid[0]
    return masks.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def _fill_patches(model: CAE, image: Tensor, masks: Tensor, pixels: Tensor) -> Tensor:
    """Put predicted pixels (B, M, 3*p*p) into the masked patches of ``image``."""
    (h, w), p = model.backbone.grid, model.backbone.patch_size
    B = len(image)
    patches = image.new_zeros(B, h * w, 3 * p * p)
    patches[masks.to(image.device)] = pixels.flatten(0, 1).to(image.dtype)
    filled = patches.view(B, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
    return image.where(~_masks_as_images(masks, (h, w), image), filled)
