"""Numbers of the log, read from the device when somebody looks at them."""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor

# Numbers of a key that are kept. mmengine keeps a million and copies all of them for each new one,
# which takes longer than a step on a GPU before a long recipe ends.
HISTORY = 10_000


class DeferredMessageHub(MessageHub):
    """mmengine's, except that a step's numbers do not make the host wait for the device.

    Values are kept as they come. The first look at one that lies on a device reads all of them in
    one transfer, so hooks that look at a loss see what they would see otherwise; a hook that
    looks at it in each step makes each step wait. Of each key the last ``HISTORY`` values are
    kept, which bounds the windows of ``LogProcessor``.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self._pending: dict[str, list[tuple[float | Tensor, int]]] = {}

    def update_scalar(self, key: str, value: Any, count: int = 1, resumed: bool = True) -> None:
        """Keep ``value``, a number or a tensor with one element, for the history of ``key``."""
        self._set_resumed_keys(key, resumed)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.detach().reshape(())
        else:
            value = self._get_valid_value(value)
        if key not in self._log_scalars:  # so keys stay in the order they came in
            self._log_scalars[key] = HistoryBuffer()
        pending = self._pending.setdefault(key, [])
        pending.append((value, count))
        if len(pending) == HISTORY:
            self._settle(self._pending)

    @property
    def log_scalars(self) -> OrderedDict[str, HistoryBuffer]:
        """All histories."""
        self._settle(self._pending)
        return self._log_scalars

    def get_scalar(self, key: str) -> HistoryBuffer:
        """Return the history of ``key``; nothing is waited for if the host knows its values."""
        on_host = not any(isinstance(value, Tensor) for value, _ in self._pending.get(key, []))
        if on_host and key in self._log_scalars:
            self._settle([key])
            return self._log_scalars[key]
        return super().get_scalar(key)

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be resumed, pending values too."""
        self._settle(self._pending)
        return super().state_dict()

    def _settle(self, keys: Iterable[str]) -> None:
        """Move the pending values of ``keys`` into their histories."""
        pending = {key: self._pending.pop(key) for key in list(keys) if key in self._pending}
        tensors = [x for x, _ in chain(*pending.values()) if isinstance(x, Tensor)]
        numbers = iter(read_scalars(tensors))
        for key, entries in pending.items():
            values = [next(numbers) if isinstance(x, Tensor) else x for x, _ in entries]
            new: Any = values, [count for _, count in entries]
            columns = zip(self._log_scalars[key].data, new, strict=True)
            history = (np.concatenate(column)[-HISTORY:] for column in columns)
            self._log_scalars[key] = HistoryBuffer(*history, max_length=HISTORY)


def read_scalars(tensors: list[Tensor]) -> list[float]:
    """Read scalars with one transfer from each device that they are on."""
    numbers = [0.0] * len(tensors)
    for device in {x.device for x in tensors}:
        places = [i for i, x in enumerate(tensors) if x.device == device]
        read = torch.stack([tensors[i] for i in places]).tolist()
        for i, number in zip(places, read, strict=True):
            numbers[i] = float(number)
    return numbers
