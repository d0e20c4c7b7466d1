"""From a model to the description of its encoder, and from that back to an encoder."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cae_mm.checkpoints import EncoderDescription
from cae_mm.models.data_preprocessor import CAEDataPreprocessor
from cae_mm.models.vit import CAEViT


def describe_model(model: nn.Module) -> EncoderDescription | None:
    """Describe the ``CAEViT`` that a model has as backbone, with the normalisation of its images.

    Args:
        model: Unwrapped. Its data preprocessor is ours (view 1 counts) or one of mmengine,
            mmpretrain, mmseg or mmdet, which get BGR from OpenMMLab's loaders.

    Returns:
        None if there is no such backbone. Mean and std are None where nothing is normalised.
    """
    encoder, preprocessor = getattr(model, 'backbone', None), getattr(model, 'data_preprocessor', 0)
    if not isinstance(encoder, CAEViT):
        return None
    if isinstance(preprocessor, CAEDataPreprocessor):
        mean, std = preprocessor.means[0], preprocessor.stds[0]
    else:
        mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    flips = getattr(preprocessor, 'to_rgb', getattr(preprocessor, '_channel_conversion', False))
    return replace(encoder.describe(), mean=_plain(mean), std=_plain(std), to_rgb=bool(flips))


def _plain(values: Tensor | None) -> tuple[float, ...] | None:
    """Numbers without the noise of float32."""
    return None if values is None else tuple(round(float(v), 4) for v in values.flatten())


def build_encoder(description: EncoderDescription, **options: Any) -> CAEViT:
    """Build the ``CAEViT`` that is described; layer scales are among its weights.

    By default its output is what the final norm is applied to; ``options`` are those of ``CAEViT``.
    """
    d = description
    arch = dict(embed_dims=d.embed_dims, depth=d.depth, num_heads=d.num_heads, layer_scale=0.1)
    options = {'out_type': 'avg_featmap' if d.pooled_norm else 'raw'} | options
    return CAEViT(
        arch=arch,
        img_size=d.img_size,
        pretrain_img_size=d.pretrain_img_size,
        patch_size=d.patch_size,
        in_channels=d.in_channels,
        mlp_ratio=d.mlp_ratio,
        use_rel_pos_bias=d.use_rel_pos_bias,
        final_norm=d.final_norm,
        window_size=d.window_size,
        global_blocks=d.global_blocks,
        **options,
    )
