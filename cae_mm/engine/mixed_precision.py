"""Training in the number format that the machine has, and gathering of gradients."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_

from cae_mm.engine.optim import LARS
from cae_mm.engine.processes import unwrap
from cae_mm.precision import Precision, choose_precision
from cae_mm.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class MixedPrecisionOptimWrapper(OptimWrapper):
    """Run forward passes under autocast: bfloat16, float16 with loss scaling, or not at all.

    mmengine's ``AmpOptimWrapper`` wants a GPU and asks nobody whether it has the format. A
    checkpoint resumes on a machine with another format.

    An update by gradients that are not finite is skipped: parameters and states of the optimizer
    stay as they are. With gathering this concerns all of its batches, and with several processes
    all of them, since the sum of the gradients carries such a number everywhere; a loss that is
    not finite makes its gradients so. Fused Adam and AdamW, and ``LARS``, skip on the device; with
    other optimizers the host waits for the norm of the gradients. Running statistics of BatchNorm
    that a batch made non-finite become again what they were before it.

    Args:
        optimizer: See ``OptimWrapper``, as for ``options``.
        dtype: 'auto' (see ``choose_precision``), 'bfloat16', 'float16' or 'float32'.
        modules: Attributes of the model that alone run in that format and return float32, for
            example ``['backbone', 'neck']`` where heads need operators without it; they return
            tuples of tensors. None: the whole model.
    """

    # batches of an epoch, if gathering is to end with it (set by ``CAERunner``): nothing is
    # then pending when a checkpoint is written
    epoch_length: int | None = None
    # norm of the gradients on the device, before clipping, the same on all processes; None where
    # the last batch was no update
    grad_norm: Tensor | None = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: str = 'auto',
        modules: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, **options)
        self.device_type = torch.device(get_device()).type
        self.precision = choose_precision(self.device_type, dtype)
        self.modules = modules
        # passes everything through unless losses have to be scaled
        self.loss_scaler = torch.amp.GradScaler(
            self.device_type, enabled=self.precision.dtype == torch.float16
        )
        print_log(f'precision: {self.precision}', logger='current')

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter autocast, and skip gradient synchronisation while accumulating."""
        with super().optim_context(model), ExitStack() as stack:
            stack.enter_context(_keep_statistics_finite(model))
            if self.modules is None:
                stack.enter_context(self.precision.autocast(self.device_type))
            for name in self.modules or ():
                module = getattr(unwrap(model), name)
                stack.enter_context(_autocast_inside(module, self.precision, self.device_type))
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradients of ``loss``; if it is not finite, none of them is."""
        self.grad_norm = None
        scaled = self.loss_scaler.scale(loss)
        gradient = torch.ones_like(scaled).masked_fill_(~loss.detach().isfinite(), torch.nan)
        super().backward(scaled, gradient=gradient, **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Update the parameters, unless a gradient is not finite."""
        self.loss_scaler.unscale_(self.optimizer)
        self._clip_grad()
        if self.loss_scaler.is_enabled():
            self.loss_scaler.step(self.optimizer, **kwargs)
            self.loss_scaler.update()
        else:
            self._step_if_finite(**kwargs)

    def _clip_grad(self) -> None:
        """Take the norm of the gradients, log it as a tensor (mmengine waits for it), and clip."""
        groups = self.optimizer.param_groups
        params = [x for group in groups for x in group['params'] if x.grad is not None]
        by_norm = self.clip_grad_kwargs and self.clip_func is clip_grad_norm_
        norm: Any = None if by_norm else _norm([x.grad for x in params])
        if self.clip_grad_kwargs:
            clipped = self.clip_func(params, **self.clip_grad_kwargs)
            norm = clipped if by_norm else norm
        self.grad_norm = norm.full_tensor() if hasattr(norm, 'full_tensor') else norm  # if sharded
        self.message_hub.update_scalar('train/grad_norm', self.grad_norm)

    def _step_if_finite(self, **kwargs: Any) -> None:
        optimizer: Any = self.optimizer
        norm: Any = self.grad_norm
        finite = norm.isfinite()
        if not _skips_on_device(optimizer):
            if finite:
                optimizer.step(**kwargs)
            return
        optimizer.found_inf = 1.0 - finite.float()
        try:
            optimizer.step(**kwargs)
        finally:
            del optimizer.found_inf

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Start counting batches; schedules may step before the first update."""
        # mmengine warns of gradients lost before a resumed run; none are at the end of an epoch
        start = init_counts if self.epoch_length is None else 0
        super().initialize_count_status(model, start, max_counts)
        self._inner_count = init_counts
        self._global_step = 0  # where it is -1 mmengine warns

    def should_update(self) -> bool:
        """Return whether enough gradients are gathered, or the epoch ends."""
        if self.epoch_length is None:
            return super().should_update()
        batch = self._inner_count % self.epoch_length
        return batch == 0 or batch % self._accumulative_counts == 0

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Divide by the number of batches that are gathered, fewer at the end of an epoch."""
        if self.epoch_length is None:
            return super().scale_loss(loss)
        batch = self._inner_count % self.epoch_length
        first = batch - batch % self._accumulative_counts
        return loss / min(self._accumulative_counts, self.epoch_length - first)

    def should_sync(self) -> bool:
        """Return whether the next backward pass is the last one before an update."""
        if self.epoch_length is None:
            return super().should_sync()
        batch = self._inner_count % self.epoch_length + 1
        return batch == self.epoch_length or batch % self._accumulative_counts == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, and of the loss scaling if there is any."""
        scaler = {'loss_scaler': self.loss_scaler.state_dict()}
        return super().state_dict() | (scaler if self.loss_scaler.is_enabled() else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, here or on a machine with another number format."""
        scaler = state_dict.pop('loss_scaler', None)
        if scaler and self.loss_scaler.is_enabled():
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)


@contextmanager
def _autocast_inside(module: nn.Module, precision: Precision, device_type: str) -> Iterator[None]:
    """Run ``module`` under autocast; the tensors of the tuple that it returns become float32."""
    region = ExitStack()

    def enter(*_: Any) -> None:
        region.enter_context(precision.autocast(device_type))

    def leave(_: nn.Module, __: Any, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        region.close()
        return tuple(out.float() for out in outs)

    hooks = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    try:
        with region:  # closes it too when forward fails
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` does nothing where ``found_inf`` is 1.

    Fused SGD would begin with a momentum from unset memory if its first step were skipped.
    """
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return all(group['fused'] for group in optimizer.param_groups)
    return isinstance(optimizer, LARS)


@contextmanager
def _keep_statistics_finite(model: nn.Module) -> Iterator[None]:
    """Take back what a forward pass did to running statistics of BatchNorm if one is not finite."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    buffers = [x for m in norms for x in (m.running_mean, m.running_var) if x is not None]
    if not buffers:
        yield
        return
    before = torch.cat(buffers)
    yield
    after = torch.cat(buffers)
    kept = torch.where(after.isfinite().all(), after, before)
    # the backward pass, which does not read them, would take a change for an error
    torch._foreach_copy_([x.data for x in buffers], kept.split([x.numel() for x in buffers]))
