"""What all tokenizers share: one discrete token for each patch of the encoder."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cae_mm.checkpoints import PretrainedModule
from cae_mm.patches import Grid, gather_tokens


class Tokenizer(PretrainedModule):
    """Base of networks that turn an image into a grid of token ids.

    Weights come from ``init_cfg=dict(type='Pretrained', checkpoint=...)``. They are loaded by this
    module's own ``init_weights``, so that no parent's initialisation overwrites them.
    """

    view = 1
    reduction = 8  # pixels per token of that view, along each side
    vocab_size: int

    def out_dims(self, patch_size: int) -> int:
        """Logits to predict for a patch."""
        return self.vocab_size

    @abstractmethod
    def encode_features(self, images: Tensor) -> Tensor:
        """Features before the output layer: images (B, 3, H, W) -> (B, C, h, w) tokens."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Output layer, in float32: features (..., C) -> logits (..., vocabulary)."""

    @torch.no_grad()
    def targets(self, images: Tensor, ids: Tensor, grid: Grid) -> Tensor:
        """Tokens of the patches ``ids``, without logits for any other patch.

        Args:
            images: Normalised, the view that the class says, shape (B, 3, H, W).
            ids: Indices of patches, shape (B, M).
            grid: Rows and columns of the encoder's patches.

        Returns:
            int64 tensor with shape (B, M).
        """
        features = self.encode_features(images)
        if tuple(features.shape[-2:]) != tuple(grid):
            seen, view, tokens = (
                f'{h}x{w}' for h, w in (grid, images.shape[2:], features.shape[2:])
            )
            raise ValueError(
                f'the encoder sees {seen} patches, but a second view of {view} pixels gives '
                f'{tokens} tokens: set second_size={tuple(side * self.reduction for side in grid)}'
            )
        features = features.flatten(2).transpose(1, 2)  # [B, N, C]
        return self.classify(gather_tokens(features, ids)).argmax(-1)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Tokens of whole images, int64 with shape (B, h, w)."""
        features = self.encode_features(images).movedim(1, -1)  # [B, h, w, C]
        return self.classify(features).argmax(-1)

    def explain_missing_weights(self) -> str:
        """Say how to come by a tokenizer."""
        return (
            'Ways out: (1) convert the published DALL-E weights, see cae_ckpt/README.md: '
            'python tools/convert_dalle.py encoder.pkl; (2) train an own tokenizer: '
            'python tools/train.py configs/tokenizer/dvae_8xb64-amp-coslr-100e_in1k.py; '
            '(3) use pixels as targets, they need no weights: '
            'configs/pretrain/cae-rgb_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
        )


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Switch autocast off on the device of ``x``; the meta device knows none."""
    device = x.device.type
    return nullcontext() if device == 'meta' else torch.autocast(device, enabled=False)
