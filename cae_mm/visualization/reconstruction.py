"""What CAE predicts for masked patches: pixels, or tokens that their d-VAE paints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor

from cae_mm.evaluation.encoder import quiet_init
from cae_mm.models import CAE, DALLEEncoder
from cae_mm.models.targets.rgb import RGBTarget, patch_statistics
from cae_mm.patches import Grid, split_mask
from cae_mm.visualization.pretraining import build_cae, load_views, load_weights

GRAY = 0.5
DALLE_DECODER = 'cae_ckpt/dalle_decoder.safetensors'


def paint_files(
    cfg: Config,
    checkpoint: str | Path,
    images: Sequence[str | Path],
    *,
    mask_ratios: Sequence[float | None] = (None,),
    decoder: str | Path = DALLE_DECODER,
    device: str = 'cpu',
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run ``paint_reconstruction`` on the largest central crops of image files.

    Args:
        cfg: Of a pretraining.
        checkpoint: Of the same, not of an encoder alone; or 'random'.
        images: Files.
        mask_ratios: Each image is painted with each of them; None is that of the config.
        decoder: Converted weights of DALL-E's, needed for its tokens only.
        device: Where to compute.
        seed: Of the masks, and of a random model.

    Returns:
        As ``paint_reconstruction``; all ratios of the first image, then of the second.
    """
    model = build_cae(cfg, seed)
    painter = find_painter(model, decoder)
    quiet_init(model.target_generator)
    load_weights(model, checkpoint).to(device)
    if painter is not None:
        painter.to(device).eval()
    by_ratio = [
        paint_reconstruction(model, *load_views(cfg, images, seed, ratio), painter)
        for ratio in mask_ratios
    ]
    return {
        title: torch.stack([pictures[title] for pictures in by_ratio], dim=1).flatten(0, 1)
        for title in by_ratio[0]
    }


def find_painter(model: CAE, decoder: str | Path = DALLE_DECODER) -> Any:
    """Return what paints the tokens of a model by ``decode_tokens``, None for pixels.

    Raises:
        ValueError: If its targets cannot be painted, such as features or histograms.
    """
    generator = model.target_generator
    if isinstance(generator, DALLEEncoder):
        init_cfg = dict(type='Pretrained', checkpoint=str(decoder))
        painter = MODELS.build(dict(type='cae_mm.DALLEDecoder', init_cfg=init_cfg))
        painter.init_weights()
        return painter
    if hasattr(generator, 'decode_tokens'):  # DiscreteVAE, KMeansTokenizer
        return generator
    if not isinstance(generator, RGBTarget):
        raise ValueError(
            f'what a {type(generator).__name__} makes of an image cannot be painted: '
            'reconstruction needs pixels or tokens; the other pictures need no targets '
            "(sheets=['attention'] of PictureHook)"
        )
    return None


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
        painter: For token targets, what paints them: see ``find_painter``.

    Returns:
        Titles and RGB images in [0, 1], on the host: the image, the masked input, for tokens what
        the true ones look like, the prediction put into what is visible, and, in its place, what
        the decoder makes of the encoder's own latents of the masked patches, without the regressor
        (paper, figure 4: there of all patches). The two are alike as far as the
        regressor's latents are the encoder's.
    """
    inputs = model.data_preprocessor({'inputs': list(views)})['inputs']
    image, grid = _denormalize(model, inputs[0], 0), model.backbone.grid
    hidden = hidden_pixels(masks, image, grid)
    pictures = {'image': image, 'masked': image.masked_fill(hidden, GRAY)}
    guesses = {
        'predicted': model.reconstruct(inputs[0], masks),  # [B, M, K]
        'no regressor': model.reconstruct(inputs[0], masks, regress=False),
    }
    if isinstance(model.target_generator, RGBTarget):
        for title, guess in guesses.items():
            pictures[title] = _paint_pixels(model, inputs[0], masks, guess).where(hidden, image)
    else:
        view = model.target_generator.view
        tokens = model.target_generator.tokenize(inputs[view])  # [B, h, w]
        pictures['true tokens'] = _denormalize(model, painter.decode_tokens(tokens), view)
        ids_m = split_mask(masks)[1].to(image.device)  # [B, M]
        for title, guess in guesses.items():
            guessed = tokens.flatten(1).scatter(1, ids_m, guess.argmax(-1)).view_as(tokens)
            pictures[title] = _denormalize(model, painter.decode_tokens(guessed), view)
    return {title: picture.clamp(0, 1).cpu() for title, picture in pictures.items()}


def hidden_pixels(masks: Tensor, pictures: Tensor, grid: Grid) -> Tensor:
    """Pixels of masked patches, bool (B, 1, H, W), of masks (B, N) of pictures (B, 3, H, W)."""
    return F.interpolate(masks.to(pictures).view(-1, 1, *grid), pictures.shape[-2:]).bool()


def _paint_pixels(model: CAE, image: Tensor, masks: Tensor, guess: Tensor) -> Tensor:
    """Put predicted pixels of masked patches, (B, M, K), where they belong: (B, 3, H, W)."""
    ids_m = split_mask(masks)[1].to(image.device)  # [B, M]
    if model.target_generator.norm_patch:  # only the true patch tells its brightness and contrast
        mean, std = patch_statistics(RGBTarget().targets(image, ids_m, model.backbone.grid))
        guess = guess * std + mean
    patches = guess.new_zeros(*masks.shape, guess.shape[-1])
    patches.scatter_(1, ids_m.unsqueeze(-1).expand_as(guess), guess)
    p = model.backbone.patch_size
    painted = F.fold(patches.transpose(1, 2), image.shape[-2:], p, stride=p)  # [B, 3, H, W]
    return _denormalize(model, painted, 0)


def _denormalize(model: CAE, image: Tensor, view: int) -> Tensor:
    preprocessor = model.data_preprocessor
    return (image.float() * preprocessor.stds[view] + preprocessor.means[view]) / 255
