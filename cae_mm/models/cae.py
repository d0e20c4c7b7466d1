"""Context autoencoder: the method, as in figure 1 of the paper.

References:
    Paper: https://arxiv.org/abs/2202.03026
    Official code: https://github.com/Atten4Vis/CAE/blob/master/models/modeling_cae.py
"""

import logging
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from mmengine.logging import print_log
from mmpretrain.models.selfsup.base import BaseSelfSupervisor
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from cae_mm.models.head import latent_std
from cae_mm.models.positions import SinCosPositions
from cae_mm.models.targets.tokenizer import Tokenizer
from cae_mm.patches import Grid, draw_ids, grid_of, split_mask
from cae_mm.registry import MODELS


@MODELS.register_module()
class CAE(BaseSelfSupervisor):
    """Encoder, regressor, alignment, decoder and tokenizer.

    The alignment target comes from the encoder itself, under ``no_grad``. The official "alignment
    encoder" shares the encoder's storage, so this is the same without a second network. As there,
    drop path stays active in the target branch while training.

    Args:
        backbone: The encoder, a ``CAEViT``.
        neck: Regressor and decoder, a ``CAENeck``.
        head: The losses, a ``CAEPretrainHead``.
        target_generator: What is predicted, any class of ``cae_mm.models.targets``. Frozen here:
            always in eval mode, outside autograd and outside checkpoints.
        teacher_momentum: If given, the alignment target comes from an exponential moving average
            of the encoder with this momentum instead, updated in each forward pass of training
            (with accumulation: of each micro-batch). An option of this project, the paper has
            none.
        complementary_masks: Train on each mask and on its complement in one step: two samples of
            each image, whose encoder passes are each other's alignment targets, with targets of
            all patches computed once. An option of this project, the paper has none.
        predicted_share: Share of the masked patches, in (0, 1], drawn at random, that are predicted
            and are the alignment target's input, rounded down; the others cost nothing. CrossMAE
            (https://arxiv.org/abs/2401.14391) predicts a quarter. The paper predicts all, 1.
        visible_targets: Predict the targets of visible patches too, from their encoded latents
            through the same decoder, as in CAE v2 (arXiv 2211.09799); the reconstruction loss is
            the mean over predicted masked and visible patches.
        data_preprocessor: A ``CAEDataPreprocessor``.
    """

    def __init__(
        self,
        *,
        backbone: dict[str, Any],
        neck: dict[str, Any],
        head: dict[str, Any],
        target_generator: dict[str, Any],
        teacher_momentum: float | None = None,
        complementary_masks: bool = False,
        predicted_share: float = 1.0,
        visible_targets: bool = False,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            backbone=backbone,
            neck=neck,
            head=head,
            target_generator=target_generator,
            data_preprocessor=data_preprocessor or dict(type='cae_mm.CAEDataPreprocessor'),
        )
        self._check_dims()
        self.target_generator.requires_grad_(False)
        self._register_state_dict_hook(_leave_out_target_generator)
        self.register_load_state_dict_post_hook(_ignore_missing_target_generator)
        if complementary_masks and not self.neck.regressor:
            raise ValueError(
                'complementary_masks takes alignment targets from the encoder, which sees mask '
                'tokens too with neck.regressor_depth=0: choose one of the two'
            )
        if not 0 < predicted_share <= 1:
            raise ValueError(f'predicted_share must be in (0, 1], not {predicted_share}')
        if complementary_masks and (predicted_share < 1 or visible_targets):
            raise ValueError(
                'complementary_masks predicts each patch once, where it is masked: it goes with '
                'neither predicted_share nor visible_targets'
            )
        self.predicted_share = predicted_share
        self.complementary_masks = complementary_masks
        self.visible_targets = visible_targets
        self.teacher_momentum = teacher_momentum
        self.teacher: Any = None
        if teacher_momentum is not None:
            if not 0 <= teacher_momentum < 1:
                raise ValueError(f'teacher_momentum must be in [0, 1), not {teacher_momentum}')
            if complementary_masks:
                raise ValueError(
                    'complementary_masks takes alignment targets from the encoder, '
                    'teacher_momentum from a teacher: choose one of the two'
                )
            if not self.head.align_weight:
                raise ValueError(
                    'teacher_momentum is for the alignment, which head.align_weight=0 leaves out: '
                    'choose one of the two'
                )
            self.teacher = deepcopy(self.backbone).requires_grad_(False)
            self.teacher.positions = self.backbone.positions  # which loading may change
            self.register_load_state_dict_post_hook(_start_teacher_from_encoder)

    def compile(self, **options: Any) -> None:
        """Compile the tensor operations of a training step for one size of batch.

        Names in the state dict stay as they are. Another size of batch is compiled when it comes.

        Args:
            options: Of ``torch.compile``, before ours: ``dynamic=False`` and ``fullgraph=True``.
        """
        device = self.backbone.cls_token.device
        for module in self.modules():
            if isinstance(module, SinCosPositions):
                module(self.backbone.grid, device)  # made later it would be a recompilation
        options = dict(dynamic=False, fullgraph=True) | options
        self._losses = torch.compile(self._losses, **options)  # type: ignore[method-assign]

    def init_weights(self) -> None:
        """Initialise all parts; an EMA teacher starts as a copy of the encoder."""
        super().init_weights()
        if isinstance(self.target_generator, Tokenizer) and not self.target_generator.init_cfg:
            message = 'target_generator has no init_cfg: its random weights make poor targets'
            print_log(message, logger='current', level=logging.WARNING)
        if self.teacher is not None:
            self.teacher.load_state_dict(self.backbone.state_dict())

    def train(self, mode: bool = True) -> 'CAE':
        """Set the mode; the tokenizer stays in eval mode."""
        super().train(mode)
        self.target_generator.eval()
        return self

    def loss(
        self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]
    ) -> dict[str, Tensor]:
        """One forward pass of CAE.

        Args:
            inputs: [view 1 (B, 3, H, W) for the encoder, view 2 (B, 3, h, w) for the tokenizer],
                both normalised; [view 1] is enough for pixel targets.
            data_samples: B samples with a bool ``mask`` of shape (N,) or (H/p, W/p), True =
                masked, the same number M in each.

        Returns:
            Losses and metrics of ``CAEPretrainHead.loss``, and ``latent_std`` (towards 0 is
            collapse).
        """
        images = inputs[0]
        if not all('mask' in sample for sample in data_samples):
            raise ValueError(
                'the data samples have no mask: train_dataloader.dataset.pipeline needs '
                "dict(type='cae_mm.CAEMaskGenerator', patch_size=...) after the crop"
            )
        mask = torch.stack([sample.mask for sample in data_samples]).flatten(1).bool()  # [B, N]
        grid, ids_v, ids_m = self._split(images, mask)
        if self.predicted_share < 1:
            ids_m = draw_ids(ids_m, self.predicted_share)
        return self._losses(inputs, ids_v, ids_m, grid)

    def _losses(
        self, inputs: Sequence[Tensor], ids_v: Tensor, ids_m: Tensor, grid: Grid
    ) -> dict[str, Tensor]:
        """All of ``loss`` that the device does, which is what ``compile`` compiles."""
        if self.complementary_masks:
            return self._loss_of_both(inputs, ids_v, ids_m, grid)

        images = inputs[0]
        with torch.no_grad():  # before the rest: no activations are held yet, the peak is lower
            ids = torch.cat([ids_m, ids_v], dim=1) if self.visible_targets else ids_m
            y_target = self.make_target(inputs, ids, grid)  # [B, M] or [B, M, K]; or V more
        z_v = self.encode(images, ids_v, self.neck.mask_tokens(ids_m, grid))  # [B, V, D]
        z_target = None
        if self.head.align_weight:
            with torch.no_grad():  # after `encode`, whose weights autocast has cast already
                z_target = self.align_target(images, ids_m)  # [B, M, D]
        return self._predict(z_v, ids_v, ids_m, grid, y_target, z_target)

    def _predict(
        self,
        z_v: Tensor,
        ids_v: Tensor,
        ids_m: Tensor,
        grid: Grid,
        y_target: Tensor,
        z_target: Tensor | None,
    ) -> dict[str, Tensor]:
        """Predict the masked patches from the visible ones' latents and compare with targets."""
        z_m = self.neck.regress(z_v, ids_v, ids_m, grid)  # [B, M, D]
        y_m = self.neck.decode(z_m, ids_m, grid)  # [B, M, K]
        if self.visible_targets:
            y_v = self.neck.decode(z_v[:, : ids_v.shape[1]], ids_v, grid)  # [B, V, K]
            y_m = torch.cat([y_m, y_v], dim=1)  # [B, M+V, K]
        losses = self.head.loss(y_m, y_target, z_m, z_target)
        std = latent_std(z_m.detach(), ids_m, grid[0] * grid[1])
        return {**losses, 'latent_std': std}  # torch 2.4 compiles no `|` of dicts

    def _loss_of_both(
        self, inputs: Sequence[Tensor], ids_v: Tensor, ids_m: Tensor, grid: Grid
    ) -> dict[str, Tensor]:
        """Losses of a mask and of its complement, which swaps V and M: their mean.

        Encoder passes are targets too; as such they get no gradient: the head detaches them.
        """
        images, (V, M) = inputs[0], (ids_v.shape[1], ids_m.shape[1])
        y = self.make_target(inputs, torch.cat([ids_v, ids_m], dim=1), grid)  # [B, N] or [B, N, K]
        y_v, y_m = y.split([V, M], dim=1)  # [B, V] and [B, M], or with K
        if V == M:  # one batch of 2B is 6 % faster on a CPU
            ids, hidden = torch.cat([ids_v, ids_m]), torch.cat([ids_m, ids_v])  # [2B, M]
            y = torch.cat([y_m, y_v])  # [2B, M] or [2B, M, K]
            z = self.encode(torch.cat([images, images]), ids)  # [2B, M, D]
            return self._predict(z, ids, hidden, grid, y, z.roll(len(images), 0))
        z_v, z_m = self.encode(images, ids_v), self.encode(images, ids_m)  # [B, V, D], [B, M, D]
        one = self._predict(z_v, ids_v, ids_m, grid, y_m, z_m)
        other = self._predict(z_m, ids_m, ids_v, grid, y_v, z_v)
        return {name: (one[name] + other[name]) / 2 for name in one}

    def encode(
        self,
        images: Tensor,
        ids: Tensor,
        mask_tokens: Tensor | None = None,
        teacher: bool = False,
    ) -> Tensor:
        """Latents of the patches ``ids``, then of mask tokens if any, without class token.

        They have the regressor's width.
        """
        encoder = self.teacher if teacher else self.backbone
        return self.neck.project(encoder.forward_features(images, ids, mask_tokens)[:, 1:])

    def align_target(self, images: Tensor, ids_m: Tensor) -> Tensor:
        """Latents that the encoder, seeing only the masked patches, gives to them."""
        if self.teacher_momentum is None:
            return self.encode(images, ids_m)
        if self.training:
            self._update_teacher(self.teacher_momentum)
        return self.encode(images, ids_m, teacher=True)

    def make_target(self, inputs: Sequence[Tensor], ids: Tensor, grid: Grid) -> Tensor:
        """What is to be predicted of the patches ``ids``: tokens (B, M), or values (B, M, K)."""
        view = self.target_generator.view
        if len(inputs) <= view:
            raise ValueError(
                f'{type(self.target_generator).__name__} reads view {view + 1}, but inputs has '
                f'{len(inputs)} view(s): give TwoViewResizedCrop a second_size'
            )
        return self.target_generator.targets(inputs[view], ids, grid)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor, regress: bool = True) -> Tensor:
        """Predict the targets of the masked patches without computing losses.

        Args:
            images: Normalised view 1, shape (B, 3, H, W).
            mask: Bool tensor with shape (B, N), True = masked.
            regress: Decode what the regressor predicts from the visible patches; False: what the
                encoder makes of the masked patches (paper, figure 4, where no patch is hidden).

        Returns:
            Logits or pixels of the masked patches in row-major order, shape (B, M, K).
        """
        grid, ids_v, ids_m = self._split(images, mask)
        if regress:
            z_v = self.encode(images, ids_v, self.neck.mask_tokens(ids_m, grid))
            z_m = self.neck.regress(z_v, ids_v, ids_m, grid)
        else:
            z_m = self.encode(images, ids_m)
        return self.neck.decode(z_m, ids_m, grid)

    def extract_feat(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Features of whole images, see ``CAEViT.forward``; of several views the first counts."""
        return self.backbone(inputs if isinstance(inputs, Tensor) else inputs[0])

    @torch.no_grad()
    def _update_teacher(self, momentum: float) -> None:
        for ema, param in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
            ema.lerp_(param, 1 - momentum)

    def _split(self, images: Tensor, mask: Tensor) -> tuple[Grid, Tensor, Tensor]:
        """Grid, and indices of visible and of masked patches on the images' device."""
        H, W = images.shape[-2:]
        p = self.backbone.patch_size
        h, w = grid = grid_of((H, W), p)
        if grid != self.backbone.grid:
            rows, columns = self.backbone.grid
            raise ValueError(
                f'the images are {H}x{W} pixels, but backbone.img_size is {rows * p}x{columns * p}:'
                ' make the two equal'
            )
        if mask.shape[1] != h * w:
            raise ValueError(
                f'the masks have {mask.shape[1]} entries, but the images have {h}x{w} patches: put '
                f'CAEMaskGenerator after the crop, with patch_size={p}'
            )
        ids_v, ids_m = split_mask(mask)
        if images.is_cuda and not mask.is_cuda:  # from pinned memory the host need not wait
            ids_v, ids_m = (ids.contiguous().pin_memory() for ids in (ids_v, ids_m))
        device = images.device
        return grid, ids_v.to(device, non_blocking=True), ids_m.to(device, non_blocking=True)

    def _check_dims(self) -> None:
        """Compare widths that no tensor operation would compare, or only on the device."""
        neck, encoder, target = self.neck, self.backbone, self.target_generator
        if neck.in_dims != encoder.embed_dims:
            raise ValueError(
                f'neck.in_dims is {neck.in_dims}, but must be {encoder.embed_dims}, the width of '
                'the backbone'
            )
        channels = encoder.patch_embed.proj.in_channels
        if channels != 3:
            raise ValueError(
                f'backbone.in_channels is {channels}, but views, their normalisation and targets '
                'have 3 channels: leave it out'
            )
        out_dims = target.out_dims(encoder.patch_size)
        if neck.out_dims != out_dims:
            raise ValueError(
                f'neck.out_dims is {neck.out_dims}, but must be {out_dims}, what '
                f'{type(target).__name__} wants predicted'
            )


def _leave_out_target_generator(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    for key in [key for key in state_dict if key.startswith(f'{prefix}target_generator.')]:
        del state_dict[key]


def _start_teacher_from_encoder(module: Any, incompatible_keys: Any) -> None:
    """Weights of a training without a teacher bring none: it starts as a copy again."""
    if any(key.startswith('teacher.') for key in incompatible_keys.missing_keys):
        module.teacher.load_state_dict(module.backbone.state_dict())
        print_log('the weights have no teacher: it starts as a copy of the encoder', 'current')


def _ignore_missing_target_generator(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if 'target_generator.' not in key]
