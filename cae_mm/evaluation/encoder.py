"""The encoder that a config describes, and its features of whole images."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from cae_mm.checkpoints import load_pretrained
from cae_mm.models import CAEDataPreprocessor, CAEViT
from cae_mm.patches import to_pair
from cae_mm.precision import choose_precision

FEATURES = ('cls', 'mean')
RANDOM = 'random'
# Of the images that a CPU encodes at a time, 20 of 224 px. Beyond, activations are so large (32 MB)
# that glibc takes each anew from the system: 1.4 times as slow with 64 images, measured.
MAX_PIXELS_ON_CPU = 2**20


class Encoder:
    """A backbone with what its config says of its images.

    Features are of the last of its ``out_indices``, the last block by default.

    Args:
        backbone: A ``CAEViT``, or a backbone of mmpretrain that returns raw tokens or maps.
        cfg: Its config.
        features: Which features to return: 'cls', the class token, or 'mean', the mean over
            the patch tokens (of a convolutional net: over the map); of the last block after the
            final norm.
        precision: Of matrix products and convolutions, see ``choose_precision``.
    """

    def __init__(
        self, backbone: nn.Module, cfg: Config, features: Sequence[str], precision: str = 'auto'
    ) -> None:
        for name in features:
            if name not in FEATURES:
                raise ValueError(f"Unknown feature '{name}': choose one of {FEATURES}")
        self.backbone, self.cfg, self.features = backbone, cfg, tuple(features)
        self.size = read_size(cfg)
        self.device = next(backbone.parameters()).device
        self.normalizer = read_normalizer(cfg).to(self.device)
        self.precision = choose_precision(self.device.type, precision)
        # mmpretrain's backbones of masked pretraining mask their input unless told otherwise
        takes_mask = 'mask' in inspect.signature(backbone.forward).parameters
        self._whole_images = {'mask': None} if takes_mask else {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of a batch; the backbone must be in eval mode.

        Args:
            images: uint8 tensor with shape (B, 3, H, W), BGR.

        Returns:
            float32 tensor with shape (B, F, D), the features in the order of ``features``.
        """
        return torch.cat([self._pool(*self._encode(part)) for part in self._split(images)])

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """Return the patch tokens of a batch in row-major order, of a convolutional net its map.

        Takes what ``__call__`` takes and returns a float32 tensor with shape (B, N, D).
        """
        encoded = map(self._encode, self._split(images))
        return torch.cat([tokens[:, extra:].float() for tokens, extra in encoded])

    def _split(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.device.type != 'cpu':
            return (images,)
        return images.split(max(MAX_PIXELS_ON_CPU // images[0, 0].numel(), 1))

    def _encode(self, images: Tensor) -> tuple[Tensor, int]:
        """Tokens (B, L, D), and how many of them, the first ones, are of no patch."""
        x = self.normalizer({'inputs': images})['inputs'][0]
        with self.precision.autocast(self.device.type):
            if isinstance(self.backbone, CAEViT):
                tokens, extra = self.backbone(x, out_type='raw')[-1], 1
            else:
                tokens = self.backbone(x, **self._whole_images)[-1]
                extra = getattr(self.backbone, 'num_extra_tokens', 0)
        if tokens.ndim not in (3, 4) or not tokens.is_floating_point():
            raise ValueError(
                f'{type(self.backbone).__name__} returns neither tokens nor a map, but '
                f'{tokens.dtype} of shape {tuple(tokens.shape)}: use the config of a classifier'
            )
        if tokens.ndim == 4:  # a map
            tokens, extra = tokens.flatten(2).mT, 0  # [B, HW, D]
        return tokens, extra

    def _pool(self, tokens: Tensor, extra: int) -> Tensor:
        if 'cls' in self.features and not extra:
            name = type(self.backbone).__name__
            raise ValueError(f"{name} has no class token: use the feature 'mean'")
        pooled = {'cls': tokens[:, 0].float(), 'mean': tokens[:, extra:].float().mean(1)}
        return torch.stack([pooled[feature] for feature in self.features], dim=1)


def load_encoder(
    cfg: Config,
    checkpoint: str | Path,
    *,
    features: Sequence[str],
    precision: str = 'auto',
    device: str = 'cpu',
    **loading: Any,
) -> Encoder:
    """Build an ``Encoder`` with the weights of a checkpoint, in eval mode, and try it.

    ``loading`` are other options of ``load_backbone``. The model of ``cfg`` is a ``cae_mm.CAE``, or
    one with a CAEViT or a backbone of mmpretrain as ``backbone``: a classifier, a pretraining.
    """
    backbone: Any = load_backbone(cfg, checkpoint, **loading)
    if hasattr(backbone, 'out_type'):  # of mmpretrain's transformers
        backbone.out_type = 'raw'
    backbone.to(device)
    backbone.eval()  # a statement of its own, since mmpretrain's transformers return None
    encoder = Encoder(backbone, cfg, features, precision)
    encoder(torch.zeros(1, 3, *encoder.size, dtype=torch.uint8))  # say now what does not fit
    return encoder


def load_backbone(
    cfg: Config, checkpoint: str | Path, prefix: str = 'backbone.', seed: int = 0
) -> nn.Module:
    """Build ``model.backbone`` with the weights of a checkpoint instead of its ``init_cfg``.

    Keys of the file begin with ``prefix``; a checkpoint 'random' is a new initialisation by
    ``seed``.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmpretrain')):
        torch.manual_seed(seed)
        backbone = MODELS.build(_backbone_options(cfg))
    if checkpoint != RANDOM:
        load_pretrained(backbone, checkpoint, prefix)
    else:
        quiet_init(backbone)
    return backbone


def quiet_init(model: Any) -> None:
    """Initialise weights without mmengine's report, four lines for each parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    model.init_weights()
    logger.setLevel(level)


def read_size(cfg: Config) -> tuple[int, int]:
    """Height and width in pixels that the backbone of a config is made for, default 224."""
    return to_pair(_backbone_options(cfg).get('img_size', 224))


def read_normalizer(cfg: Config) -> CAEDataPreprocessor:
    """Make what normalises BGR images (view 1 in pretraining) as a config says.

    Reads ``model.data_preprocessor`` or ``data_preprocessor`` of mmpretrain, mmseg and mmdet; a
    ``cae_mm.CAE`` that names none has the defaults of ``CAEDataPreprocessor``.
    """
    said = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    options = {name: said[name] for name in ('mean', 'std', 'to_rgb') if name in said}
    kind = said.get('type') if said else cfg.model.type
    if kind not in ('cae_mm.CAEDataPreprocessor', 'cae_mm.CAE'):
        if not {'mean', 'std'} <= options.keys():
            raise ValueError(
                f'{_name(cfg)} has no data_preprocessor with mean and std: without them features '
                'would be of images that the encoder was not trained on'
            )
        options.setdefault('to_rgb', said.get('bgr_to_rgb', False))  # as mmseg and mmdet call it
    return CAEDataPreprocessor(**options)


def _backbone_options(cfg: Config) -> dict[str, Any]:
    options = cfg.get('model', {}).get('backbone')
    if options is None:
        raise ValueError(f'{_name(cfg)} has no model.backbone')
    return {key: value for key, value in options.items() if key != 'init_cfg'}


def _name(cfg: Config) -> str:
    return f'the config {cfg.filename}' if cfg.filename else 'the config of this run'
