"""What one of several processes does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from mmengine.dist import broadcast_object_list, is_main_process

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
