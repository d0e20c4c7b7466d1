"""Heads that judge a frozen encoder, for ``mmpretrain.ImageClassifier``.

References:
    Paper, section 4 "Linear Probing", "Attentive Probing": https://arxiv.org/abs/2202.03026
    Official code: https://github.com/Atten4Vis/CAE/blob/master/models/modeling_finetune.py
"""

from typing import Any

import torch
from mmpretrain.models.heads import LinearClsHead
from torch import Tensor, nn

from cae_mm.models.blocks import CrossAttention, LayerNorm, at_least_float32
from cae_mm.models.sync_batch_norm import SyncBatchNorm
from cae_mm.registry import MODELS

INIT = dict(type='TruncNormal', layer='Linear', std=0.01)  # MAE's, which the official probe takes


@MODELS.register_module()
class LinearProbeHead(LinearClsHead):
    """BatchNorm without affine parameters, then a linear layer.

    In training it normalises with the statistics of the step's images on all processes (MAE's
    code: of each process), in evaluation with their running means, so that no image's prediction
    depends on the others of its batch.

    Args:
        num_classes: Number of classes.
        in_channels: Width D of the features.
        options: ``loss``, ``topk``, ``cal_acc``, as mmpretrain's ``ClsHead``.
    """

    def __init__(self, *, num_classes: int, in_channels: int, **options: Any) -> None:
        defaults = dict(loss=dict(type='mmpretrain.CrossEntropyLoss'), init_cfg=INIT)
        super().__init__(num_classes, in_channels, **(defaults | options))
        self.norm = SyncBatchNorm(in_channels, affine=False, eps=1e-6)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Normalise the last of ``feats``, shape (B, D), in float32 at least."""
        feature = feats[-1]
        if feature.ndim != 2:
            raise ValueError(
                f'LinearProbeHead takes (B, D), not {tuple(feature.shape)}: set '
                "the backbone to out_type='cls_token' or 'avg_featmap'"
            )
        return self.norm(at_least_float32(feature))


@MODELS.register_module()
class AttentiveProbeHead(LinearProbeHead):
    """A learned query attends to the patches; BatchNorm and a linear layer follow.

    One cross-attention without MLP and without skip connection. Keys and values are the patches'
    outputs, as in the paper; the official code gives the class token's among them. And it
    evaluates with statistics of the test batch, here they are those of training. The options are
    those of ``LinearProbeHead`` and ``num_heads`` of the attention; official: the encoder's.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int, num_heads: int, **options: Any
    ) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels, **options)
        self.query_token = nn.Parameter(torch.zeros(1, 1, in_channels))
        self.norm_q = LayerNorm(in_channels)
        self.norm_k = LayerNorm(in_channels)
        self.norm_v = LayerNorm(in_channels)
        self.attn = CrossAttention(in_channels, num_heads)

    def init_weights(self) -> None:
        """Initialise as the official code does, which has 0.02 for the attention."""
        super().init_weights()
        linear: Any
        for linear in self.attn.children():
            nn.init.trunc_normal_(linear.weight, std=0.02)  # cut at 100 deviations: not at all

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Pool the last of ``feats``, tokens (B, 1 + N, D) with the class token first."""
        tokens = feats[-1]
        if tokens.ndim != 3:
            raise ValueError(
                f'AttentiveProbeHead takes (B, 1 + N, D), not {tuple(tokens.shape)}: set '
                "the backbone to out_type='raw'"
            )
        patches = tokens[:, 1:]  # [B, N, D]
        query = self.norm_q(self.query_token).expand(len(patches), -1, -1)  # [B, 1, D]
        pooled = self.attn(query, self.norm_k(patches), self.norm_v(patches))  # [B, 1, D]
        return super().pre_logits((pooled[:, 0],))
