"""Fully sharded data parallel: each process keeps a share of parameters, gradients and states.

torch's FSDP2 (``fully_shard``) is applied in place, so a sharded model has the class, the parameter
names and the methods that it had. A file has whole tensors, as of any other run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from mmengine.utils import apply_to
from torch import Tensor, nn

from cae_mm.models.blocks import Block
from cae_mm.models.neck import RegressorBlock

try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch < 2.6
    FSDPModule = DTensor = fully_shard = None  # type: ignore[assignment, misc]


def check_sharding(model_cfg: dict[str, Any]) -> None:
    """Raise a ValueError if this torch cannot shard, or not a model of this config."""
    if fully_shard is None:
        raise ValueError(
            f'settings.fsdp needs torch 2.6, this is {torch.__version__}: leave it out'
        )
    if model_cfg.get('teacher_momentum') is not None:
        raise ValueError(
            'settings.fsdp gathers weights block by block, model.teacher_momentum wants all of '
            'them at once: choose one of the two'
        )


def shard_model(model: nn.Module) -> None:
    """Shard a model over all processes: block by block, what lies outside of them together."""
    mesh = init_device_mesh(torch.device(get_device()).type, (get_world_size(),))
    for block in [m for m in model.modules() if isinstance(m, (Block, RegressorBlock))]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def shard_weights(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, param in module.named_parameters():
            if f'{prefix}{name}' in state:
                state[f'{prefix}{name}'] = _shard_like(state[f'{prefix}{name}'], param)

    model.register_load_state_dict_pre_hook(shard_weights)


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer of a sharded model take states of whole tensors."""

    def shard_states(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
        params = [param for group in optimizer.param_groups for param in group['params']]
        states = {
            i: {name: _shard_like(value, params[i]) for name, value in state.items()}
            for i, state in content['state'].items()
        }
        return content | dict(state=states)

    optimizer.register_load_state_dict_pre_hook(shard_states)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard_model`` was called for this model."""
    return FSDPModule is not None and isinstance(model, FSDPModule)


@contextmanager
def gathered_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let ``state_dict()`` of both return whole tensors on the main process' CPU meanwhile.

    All processes have to enter.
    """
    weights = _gather(model.state_dict())
    states = _gather(optimizer.state_dict())
    hooks = (
        model._register_state_dict_hook(lambda *_: weights),
        optimizer.register_state_dict_post_hook(lambda *_: states),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Let parts of a model be called without the model; blocks gather theirs by themselves."""
    sharded: Any = model if is_sharded(model) else None
    if sharded:
        sharded._get_fsdp_state()._lazy_init()  # else a part called first would be a root
        sharded.unshard()
    try:
        yield
    finally:
        if sharded:
            sharded.reshard()


def _gather(content: Any) -> Any:
    """Gather one tensor after the other; only the main process keeps them."""

    def whole(shard: Any) -> Tensor:
        x = shard.full_tensor()
        return x.cpu() if is_main_process() else x.new_empty(0)

    return apply_to(content, lambda x: isinstance(x, DTensor), whole)


def _shard_like(value: Any, param: Tensor) -> Any:
    """Cut a whole tensor of the shape of ``param`` as that one is; leave all else."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != param.shape:
        return value
    assert isinstance(param, DTensor)
    return distribute_tensor(value.to(param.dtype), param.device_mesh, param.placements)
