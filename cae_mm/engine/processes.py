"""Several processes: what one does for all, how they find each other, what wraps the model."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn
from torch.distributed import PrefixStore, TCPStore

T = TypeVar('T')


def on_main_process(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a function on the main process; all wait for what it returns, or raises."""
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function(*args, **options)
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def unwrap(model: Any) -> nn.Module:
    """Take a model out of the wrappers of distributed training and test time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def count_restarts() -> int:
    """How often ``torchrun --max-restarts`` has started this process in place of one that failed.

    Of several machines those count on which a process failed; the others see 0.
    """
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def rendezvous_after_restart() -> dict[str, Any]:
    """Options of torch's process group with which processes that were restarted find each other.

    On one machine torchrun has one store for all attempts, in which the addresses of processes
    that have died still stand (pytorch/pytorch#167288).
    """
    if not count_restarts() or os.environ.get('GROUP_WORLD_SIZE') != '1':
        return {}
    rank, size, port = (int(os.environ[key]) for key in ('RANK', 'WORLD_SIZE', 'MASTER_PORT'))
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return {}
    store = TCPStore(os.environ['MASTER_ADDR'], port, is_master=False, wait_for_workers=False)
    prefix = f'cae_mm/attempt_{count_restarts()}'
    return dict(store=PrefixStore(prefix, store), rank=rank, world_size=size)
