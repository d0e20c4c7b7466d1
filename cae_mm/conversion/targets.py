"""Networks of other projects that take our weights."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from cae_mm.checkpoints import EncoderDescription
from cae_mm.conversion.rules import Rule
from cae_mm.conversion.sources import HUGGINGFACE, MMPRETRAIN, TIMM


class Network(NamedTuple):
    """Another project's network, which our features are compared with."""

    module: nn.Module
    features: Callable[[Tensor], Tensor]  # its tokens, or the normalised mean of the patch tokens
    write: Callable[[Path], str]  # writes weights and network, and says how they are loaded


class Target(NamedTuple):
    """Another project that has a network of its own."""

    rules: list[Rule]
    build: Callable[[EncoderDescription, int], Network]  # with a classifier if there are classes
    places: tuple[str, ...] = ('backbone', 'head')  # parts of our model that it takes
    needs_norm: bool = True  # whether its network always has a final norm
    suffix: str = ''  # of the file that is written; '' for a folder


def _build_mmpretrain(d: EncoderDescription, classes: int) -> Network:
    """Make a ``BEiTViT``, alone or in a classifier."""
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
    backbone = MODELS.build(config)
    model = nn.ModuleDict({'backbone': backbone})
    if classes:
        model['head'] = nn.ModuleDict({'fc': nn.Linear(d.embed_dims, classes)})

    def write(place: Path) -> str:
        torch.save({'state_dict': model.state_dict(), 'meta': {}}, place)
        init_cfg = dict(type='Pretrained', checkpoint=str(place), prefix='backbone.')
        return f'backbone={config | dict(init_cfg=init_cfg)}'

    return Network(model, lambda images: backbone(images)[0], write)


def _build_timm(d: EncoderDescription, classes: int) -> Network:
    """Make a ``Beit`` of any size."""
    timm = _require('timm')
    model = timm.create_model(
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

    def features(images: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        return model.forward_head(tokens, pre_logits=True) if d.pooled_norm else tokens

    def write(place: Path) -> str:
        timm.models.save_for_hf(model, place, safe_serialization=True)
        return f"timm.create_model('local-dir:{place}', pretrained=True)"

    return Network(model, features, write)


def _build_huggingface(d: EncoderDescription, classes: int) -> Network:
    """Make a ``BeitModel`` of square images, which has no classifier."""
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
    model = transformers.BeitModel(config)

    def features(images: Tensor) -> Tensor:
        output = model(images)
        return output.pooler_output if d.pooled_norm else output.last_hidden_state

    def write(place: Path) -> str:
        model.save_pretrained(place)
        return f"transformers.BeitModel.from_pretrained('{place}')"

    return Network(model, features, write)


TARGETS = {
    'mmpretrain': Target(MMPRETRAIN, _build_mmpretrain, needs_norm=False, suffix='.pth'),
    'timm': Target(TIMM, _build_timm),
    'huggingface': Target(HUGGINGFACE, _build_huggingface, places=('backbone',)),
}


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for this: pip install -c constraints/onedl.txt '.[export]' "
            '(constraints/openmmlab.txt with the upstream packages)'
        ) from error
