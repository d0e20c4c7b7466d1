"""Parameter groups as in the official code, and LARS."""

from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import Tensor, nn

from cae_mm.engine.processes import unwrap
from cae_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS

# beside 1-D parameters: class token and positions (official ``no_weight_decay``), and relative
# position tables (official: with --disable_weight_decay_on_rel_pos_bias, which is off by default)
NO_DECAY = ('cls_token', 'pos_embed', 'relative_position_bias_table')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer with few parameter groups: one per layer and weight decay.

    No weight decay for 1-D parameters (biases, norms, layer scales), class token, positions and
    relative position tables. With ``paramwise_cfg=dict(layer_decay_rate=r)`` layer i of L has its
    learning rate multiplied by r ** (L - 1 - i); the model's ``backbone`` tells the layers by
    ``get_layer_depth(name, prefix)``. Groups come with the highest learning rate first, the one
    that logs show.
    """

    def _validate_cfg(self) -> None:  # of paramwise_cfg, called by __init__
        if unknown := sorted(self.paramwise_cfg.keys() - {'layer_decay_rate'}):
            raise ValueError(
                f'{type(self).__name__} knows paramwise_cfg.layer_decay_rate only, not {unknown}'
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper for ``model``."""
        params = self._param_groups(unwrap(model))
        optimizer = OPTIMIZERS.build(dict(self.optimizer_cfg, params=params))
        wrapper_cfg = dict(type='OptimWrapper') | self.optim_wrapper_cfg
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args=dict(optimizer=optimizer))

    def _param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            decays = param.ndim > 1 and not name.endswith(NO_DECAY)
            weight_decay = self.optimizer_cfg.get('weight_decay', 0.0) if decays else 0.0
            groups.setdefault((self._lr_scale(model, name), weight_decay), []).append(param)
        ordered = []
        for scale, weight_decay in sorted(groups, reverse=True):
            params, lr = groups[scale, weight_decay], self.optimizer_cfg['lr'] * scale
            remark = f'{len(params)} tensors with lr x {scale:.3g}, weight decay {weight_decay}'
            print_log(remark, 'current')
            ordered.append(dict(params=params, lr=lr, weight_decay=weight_decay))
        return ordered

    def _lr_scale(self, model: nn.Module, name: str) -> float:
        rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        if rate == 1.0:
            return 1.0
        backbone: Any = getattr(model, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(
                f'layer_decay_rate={rate} needs a model whose backbone has get_layer_depth(name, '
                f'prefix): {type(model).__name__} with {type(backbone).__name__} has none'
            )
        layer, num_layers = backbone.get_layer_depth(name, 'backbone.')
        return rate ** (num_layers - 1 - layer)


@OPTIMIZERS.register_module()
class LARS(torch.optim.Optimizer):
    """SGD with momentum, the step of each tensor in proportion to its own norm.

    As in MAE and the official linear probe (``util/lars.py``; arXiv 1708.03888): 1-D parameters
    have neither weight decay nor scaling, and momentum gathers gradients, not steps. mmpretrain's
    ``LARS`` gathers steps and reads each norm back from the device.

    As torch's fused optimizers it leaves everything as it is where ``found_inf`` is 1, and takes
    gradients that loss scaling has multiplied by ``grad_scale``, without waiting for the device.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        weight_decay: L2 penalty of tensors with two dimensions or more.
        momentum: Share of the last step's direction that is kept.
        trust_coefficient: Norm of a step, before the learning rate, over that of the tensor.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler sets both scalars for a step
    found_inf: Tensor | None = None  # 0.0 or 1.0, on the device

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum)
        super().__init__(params, defaults | dict(trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group['params']:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, step: Tensor, group: dict[str, Any]) -> None:
        if (grad_scale := getattr(self, 'grad_scale', None)) is not None:
            step = step / grad_scale
        if param.ndim > 1:
            step = step + group['weight_decay'] * param
            norm, step_norm = param.norm(), step.norm()
            trust = group['trust_coefficient'] * norm / step_norm
            step = step * torch.where((norm > 0) & (step_norm > 0), trust, 1.0)
        state = self.state[param]
        momentum = state.get('momentum_buffer', torch.zeros_like(param))
        new_momentum = group['momentum'] * momentum + step
        new_param = param - group['lr'] * new_momentum
        if self.found_inf is not None:
            new_momentum = torch.where(self.found_inf > 0, momentum, new_momentum)
            new_param = torch.where(self.found_inf > 0, param, new_param)
        state['momentum_buffer'] = new_momentum
        param.copy_(new_param)
