"""Tokens of a second round: clusters of the patch features that an encoder of the first has.

The frozen encoder and its clusters come from one file, which ``tools/make_tokenizer.py`` writes.

References:
    Iterated clusters as targets, of speech: HuBERT, https://arxiv.org/abs/2106.07447
    Features of a vision model as tokens: BEiT v2, https://arxiv.org/abs/2208.06366
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cae_mm.models.targets.tokenizer import Tokenizer, without_autocast
from cae_mm.patches import grid_of
from cae_mm.registry import MODELS


@MODELS.register_module()
class KMeansTokenizer(Tokenizer):
    """The nearest of K centres to a patch's features, in Euclidean distance.

    Features are standardised per channel, with mean and deviation of the images that the centres
    were found on. It reads what the trained encoder reads, view 1, so no second view is made.

    Args:
        backbone: The frozen encoder, a ``CAEViT`` with the patch size of the one that is trained.
        vocab_size: Number of centres K.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``.
    """

    view = 0
    mean: Tensor  # [D]
    std: Tensor  # [D]
    centers: Tensor  # [K, D], of standardised features
    patches: Tensor  # [K, 3*p*p], mean of the normalised pixels behind a centre

    def __init__(
        self,
        *,
        backbone: dict[str, Any],
        vocab_size: int = 8192,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.backbone = MODELS.build(backbone)
        self.vocab_size = vocab_size
        D, p = self.backbone.embed_dims, self.backbone.patch_size
        self.register_buffer('mean', torch.zeros(D))
        self.register_buffer('std', torch.ones(D))
        self.register_buffer('centers', torch.randn(vocab_size, D))
        self.register_buffer('patches', torch.zeros(vocab_size, 3 * p * p))

    def out_dims(self, patch_size: int) -> int:
        """Logits to predict for a patch."""
        own = self.backbone.patch_size
        if own != patch_size:
            raise ValueError(
                f'the tokenizer gives a token to each {own}x{own} pixels, but the encoder has '
                f'patches of {patch_size}x{patch_size}: the first round needs the same patch_size'
            )
        return self.vocab_size

    def encode_features(self, images: Tensor) -> Tensor:
        """Features of all patches: (B, 3, H, W) -> (B, D, H/p, W/p)."""
        grid = grid_of(images.shape[-2:], self.backbone.patch_size)
        features = self.backbone.forward_features(images)[:, 1:]  # [B, N, D]
        return features.transpose(1, 2).unflatten(-1, grid)

    def classify(self, features: Tensor) -> Tensor:
        """Score the centres: ``|x|^2 / 2`` less half of the squared distances, always in float32.

        ``|x|^2`` is the same for all centres, so the highest score is the nearest one's.
        """
        with without_autocast(features):
            x = (features.to(self.mean.dtype) - self.mean) / self.std  # [..., D]
            return F.linear(x, self.centers, -self.centers.square().sum(1) / 2)  # [..., K]

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Paint tokens (B, h, w) as images (B, 3, ph, pw), normalised as the encoder's."""
        p, grid = self.backbone.patch_size, tokens.shape[1:]
        pixels = self.patches[tokens.flatten(1)].transpose(1, 2)  # [B, 3*p*p, N]
        return F.fold(pixels, (grid[0] * p, grid[1] * p), p, stride=p)

    def explain_missing_weights(self) -> str:
        """Say how to come by this tokenizer."""
        return (
            'It is made of the encoder of a first round: '
            'python tools/make_tokenizer.py CONFIG CHECKPOINT --out FILE'
        )
