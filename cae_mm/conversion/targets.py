"""Networks of other projects that take our weights."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from cae_mm.checkpoints import EncoderDescription
from cae_mm.conversion.rules import Rule
from cae_mm.conversion.sources import HUGGINGFACE, MMPRETRAIN, TIMM


class Target:
    """Another project that has a network of its own to compare with.

    Attributes:
        rules: Its table.
        parts: What of our model it has a place for.
        needs_norm: Whether its network always has a final norm.
        suffix: Of the file that is written; '' for a folder.
    """

    rules: list[Rule]
    parts: tuple[str, ...] = ('backbone', 'head')
    needs_norm = True
    suffix = ''

    def build(self, d: EncoderDescription, classes: int) -> nn.Module:
        """Make the network, with a classifier if there are ``classes``."""
        raise NotImplementedError

    def features(self, network: Any, images: Tensor, pooled: bool) -> Tensor:
        """Return its tokens for images, or the normalised mean of the patch tokens."""
        raise NotImplementedError

    def write(self, network: Any, place: Path) -> str:
        """Write weights and network, and say how they are loaded."""
        raise NotImplementedError


class MMPretrain(Target):
    """A ``BEiTViT``, alone or in a classifier."""

    rules, needs_norm, suffix = MMPRETRAIN, False, '.pth'

    def build(self, d: EncoderDescription, classes: int) -> nn.Module:
        """Make the backbone from a config, which is kept to be printed."""
        importlib.import_module('mmpretrain.models')
        config = dict(
            type='mmpretrain.BEiTViT',
            arch=dict(
                embed_dims=d.embed_dims,
                num_layers=d.depth,
                num_heads=d.num_heads,
                feedforward_channels=int(d.embed_dims * d.mlp_ratio),
            ),
            img_size=d.img_size,
            patch_size=d.patch_size,
            in_channels=d.in_channels,
            norm_cfg=dict(type='LN', eps=1e-6),
            final_norm=d.final_norm and not d.pooled_norm,
            out_type='avg_featmap' if d.pooled_norm else 'raw',
            use_abs_pos_emb=True,
            use_rel_pos_bias=d.use_rel_pos_bias,
        )
        network: Any = nn.Module()
        network.config = config
        network.backbone = MODELS.build(config)
        if classes:
            network.head = nn.Module()
            network.head.fc = nn.Linear(d.embed_dims, classes)
        return network

    def features(self, network: Any, images: Tensor, pooled: bool) -> Tensor:
        """Return what its ``out_type`` is set to."""
        return network.backbone(images)[0]

    def write(self, network: Any, place: Path) -> str:
        """Write a ``.pth``."""
        torch.save({'state_dict': network.state_dict(), 'meta': {}}, place)
        init_cfg = dict(type='Pretrained', checkpoint=str(place), prefix='backbone.')
        return f'backbone={network.config | dict(init_cfg=init_cfg)}'


class Timm(Target):
    """A ``Beit``."""

    rules = TIMM

    def build(self, d: EncoderDescription, classes: int) -> nn.Module:
        """Make a ``Beit`` of any size."""
        return _require('timm').create_model(
            'beit_base_patch16_224',  # the class is Beit; all of its sizes are given below
            pretrained=False,
            img_size=d.img_size,
            patch_size=d.patch_size,
            in_chans=d.in_channels,
            embed_dim=d.embed_dims,
            depth=d.depth,
            num_heads=d.num_heads,
            mlp_ratio=d.mlp_ratio,
            init_values=0.1,
            use_abs_pos_emb=True,
            use_rel_pos_bias=d.use_rel_pos_bias,
            global_pool='avg' if d.pooled_norm else 'token',
            num_classes=classes,
        )

    def features(self, network: Any, images: Tensor, pooled: bool) -> Tensor:
        """Return what comes before the classifier."""
        tokens = network.forward_features(images)
        return network.forward_head(tokens, pre_logits=True) if pooled else tokens

    def write(self, network: Any, place: Path) -> str:
        """Write a folder with config.json."""
        models = importlib.import_module('timm.models')
        models.save_for_hf(network, place, safe_serialization=True)
        return f"timm.create_model('local-dir:{place}', pretrained=True)"


class HuggingFace(Target):
    """A ``BeitModel``, which has no classifier."""

    rules, parts = HUGGINGFACE, ('backbone',)

    def build(self, d: EncoderDescription, classes: int) -> nn.Module:
        """Make a ``BeitModel``, of square images."""
        if d.img_size[0] != d.img_size[1]:
            raise ValueError("Hugging Face's BeitModel takes square images only")
        transformers = _require('transformers')
        config = transformers.BeitConfig(
            hidden_size=d.embed_dims,
            num_hidden_layers=d.depth,
            num_attention_heads=d.num_heads,
            intermediate_size=int(d.embed_dims * d.mlp_ratio),
            image_size=d.img_size[0],
            patch_size=d.patch_size,
            num_channels=d.in_channels,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
            use_absolute_position_embeddings=True,
            use_relative_position_bias=d.use_rel_pos_bias,
            use_mean_pooling=d.pooled_norm,
        )
        return transformers.BeitModel(config)

    def features(self, network: Any, images: Tensor, pooled: bool) -> Tensor:
        """Return one of its two outputs."""
        output = network(images)
        return output.pooler_output if pooled else output.last_hidden_state

    def write(self, network: Any, place: Path) -> str:
        """Write a folder with config.json."""
        network.save_pretrained(place)
        return f"transformers.BeitModel.from_pretrained('{place}')"


TARGETS: dict[str, Target] = {
    'mmpretrain': MMPretrain(),
    'timm': Timm(),
    'huggingface': HuggingFace(),
}


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for this: pip install -c constraints/onedl.txt '.[export]' "
            '(constraints/openmmlab.txt with the upstream packages)'
        ) from error
