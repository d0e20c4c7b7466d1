"""Parameter groups as in the official code, and bfloat16 on CPU and GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS
from mmengine.runner.amp import autocast
from torch import Tensor, nn

from cae_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS

# beside 1-D parameters: class token and positions (official ``no_weight_decay``), relative
# position tables (official ``modeling_finetune.py``)
NO_DECAY = ('cls_token', 'pos_embed', 'relative_position_bias_table')


@OPTIM_WRAPPERS.register_module()
class BF16OptimWrapper(OptimWrapper):
    """Run forward passes under bfloat16 autocast, on a CPU too (mmengine's AMP wants a GPU).

    bfloat16 has float32's range, so there is no loss scaling. For GPUs without bfloat16 use
    mmengine's ``AmpOptimWrapper``, that is float16 with loss scaling, as in the official code.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter autocast, and skip gradient synchronisation while accumulating."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer with few parameter groups: one per layer and weight decay.

    No weight decay for 1-D parameters (biases, norms, layer scales), class token, positions and
    relative position tables. With ``paramwise_cfg=dict(layer_decay_rate=r)`` layer i of L has its
    learning rate multiplied by r ** (L - 1 - i); the model's ``backbone`` tells the layers by
    ``get_layer_depth(name, prefix)``. Groups come with the highest learning rate first, the one
    that logs show.

    Args:
        optim_wrapper_cfg: Type and options of wrapper and optimizer, as in mmengine.
        paramwise_cfg: ``layer_decay_rate``, default 1 (no decay); nothing else.
    """

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg=None)
        options = dict(paramwise_cfg or {})
        self.layer_decay_rate = options.pop('layer_decay_rate', 1.0)
        if options:
            raise ValueError(
                f'{type(self).__name__} knows paramwise_cfg.layer_decay_rate only, '
                f'not {sorted(options)}'
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper for ``model``."""
        wrapper: Any = model
        model = wrapper.module if is_model_wrapper(wrapper) else model
        optimizer_cfg = self.optimizer_cfg.copy()
        optimizer_cfg['params'] = self._param_groups(model)
        optimizer = OPTIMIZERS.build(optimizer_cfg)
        wrapper_cfg = dict(type='OptimWrapper') | self.optim_wrapper_cfg
        return MMENGINE_OPTIM_WRAPPERS.build(wrapper_cfg, default_args=dict(optimizer=optimizer))

    def _param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            decays = param.ndim > 1 and not name.endswith(NO_DECAY)
            weight_decay = self.optimizer_cfg.get('weight_decay', 0.0) if decays else 0.0
            key = (self._lr_scale(model, name), weight_decay)
            groups.setdefault(key, []).append(param)
        ordered = sorted(groups.items(), key=lambda group: group[0], reverse=True)
        for (scale, weight_decay), params in ordered:
            print_log(
                f'{len(params)} tensors with lr x {scale:.3g}, weight decay {weight_decay}',
                logger='current',
            )
        return [
            dict(params=params, lr=self.optimizer_cfg['lr'] * scale, weight_decay=weight_decay)
            for (scale, weight_decay), params in ordered
        ]

    def _lr_scale(self, model: nn.Module, name: str) -> float:
        if self.layer_decay_rate == 1.0:
            return 1.0
        backbone: Any = model.backbone
        layer, num_layers = backbone.get_layer_depth(name, 'backbone.')
        return self.layer_decay_rate ** (num_layers - 1 - layer)
