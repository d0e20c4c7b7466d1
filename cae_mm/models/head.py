"""The two losses of CAE and the numbers that show whether it learns.

Reference: paper, section 3.2 "Objective Function", https://arxiv.org/abs/2202.03026
"""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from cae_mm.models.blocks import at_least_float32
from cae_mm.registry import MODELS


@MODELS.register_module()
class CAEPretrainHead(BaseModule):
    """Reconstruction loss + lambda * alignment loss, both in (at least) float32.

    Token targets (integers) are compared by cross entropy, others (floats) by mean squared error or
    by their direction.

    Args:
        align_weight: lambda of the paper, 2; 1 and 1.5 are slightly worse (paper, section 4.5). 0:
            without alignment, whose target is then not computed.
        main_weight: Weight of the reconstruction loss. 0 leaves the alignment alone, which
            collapses (paper, section 4.5); there is no other use for another value than 1.
        norm_target: Whether each patch's alignment target is brought to mean 0 and variance 1, as
            in data2vec (arXiv 2202.03555). An option of this project, the paper has none.
        cosine: Whether float targets are compared by 1 - cosine, as in CAE v2 (arXiv 2211.09799).
    """

    def __init__(
        self,
        align_weight: float = 2.0,
        main_weight: float = 1.0,
        norm_target: bool = False,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if norm_target and not align_weight:
            raise ValueError(
                'norm_target is for the alignment, which align_weight=0 leaves out: choose one of '
                'the two'
            )
        self.align_weight = align_weight
        self.main_weight = main_weight
        self.norm_target = norm_target
        # a tensor, as `compile` would compile each number anew; `AlignmentRampHook` sets it
        self.align_ramp: Tensor
        self.register_buffer('align_ramp', torch.ones(()), persistent=False)
        self.cosine = cosine

    def loss(
        self, y: Tensor, y_target: Tensor, z_m: Tensor, z_target: Tensor | None
    ) -> dict[str, Tensor]:
        """Compute losses and metrics over the masked patches.

        Args:
            y: Decoder output, shape (B, M, K): logits of K tokens, or K values. More than M
                patches, the visible ones, may follow: they count in the reconstruction loss.
            y_target: Tokens, int64 with shape (B, M), or values, float with shape (B, M, K).
            z_m: Latents predicted by the regressor, shape (B, M, D).
            z_target: Latents that the encoder gives to them, shape (B, M, D); None if
                ``align_weight`` is 0.

        Returns:
            ``loss_main`` and ``loss_align``, whose sum is minimised, and metrics without gradient:
            ``align_cos`` (mean cosine of predicted and encoded latents) and, for tokens,
            ``token_acc`` (share of right tokens, [0, 1]) and ``target_codes`` (number of different
            tokens among the targets of this batch). Without alignment there is neither
            ``loss_align`` nor ``align_cos``.
        """
        y, M = at_least_float32(y), z_m.shape[1]
        loss_main = self.main_weight * self._main(y, y_target)
        aligned = self._align(z_m, z_target) if self.align_weight else {}
        return {'loss_main': loss_main, **aligned, **self._token_metrics(y[:, :M], y_target[:, :M])}

    def _align(self, z_m: Tensor, z_target: Tensor | None) -> dict[str, Tensor]:
        assert z_target is not None
        z_m = at_least_float32(z_m)
        z_target = z_target.detach().to(z_m.dtype)
        if self.norm_target:
            z_target = F.layer_norm(z_target, z_target.shape[-1:])
        cosine = F.cosine_similarity(z_m.detach(), z_target, dim=-1)
        weight = self.align_ramp * self.align_weight
        return {
            'loss_align': weight * F.mse_loss(z_m, z_target),
            'align_cos': cosine.mean(),
        }

    def _main(self, y: Tensor, y_target: Tensor) -> Tensor:
        if not y_target.is_floating_point():
            if self.cosine:
                raise ValueError('head.cosine=True is for features, but the targets are tokens')
            return F.cross_entropy(y.flatten(0, 1), y_target.flatten())
        if y.shape != y_target.shape:
            raise ValueError(
                f'the decoder predicts {y.shape[-1]} values per patch, the targets have '
                f'{y_target.shape[-1]}: set neck.out_dims={y_target.shape[-1]}'
            )
        if self.cosine:
            return (1 - F.cosine_similarity(y, y_target.to(y.dtype), dim=-1)).mean()
        return F.mse_loss(y, y_target.to(y.dtype))

    @torch.no_grad()
    def _token_metrics(self, y_m: Tensor, y_target: Tensor) -> dict[str, Tensor]:
        if y_target.is_floating_point():
            return {}
        seen = y_m.new_zeros(y_m.shape[-1]).scatter_(0, y_target.flatten(), 1.0)
        return {
            'token_acc': (y_m.argmax(-1) == y_target).float().mean(),
            'target_codes': seen.sum(),
        }


def latent_std(z_m: Tensor, ids_m: Tensor, num_patches: int) -> Tensor:
    """Standard deviation over those images of the batch in which the same patch is masked.

    Comparing equal places, it is 0 when latents tell positions apart but not images.

    Args:
        z_m: Latents of masked patches, shape (B, M, D).
        ids_m: Indices of these patches, shape (B, M), values in [0, N).
        num_patches: N.

    Returns:
        Scalar: mean over channels and over patches that are masked in two images or more.
    """
    z, ids = at_least_float32(z_m).flatten(0, 1), ids_m.flatten()  # [B*M, D], [B*M]
    counts = z.new_zeros(num_patches, 1).index_add_(0, ids, torch.ones_like(z[:, :1]))  # [N, 1]
    sums = z.new_zeros(num_patches, z.shape[1])  # [N, D]
    means = sums.index_add(0, ids, z) / counts.clamp(min=1)
    variances = sums.index_add(0, ids, (z - means[ids]) ** 2) / counts.clamp(min=1)
    shared = counts > 1
    return (variances.sqrt() * shared).sum() / (shared.sum().clamp(min=1) * z.shape[1])
