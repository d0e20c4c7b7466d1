"""BatchNorm with the statistics of all processes, on CPUs too."""

import torch
from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from cae_mm.models.blocks import at_least_float32


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of (B, C, ...) over the images of all processes in training.

    As ``torch.nn.SyncBatchNorm``, which refuses CPUs and makes the host wait for the GPU in each
    step. Parameters, buffers and keys are those of ``torch.nn.BatchNorm1d``.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in evaluation with the running statistics."""
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)  # of what belongs to a channel
        y = at_least_float32(x)
        images = y.new_full((1,), x.numel() // x.shape[1])
        *total, count = all_reduce(torch.cat([y.sum(dims), images])).split([x.shape[1], 1])
        y = y - (total[0] / count).view(shape)
        var = all_reduce(y.square().sum(dims)) / count  # [C]
        with torch.no_grad():
            self._update(total[0] / count, var * count / (count - 1))
        y = y * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f'SyncBatchNorm takes (B, C, ...), not {tuple(x.shape)}')

    def _update(self, mean: Tensor, var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


def replace_sync_batch_norm(module: nn.Module) -> None:
    """Put ``SyncBatchNorm`` in the place of torch's, which works on GPUs only."""
    for name, child in module.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            norm = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            norm._parameters, norm._buffers = child._parameters, child._buffers
            setattr(module, name, norm.train(child.training))
        else:
            replace_sync_batch_norm(child)
