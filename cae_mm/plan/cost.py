"""What a training step takes, counted and not measured: operations and bytes, by part of a model.

The step is the run's own, optimizer included. On fake tensors, which have shape, number format and
lifetime but no memory, it takes a second for any model and batch.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from cae_mm.models import CAE
from cae_mm.models.blocks import Block
from cae_mm.models.neck import RegressorBlock

WEIGHTS, GRADIENTS, OPTIMIZER, REST = 'weights', 'gradients', 'optimizer', 'rest'
TARGET = 'alignment target'
# parts of a CAE by the beginning of a module's name; other models are split by their children
CAE_PARTS = {
    'target_generator': 'tokenizer',
    'teacher': TARGET,
    'backbone': 'encoder',
    'neck': 'regressor',
    'neck.decoder': 'decoder',
    'neck.output': 'output layer',
    'head': 'losses',
}
BLOCKS = (Block, RegressorBlock)
aten = torch.ops.aten
ATTENTION = {  # kernels of the CPU that torch has no formula for, and their equals
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass(frozen=True)
class Part:
    """A part of the model in a step.

    Attributes:
        name: What it is.
        parameters: Their number.
        trained: How many of them get a gradient.
        forward: Floating-point operations of the forward pass, two for a multiplication and its
            addition.
        backward: Those of the backward pass, with what activation checkpointing computes again.
        held: Bytes that it has made and that are alive when memory is at its peak, but for
            weights and gradients.
    """

    name: str
    parameters: int
    trained: int
    forward: int
    backward: int
    held: int


@dataclass(frozen=True)
class Cost:
    """A training step of one process.

    Attributes:
        images: In the step.
        parts: Of the model, and at last what lies in none of them.
        weights, gradients, optimizer: Bytes of parameters and buffers, of gradients, of the
            optimizer's states, when memory is at its peak.
        checkpoint: Bytes that are saved: states, and weights without a tokenizer's.
        unsharded: Bytes of weights that are whole at any time where processes share them: those
            outside of blocks, and of the two blocks at work and next.
    """

    images: int
    parts: tuple[Part, ...]
    weights: int
    gradients: int
    optimizer: int
    checkpoint: int
    unsharded: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the step."""
        return sum(part.forward + part.backward for part in self.parts)

    @property
    def activations(self) -> int:
        """Bytes of activations and of what is being computed, at the peak."""
        return sum(part.held for part in self.parts)

    @property
    def peak(self) -> int:
        """Bytes of all tensors when they are most."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def sharded(self, processes: int) -> float:
        """Bytes of the peak where processes share weights, gradients and states (FSDP)."""
        shared = self.weights + self.gradients + self.optimizer
        return shared / processes + min(self.unsharded, self.weights) + self.activations


def count_step(model: Any, wrapper: Any, data: Any, images: int, gathered: bool = False) -> Cost:
    """Count the second step of a training, when the optimizer has its states.

    Args:
        model: A model of mmengine, on fake tensors or on real ones, which are computed.
        wrapper: Its ``OptimWrapper``, which updates in each step.
        data: A collated batch.
        images: How many are in it.
        gathered: Whether gradients of a step before are added to.
    """
    counter = StepCounter(model, wrapper.optimizer)
    wrapper.initialize_count_status(model, 0, 2)
    with counter.watch():
        model.train_step(data, wrapper)
        if gathered:
            counter.add_gradients()
        counter.restart()
        model.train_step(data, wrapper)
    parameters, trained = _count_parameters(model)
    forward, backward = counter.flops[False], counter.flops[True]
    names = dict.fromkeys([*_part_names(model), *forward, *backward, REST])
    states = tree_leaves(list(wrapper.optimizer.state.values()))
    blocks = [_count_bytes(m.parameters()) for m in model.modules() if isinstance(m, BLOCKS)]
    outside = _count_bytes(model.parameters()) - sum(blocks)
    return Cost(
        images=images,
        parts=tuple(
            Part(n, parameters[n], trained[n], forward[n], backward[n], counter.peak[n])
            for n in names
        ),
        weights=counter.peak[WEIGHTS],
        gradients=counter.peak[GRADIENTS],
        optimizer=counter.peak[OPTIMIZER],
        checkpoint=_count_bytes([*model.state_dict().values(), *states]),
        unsharded=outside + 2 * max(blocks, default=0),
    )


def make_fake(model: Any, data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Copy a model that is on the meta device, and a batch, to fake tensors of a CPU.

    Unlike those of the meta device they enter autocast and choose the kernels of a CPU. Samples
    stay real: they have the masks, which decide shapes.
    """
    # sizes that depend on values (metrics of what is not ignored) stay open
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    model = deepcopy(model)
    originals = [*model.parameters(), *model.buffers()]

    def fake(tensor: Tensor) -> Tensor:
        with fake_mode:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        trained = tensor.requires_grad
        return nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty

    copies = {id(tensor): fake(tensor) for tensor in originals}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update((name, copies[id(t)]) for name, t in tensors.items() if t is not None)
    model.data_preprocessor.to('cpu')  # it keeps a device of its own
    return model, data | dict(inputs=tree_map_only(Tensor, fake_mode.from_tensor, data['inputs']))


class StepCounter(TorchDispatchMode):
    """Counts operations, and the bytes of all that is alive, by part of a model.

    Attributes:
        flops: Operations of the forward and of the backward pass, by part.
        peak: Bytes by part, and as WEIGHTS, GRADIENTS and OPTIMIZER, when they were most.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tracker = ModuleTracker()
        self.owners = {id(m): part_of(model, name) for name, m in model.named_modules() if name}
        self.owners[id(optimizer)] = OPTIMIZER
        self.storages: dict[int, _Storage] = {}
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        for tensor in (*model.parameters(), *model.buffers()):
            self._note(tensor, WEIGHTS)
        self.restart()

    def restart(self) -> None:
        """Forget operations and the peak, but not what is alive: a step begins."""
        self.flops: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        self.peak = self.alive.copy()
        self.unpacked = REST  # part whose backward pass runs

    def add_gradients(self) -> None:
        """Give each trained parameter a gradient."""
        for param in self.model.parameters():
            if param.requires_grad:
                param.grad = torch.zeros_like(param)
                self._note_gradient(param)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what happens in the context."""
        params = [param for param in self.model.parameters() if param.requires_grad]
        hooks = [param.register_post_accumulate_grad_hook(self._note_gradient) for param in params]
        try:
            with self, saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        outs = func(*args, **(kwargs or {}))
        in_backward = self.tracker.is_bw
        part = self.unpacked if in_backward else self._find_part()
        packet = func._overloadpacket
        if formula := flop_registry.get(ATTENTION.get(packet, packet)):
            self.flops[in_backward][part] += formula(*args, **(kwargs or {}), out_val=outs)
        for tensor in tree_leaves(outs):
            if isinstance(tensor, Tensor):
                self._note(tensor, part)
        return outs

    def _find_part(self) -> str:
        """Part of the innermost module that is being called."""
        frame: Any = sys._getframe(2)
        part = None
        while frame is not None:
            if frame.f_code is CAE.align_target.__code__:
                return TARGET
            part = part or self.owners.get(id(frame.f_locals.get('self')))
            frame = frame.f_back
        return part or REST

    def _pack(self, tensor: Tensor) -> tuple[str, Tensor]:
        return self._find_part(), tensor

    def _unpack(self, packed: tuple[str, Tensor]) -> Tensor:
        """Give a saved tensor to the backward pass of its operation, which comes next."""
        self.unpacked, tensor = packed
        return tensor

    def _note_gradient(self, param: Tensor) -> None:
        if param.grad is not None:
            self._note(param.grad, GRADIENTS)
            storage = self.storages[param.grad.untyped_storage()._cdata]
            self.alive[storage.kind] -= storage.size
            self.alive[GRADIENTS] += storage.size
            storage.kind = GRADIENTS

    def _note(self, tensor: Tensor, kind: str) -> None:
        """Add the storage of a tensor to what is alive, unless it is there already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages or not isinstance(size, int):  # of a size that stays open
            return

        def forget(_: Any) -> None:
            gone = self.storages.pop(key)
            self.alive[gone.kind] -= gone.size

        self.storages[key] = _Storage(kind, size, weakref.ref(storage, forget))
        self.alive[kind] += size
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()


@dataclass
class _Storage:
    kind: str
    size: int  # bytes
    watch: Any  # a weak reference that tells when it is freed


def part_of(model: nn.Module, name: str) -> str:
    """Part that a module or a parameter of this name belongs to."""
    if isinstance(model, CAE):
        starts = [start for start in CAE_PARTS if name.startswith(start)]
        return CAE_PARTS[max(starts, key=len)] if starts else REST
    child = name.partition('.')[0]
    return child if child in _part_names(model) else REST


def _part_names(model: nn.Module) -> list[str]:
    if isinstance(model, CAE):
        return list(CAE_PARTS.values())
    return [name for name, _ in model.named_children() if name != 'data_preprocessor']


def _count_parameters(model: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """Number of parameters by part, all and trained ones."""
    everything: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, param in model.named_parameters():
        everything[part_of(model, name)] += param.numel()
        trained[part_of(model, name)] += param.numel() if param.requires_grad else 0
    return everything, trained


def _count_bytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
