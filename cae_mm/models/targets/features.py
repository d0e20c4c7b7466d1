"""Features of a given vision model as targets, as in CAE v2: the model stays as it is.

References:
    CAE v2: https://arxiv.org/abs/2211.09799
    Official code: https://github.com/Atten4Vis/CAE/tree/master/project/CAEv2
"""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor

from cae_mm.checkpoints.files import read_checkpoint
from cae_mm.checkpoints.pretrained import compare_keys, find_file, log_match
from cae_mm.patches import Grid, gather_tokens
from cae_mm.registry import MODELS

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureTarget(BaseModule):
    """Features that a frozen model has of the patches of view 2, one vector for each patch.

    View 2 is the crop of view 1 at the size at which the model's grid is the encoder's:
    ``second_size`` is ``patch_size`` times the grid. It comes in [0, 1] (``second_mean=0``,
    ``second_std=255``) and is normalised here as the model wants it.

    Args:
        width: Length of a feature.
        patch_size: Pixels of view 2 for each feature, along each side.
        mean: Of the images that the model was trained on, in [0, 1], RGB.
        std: Likewise.
        layer_norm: Whether each feature is brought to mean 0 and variance 1.
    """

    view = 1
    mean: Tensor  # [3, 1, 1]
    std: Tensor

    def __init__(
        self,
        width: int,
        *,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        layer_norm: bool,
    ) -> None:
        super().__init__()
        self.width = width
        self.patch_size = patch_size
        self.layer_norm = layer_norm
        self.register_buffer('mean', torch.tensor(mean).view(3, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(3, 1, 1))

    def out_dims(self, patch_size: int) -> int:
        """Values to predict for a patch."""
        return self.width

    @abstractmethod
    def encode_features(self, images: Tensor) -> Tensor:
        """Features of all patches of normalised images: (B, 3, h, w) -> (B, N, K)."""

    @torch.no_grad()
    def targets(self, images: Tensor, ids: Tensor, grid: Grid) -> Tensor:
        """Features of the patches ``ids``, float32 (B, M, K); images (B, 3, h, w) in [0, 1]."""
        size = tuple(side * self.patch_size for side in grid)
        if tuple(images.shape[2:]) != size:
            seen, view = (f'{h}x{w}' for h, w in (grid, images.shape[2:]))
            raise ValueError(
                f'the encoder sees {seen} patches, and {type(self).__name__} needs '
                f'{self.patch_size} pixels for each, but the second view is {view}: '
                f'set second_size={size}'
            )
        features = self.encode_features((images - self.mean) / self.std)  # [B, N, K]
        features = gather_tokens(features, ids).float()  # [B, M, K]
        return F.layer_norm(features, features.shape[-1:]) if self.layer_norm else features


@MODELS.register_module()
class CAEFeatures(FeatureTarget):
    """Features of a ``CAEViT``, of a first round for example, behind its final norm.

    Args:
        backbone: The encoder, whose ``init_cfg`` names its checkpoint (and ``prefix``).
        patch_size: The encoder's.
        mean: See ``FeatureTarget``. What the checkpoint says of its images comes before it; other
            projects' files say nothing. ImageNet's by default, as in our recipes.
        std: Likewise.
        layer_norm: See ``FeatureTarget``.
    """

    def __init__(
        self,
        *,
        backbone: dict[str, Any],
        patch_size: int,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        layer_norm: bool = False,
    ) -> None:
        encoder = MODELS.build(backbone)
        _check_patch_size(self, patch_size, encoder.patch_size)
        super().__init__(
            encoder.embed_dims, patch_size=patch_size, mean=mean, std=std, layer_norm=layer_norm
        )
        self.backbone = encoder

    def init_weights(self) -> None:
        """Load the encoder's weights, and normalise images as their file says."""
        super().init_weights()
        if not self.backbone.init_cfg:
            message = 'CAEFeatures.backbone has no init_cfg: its random weights make poor targets'
            print_log(message, 'current', logging.WARNING)
            return
        path = find_file(self.backbone.init_cfg['checkpoint'], type(self).__name__)
        description = read_checkpoint(path).description
        if description is None or description.mean is None or description.std is None:
            message = f'{path} does not say how its images were normalised: CAEFeatures.mean counts'
            print_log(message, 'current', logging.WARNING)
            return
        if not description.to_rgb:
            raise ValueError(f'{path} was made with BGR images, CAEFeatures reads RGB')
        for buffer, values in ((self.mean, description.mean), (self.std, description.std)):
            buffer.copy_(torch.tensor(values).view(3, 1, 1) / 255)

    def encode_features(self, images: Tensor) -> Tensor:
        """See the base class."""
        return self.backbone.forward_features(images)[:, 1:]


class ForeignFeatures(FeatureTarget):
    """Features of a model of another package, with its weights from one file."""

    model: Any
    checkpoint: str | Path
    unused: tuple[str, ...]  # prefixes of keys of the file that the model does without

    def init_weights(self) -> None:
        """Load the weights strictly; nothing of the file is executed."""
        path = find_file(self.checkpoint, type(self).__name__, 'Download the weights first')
        state = read_checkpoint(path).state
        kept = {k: v for k, v in state.items() if not k.startswith(self.unused)}
        match = compare_keys(self.model.state_dict(), kept)
        if match.problems:
            raise ValueError(f'{path} does not fit {type(self).__name__}: {match.explanation}')
        self.model.load_state_dict(match.matched)
        log_match(self, match, path)
        mean, std = (buffer.flatten().tolist() for buffer in (self.mean, self.std))
        print_log(f'{type(self).__name__}: images have mean={mean}, std={std}', 'current')


@MODELS.register_module()
class TimmFeatures(ForeignFeatures):
    """Features of the last stage of a model of timm, without class and register tokens.

    Args:
        name: What ``timm.create_model`` calls it, with its tag, which tells mean and std.
        checkpoint: Its ``model.safetensors``; a classifier in it is left out.
        patch_size: Pixels for each of its features: its patches, or stride of the last stage.
        options: More of ``timm.create_model``. Transformers that shall see another size than their
            own need ``dict(dynamic_img_size=True)``.
        layer_norm: See ``FeatureTarget``.
    """

    def __init__(
        self,
        *,
        name: str,
        checkpoint: str,
        patch_size: int,
        options: dict[str, Any] | None = None,
        layer_norm: bool = False,
    ) -> None:
        timm = _import('timm', self)
        if not timm.is_model(name):
            raise ValueError(f"timm has no model '{name}': see timm.list_models()")
        model = timm.create_model(name, pretrained=False, num_classes=0, **(options or {}))
        if not hasattr(model, 'forward_intermediates'):
            raise ValueError(f'TimmFeatures: {name} of timm gives no maps (forward_intermediates)')
        last, cfg = model.feature_info[-1], model.pretrained_cfg
        _check_patch_size(self, patch_size, last['reduction'])
        super().__init__(
            last['num_chs'],
            patch_size=patch_size,
            mean=cfg['mean'],
            std=cfg['std'],
            layer_norm=layer_norm,
        )
        self.model, self.checkpoint = model, checkpoint
        classifier = cfg['classifier'] or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        self.unused = tuple(f'{name}.' for name in names)

    def encode_features(self, images: Tensor) -> Tensor:
        """See the base class."""
        [maps] = self.model.forward_intermediates(
            images, indices=1, norm=True, output_fmt='NCHW', intermediates_only=True
        )  # [B, K, h/p, w/p]
        return maps.flatten(2).transpose(1, 2)


@MODELS.register_module()
class CLIPFeatures(ForeignFeatures):
    """Features of CLIP's visual tower, from a folder of transformers' (Hugging Face's).

    As in CAE v2's official code all patches go through the final norm and the projection into
    the space that images share with texts.

    Args:
        folder: With ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, of all of
            CLIP or of the visual tower with its projection. ``preprocessor_config.json`` tells mean
            and std, CLIP's own where there is none.
        patch_size: The model's.
        layer_norm: See ``FeatureTarget``.
    """

    unused = ('text_', 'logit_scale', 'vision_model.embeddings.position_ids')

    def __init__(self, *, folder: str, patch_size: int, layer_norm: bool = False) -> None:
        transformers = _import('transformers', self)
        advice = "model.target_generator.folder is to be one of transformers', with CLIP in it"
        path = find_file(f'{folder}/config.json', 'CLIPFeatures', advice).parent
        config = transformers.CLIPVisionConfig.from_pretrained(path)
        _check_patch_size(self, patch_size, config.patch_size)
        processor = transformers.CLIPImageProcessor
        described = (path / 'preprocessor_config.json').is_file()
        images = processor.from_pretrained(path) if described else processor()
        super().__init__(
            config.projection_dim,
            patch_size=patch_size,
            mean=images.image_mean,
            std=images.image_std,
            layer_norm=layer_norm,
        )
        self.model = transformers.CLIPVisionModelWithProjection(config)
        files = [path / 'model.safetensors', path / 'pytorch_model.bin']
        self.checkpoint = next(filter(Path.is_file, files), files[0])

    def encode_features(self, images: Tensor) -> Tensor:
        """See the base class."""
        tower, size = self.model.vision_model, self.model.config.image_size
        resized = tuple(images.shape[2:]) != (size, size)
        options = dict(interpolate_pos_encoding=True) if resized else {}  # not in transformers 4.41
        tokens = tower(images, **options).last_hidden_state[:, 1:]  # [B, N, D]
        return self.model.visual_projection(tower.post_layernorm(tokens))


def _check_patch_size(target: Any, given: int, own: int) -> None:
    if given != own:
        raise ValueError(
            f'{type(target).__name__}.patch_size is {given}, but the model has a feature for each '
            f'{own}x{own} pixels: set model.target_generator.patch_size={own}'
        )


def _import(package: str, target: Any) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{type(target).__name__} needs {package}: pip install 'cae-mm[export]'"
        ) from error
