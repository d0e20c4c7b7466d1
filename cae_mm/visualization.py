"""Pictures that show what CAE makes of an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from cae_mm.models import CAE
from cae_mm.models.targets.rgb import RGBTarget, patch_statistics
from cae_mm.patches import split_mask

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
    ids_m = split_mask(masks)[1].to(image.device)  # [B, M]
    hidden = _masks_as_images(masks, grid, image)
    pictures = {'image': image, 'masked': image.where(~hidden, torch.full_like(image, GRAY))}
    predicted = model.reconstruct(inputs[0], masks)  # [B, M, K]
    if isinstance(generator, RGBTarget):
        if generator.norm_patch:  # only the true patch tells its brightness and contrast
            mean, std = patch_statistics(RGBTarget().targets(inputs[0], ids_m, grid))
            predicted = predicted * std + mean
        painted = _denormalize(model, _paint_patches(predicted, ids_m, grid, inputs[0]), 0)
        pictures['predicted'] = painted.where(hidden, image)
    else:
        tokens = generator.tokenize(inputs[1])  # [B, h, w]
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


def _paint_patches(pixels: Tensor, ids: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """Put the pixels (B, M, 3*p*p) of the patches ``ids`` into an image that is 0 elsewhere."""
    B, _, K = pixels.shape
    patches = pixels.new_zeros(B, grid[0] * grid[1], K)
    patches.scatter_(1, ids.unsqueeze(-1).expand_as(pixels), pixels)
    patches = patches.view(B, *grid, 3, like.shape[-2] // grid[0], -1)  # [B, h, w, 3, p, p]
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)  # [B, 3, H, W]
