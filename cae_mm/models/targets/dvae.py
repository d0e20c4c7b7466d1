"""Discrete variational autoencoder: a tokenizer of one's own, trained on any images.

The structure is that of the d-VAE in BEiT's and the official CAE's code; it is trained as DALL-E's
was, with a Gumbel-softmax relaxation.

References:
    DALL-E, section 2.1 and appendix A: https://arxiv.org/abs/2102.12092
    Structure: https://github.com/Atten4Vis/CAE/blob/master/models/modeling_discrete_vae.py
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from cae_mm.models.targets.tokenizer import Tokenizer, without_autocast
from cae_mm.registry import MODELS


class ResBlock(nn.Module):
    """Two 3x3 and one 1x1 convolution with a skip connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``, shape (B, D, H, W)."""
        return x + self.net(x)


@MODELS.register_module()
class DiscreteVAE(Tokenizer, BaseModel):
    """Encoder, codebook and decoder; 8 pixels of a side per token.

    Under the Runner it is a model that trains; as ``target_generator`` of ``CAE`` it is frozen.

    Args:
        vocab_size: Number of tokens K.
        codebook_dims: Width of a code.
        hidden_dims: Width of the convolutions.
        num_res_blocks: Residual blocks at the lowest resolution, in encoder and decoder each.
        usage_weight: Weight of ``loss_usage``.
        gradient_weight: Weight of ``loss_gradient``, which has edges count more than colours; 0, as
            DALL-E has none: it is not computed.
        temperature: Of the Gumbel-softmax; ``GumbelTemperatureHook`` anneals it.
        data_preprocessor: For training; images are to be in [-1, 1] (mean and std 127.5).
        init_cfg: ``dict(type='Pretrained', checkpoint=...)`` when used as tokenizer.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 8192,
        codebook_dims: int = 512,
        hidden_dims: int = 256,
        num_res_blocks: int = 2,
        usage_weight: float = 0.01,
        gradient_weight: float = 0.0,
        temperature: float = 1.0,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.vocab_size = vocab_size
        self.usage_weight = usage_weight
        self.gradient_weight = gradient_weight
        self.temperature = temperature
        D, relu = hidden_dims, nn.ReLU()
        down = [nn.Conv2d(n_in, D, 4, stride=2, padding=1) for n_in in (3, D, D)]
        up = [nn.ConvTranspose2d(D, D, 4, stride=2, padding=1) for _ in range(3)]
        self.encoder = nn.Sequential(
            *(layer for conv in down for layer in (conv, relu)),
            *(ResBlock(D) for _ in range(num_res_blocks)),
        )
        self.output = nn.Linear(D, vocab_size)
        self.codebook = nn.Embedding(vocab_size, codebook_dims)
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook_dims, D, 1),
            *(ResBlock(D) for _ in range(num_res_blocks)),
            *(layer for conv in up for layer in (conv, relu)),
            nn.Conv2d(D, 3, 1),
        )

    def forward(
        self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | Tensor:
        """Train ('loss') or paint (B, 3, 8h, 8w) images from their own tokens ('tensor')."""
        if mode == 'loss':
            return self.loss(inputs)
        if mode == 'tensor':
            return self.decode_tokens(self.tokenize(inputs))
        raise ValueError(f"Unknown mode '{mode}': choose 'loss' or 'tensor'")

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        """Reconstruct ``images`` in [-1, 1], shape (B, 3, H, W), through relaxed tokens.

        Returns:
            ``loss_rec``: mean squared error; ``loss_usage``: ``usage_weight`` times the KL
            divergence of the batch's mean token distribution from the uniform one, in nats
            (0 = all tokens used alike, log K = one token); ``perplexity``: of the most probable
            tokens of the batch, in [1, K], without gradient; with ``gradient_weight``
            ``loss_gradient``: that times the mean squared error of the differences of neighbouring
            pixels, between rows plus between columns.
        """
        features = self.encoder(images).movedim(1, -1)  # [B, h, w, D]
        logits = self.classify(features)  # [B, h, w, K]
        soft = F.gumbel_softmax(logits, tau=self.temperature, dim=-1)
        codes = (soft @ self.codebook.weight).movedim(-1, 1)  # [B, D', h, w]
        rec = self.decoder(codes).float()
        usage = logits.softmax(-1).flatten(0, 2).mean(0)  # [K]
        best = logits.argmax(-1).flatten()  # [B*h*w]
        ones = torch.ones_like(best, dtype=usage.dtype)
        hard = torch.zeros_like(usage).scatter_add_(0, best, ones)
        losses = {
            'loss_rec': F.mse_loss(rec, images),
            'loss_usage': self.usage_weight * (math.log(len(usage)) - _entropy(usage)),
            'perplexity': _entropy(hard / hard.sum()).exp().detach(),
        }
        if self.gradient_weight:
            rows, columns = (F.mse_loss(rec.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
            losses['loss_gradient'] = self.gradient_weight * (rows + columns)
        return losses

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Paint tokens, int64 (B, h, w), as images in [-1, 1], shape (B, 3, 8h, 8w)."""
        return self.decoder(self.codebook(tokens).movedim(-1, 1)).clamp(-1, 1)

    def encode_features(self, images: Tensor) -> Tensor:
        """Run the encoder in float32, so that tokens do not depend on autocast."""
        with without_autocast(images):
            return self.encoder(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits of features (..., D), always in (at least) float32."""
        with without_autocast(features):
            return self.output(features.to(self.output.weight.dtype))


def _entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-10).log()).sum()
