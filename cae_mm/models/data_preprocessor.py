"""Normalisation of the two views on the device, masks left on the host."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from cae_mm.registry import MODELS


@MODELS.register_module()
class CAEDataPreprocessor(BaseDataPreprocessor):
    """Move the views to the device and normalise each in its own way, in float32.

    Unlike mmpretrain's ``TwoNormDataPreprocessor`` it takes one view too, and leaves the data
    samples in host memory, so that masks are counted and sorted without waiting for the device.

    Args:
        mean, std: Of view 1, per channel in [0, 255]; default ImageNet's.
        second_mean, second_std: Of view 2; default x -> 0.8 x + 0.1 for x in [0, 1], which the
            DALL-E tokenizer expects. Own d-VAE: 127.5 and 127.5.
        to_rgb: Whether images come as BGR, as OpenMMLab's loaders and ours give them.
        non_blocking: Whether copies to the device may overlap with computation.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
        second_mean: Sequence[float] = (-31.875,) * 3,  # 0.8 x/255 + 0.1 = (x + 31.875) / 318.75
        second_std: Sequence[float] = (318.75,) * 3,
        to_rgb: bool = True,
        non_blocking: bool = True,
    ) -> None:
        super().__init__(non_blocking=non_blocking)
        self.to_rgb = to_rgb
        means = torch.tensor([tuple(mean), tuple(second_mean)], dtype=torch.float32)
        stds = torch.tensor([tuple(std), tuple(second_std)], dtype=torch.float32)
        self.register_buffer('means', means.view(2, 1, -1, 1, 1), persistent=False)
        self.register_buffer('stds', stds.view(2, 1, -1, 1, 1), persistent=False)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Normalise a collated batch.

        Args:
            data: ``inputs``, one tensor or a list of one or two, each (B, 3, H, W) with values in
                [0, 255]; ``data_samples``, passed on untouched.
            training: Not used, part of mmengine's interface.
        """
        views = data['inputs']
        views = [views] if isinstance(views, Tensor) else views
        if not all(isinstance(view, Tensor) for view in views):
            raise ValueError(
                'the images of a batch are not stacked: set '
                "train_dataloader.collate_fn=dict(type='default_collate')"
            )
        views = [self._normalize(view, i) for i, view in enumerate(self.cast_data(views))]
        return {'inputs': views, 'data_samples': data.get('data_samples')}

    def _normalize(self, view: Tensor, index: int) -> Tensor:
        if self.to_rgb:
            view = view.flip(1)
        return (view.float() - self.means[index]) / self.stds[index]
