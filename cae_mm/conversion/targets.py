"""How other projects store our weights, and their networks, which are to compute the same."""

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
from cae_mm.conversion.sources import (
    HUGGINGFACE,
    MMPRETRAIN,
    OFFICIAL,
    OFFICIAL_ENCODER,
    OFFICIAL_FINETUNED,
)

State = dict[str, Tensor]


class Network(NamedTuple):
    """What takes our weights."""

    rules: list[Rule]
    write: Callable[[Path, State], str]  # writes weights (and network), says how they are loaded
    module: nn.Module | None = None  # None if there is none to compare our features with
    # its tokens, or the normalised mean of the patch tokens
    features: Callable[[Tensor], Tensor] = nn.Identity()
    # for the card: Python around what loads it, from ``images`` to ``features``; '' for no package
    code: str = ''


class Target(NamedTuple):
    """A project that weights can be carried to."""

    build: Callable[[EncoderDescription, State], Network]
    places: tuple[str, ...] = ('backbone', 'head')  # parts of our model that it takes
    needs_norm: bool = False  # whether its network always has a final norm
    suffix: str = ''  # of the file that is written; '' for a folder


def _build_mmpretrain(d: EncoderDescription, state: State) -> Network:
    """Make a ``BEiTViT``, alone or in a classifier."""
    importlib.import_module('mmpretrain.models')
    config = dict(
        type='mmpretrain.BEiTViT',
        arch=dict(
            embed_dims=d.embed_dims,
            num_layers=d.depth,
            num_heads=d.num_heads,
            feedforward_channels=round(d.embed_dims * d.mlp_ratio),
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
    if 'head.fc.weight' in state:
        classes = len(state['head.fc.weight'])
        model['head'] = nn.ModuleDict({'fc': nn.Linear(d.embed_dims, classes)})

    def write(place: Path, weights: State) -> str:
        torch.save({'state_dict': weights, 'meta': {}}, place)
        init_cfg = dict(type='Pretrained', checkpoint=str(place), prefix='backbone.')
        return f'backbone={config | dict(init_cfg=init_cfg)}'

    code = (
        'import mmpretrain.models\nfrom mmengine.registry import MODELS\n\n{usage}\n'
        'model = MODELS.build(backbone)\nmodel.init_weights()\nmodel.eval()\n'
        '[features] = model(images)'
    )
    return Network(MMPRETRAIN, write, model, lambda images: backbone(images)[0], code)


def _build_timm(d: EncoderDescription, state: State) -> Network:
    """Make a ``Beit`` of any size."""
    timm = _require('timm')
    options = dict(
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
        num_classes=len(state.get('head.fc.weight', ())),
    )
    # the class is Beit; all of its sizes are given
    model = timm.create_model('beit_base_patch16_224', pretrained=False, **options)

    def features(images: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        return model.forward_head(tokens, pre_logits=True) if d.pooled_norm else tokens

    def write(place: Path, weights: State) -> str:
        timm.models.save_for_hf(model, place, model_args=options, safe_serialization=True)
        return f"timm.create_model('local-dir:{place}', pretrained=True)"

    code = 'import timm\n\nmodel = {usage}.eval()\nfeatures = model.forward_features(images)'
    if d.pooled_norm:
        code += '\nfeatures = model.forward_head(features, pre_logits=True)'
    return Network(OFFICIAL_FINETUNED, write, model, features, code)


def _build_huggingface(d: EncoderDescription, state: State) -> Network:
    """Make a ``BeitModel`` of square images, which has no classifier."""
    if d.img_size[0] != d.img_size[1]:
        raise ValueError("Hugging Face's BeitModel takes square images only")
    transformers = _require('transformers')
    config = transformers.BeitConfig(
        hidden_size=d.embed_dims,
        num_hidden_layers=d.depth,
        num_attention_heads=d.num_heads,
        intermediate_size=round(d.embed_dims * d.mlp_ratio),
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
    output = 'pooler_output' if d.pooled_norm else 'last_hidden_state'

    def features(images: Tensor) -> Tensor:
        return getattr(model(images), output)

    def write(place: Path, weights: State) -> str:
        model.save_pretrained(place)
        return f"transformers.BeitModel.from_pretrained('{place}')"

    code = f'import transformers\n\nmodel = {{usage}}.eval()\nfeatures = model(images).{output}'
    return Network(HUGGINGFACE, write, model, features, code)


def _build_official(d: EncoderDescription, state: State) -> Network:
    """Choose the names of pretraining or of fine-tuning; the official code is no package."""
    if 'neck.mask_token' in state:
        rules = OFFICIAL
    else:
        finetuned = 'head.fc.weight' in state or d.pooled_norm
        rules = OFFICIAL_FINETUNED if finetuned else OFFICIAL_ENCODER

    def write(place: Path, weights: State) -> str:
        torch.save({'model': weights}, place)
        return f'--finetune {place}, --model_key model (official run_class_finetuning.py)'

    return Network(rules, write)


TARGETS = {
    'mmpretrain': Target(_build_mmpretrain, suffix='.pth'),
    'timm': Target(_build_timm, needs_norm=True),
    'huggingface': Target(_build_huggingface, places=('backbone',), needs_norm=True),
    'official': Target(_build_official, places=('backbone', 'neck', 'head'), suffix='.pth'),
}


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for this: pip install -c constraints/onedl.txt '.[export]' "
            '(constraints/openmmlab.txt with the upstream packages)'
        ) from error
