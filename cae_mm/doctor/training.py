"""Learning rate, optimizer, number formats and batch statistics, against the machine."""

import math
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from mmengine.optim import build_optim_wrapper
from torch import nn

from cae_mm.doctor.case import Case, Finding, get
from cae_mm.doctor.failures import failure

MAX_FACTOR = 1.5  # by which learning rate per image may differ from the recipe's


def check_learning_rate(case: Case) -> Iterator[Finding]:
    """Learning rate over effective batch, against the recipe's (linear rule)."""
    lr, recipe_lr = case.get('optim_wrapper.optimizer.lr'), _written(case, 'optimizer.lr')
    batch_size = case.get('train_dataloader.batch_size')
    if not lr or not recipe_lr or not batch_size:
        return
    accumulation = case.get('optim_wrapper.accumulative_counts', 1)
    seen = case.machine.processes * batch_size
    batch = seen * accumulation
    recipe = recipe_batch(case, batch)
    if recipe is None:
        yield case.found(
            'note',
            'auto_scale_lr',
            f'nothing says which batch lr={lr:g} is for',
            'set auto_scale_lr=dict(base_batch_size=...)',
        )
        return
    want = recipe_lr * batch / recipe
    automatic = case.get('auto_scale_lr.enable', False)
    base = case.get('auto_scale_lr.base_batch_size')
    have = lr * seen / base if automatic else lr
    counted = f'{case.machine.processes} x {batch_size} x {accumulation} = {batch}'
    if not 1 / MAX_FACTOR <= have / want <= MAX_FACTOR:
        scaled = f' (auto_scale_lr makes it {have:.4g})' if automatic else ''
        yield case.found(
            'warning',
            'optim_wrapper.optimizer.lr',
            f'the recipe has lr={recipe_lr:g} for a batch of {recipe}, this run has lr={lr:g}'
            f'{scaled} for {counted} (processes x batch_size x accumulative_counts)',
            f'set optim_wrapper.optimizer.lr={want * lr / have:.4g}, or make the batch {recipe} by '
            + (
                f'optim_wrapper.accumulative_counts={round(recipe / seen)}'
                if recipe > seen
                else 'a smaller train_dataloader.batch_size'
            ),
        )
    elif automatic and accumulation > 1:
        yield case.found(
            'note',
            'auto_scale_lr.enable',
            "mmengine's auto_scale_lr does not count accumulation: base_batch_size is compared "
            f'with {case.machine.processes} x {batch_size}',
            'keep base_batch_size without accumulation',
        )


def recipe_batch(case: Case, batch: int) -> int | None:
    """The effective batch that the file's learning rate is for, if anything says so.

    ``auto_scale_lr.base_batch_size`` does, with or without accumulation, which mmengine does not
    count: without it where it equals the N x M of a file's name with ``NxbM``. Where the name does
    not tell, what is nearer to ``batch``, the run's, is taken.
    """
    base = get(case.written, 'auto_scale_lr.base_batch_size')
    accumulation = _written(case, 'accumulative_counts', 1)
    named = named_batch(case.path.stem)
    if base is None:
        return named and named[0] * named[1] * accumulation
    if named is not None:
        return base * accumulation if base == named[0] * named[1] else base
    return min(base, base * accumulation, key=lambda size: abs(math.log(size / batch)))


def named_batch(name: str) -> tuple[int, int] | None:
    """GPUs and images per GPU in a config's name, as in ``32xb64``."""
    match = re.search(r'(?:^|[_-])(\d+)xb(\d+)', name)
    return (int(match[1]), int(match[2])) if match else None


def _written(case: Case, key: str, default: Any = None) -> Any:
    return get(case.written, f'optim_wrapper.{key}', default)


def check_optimizer(case: Case) -> Iterator[Finding]:
    """Whether the optimizer can be built for the model."""
    wrapper = deepcopy(case.get('optim_wrapper'))
    if case.model is None or not wrapper or _is_amp(wrapper):
        return
    get(wrapper, 'optimizer', {}).pop('fused', None)  # needs parameters with memory
    built = case.attempt(lambda: build_optim_wrapper(case.model, wrapper))
    if isinstance(built, Exception):
        yield failure(case, 'optim_wrapper', built)


def check_precision(case: Case) -> Iterator[Finding]:
    """Mixed precision that the machine does not have."""
    wrapper = case.get('optim_wrapper') or {}
    wants_bf16 = _type(wrapper) == 'BF16OptimWrapper' or wrapper.get('dtype') == 'bfloat16'
    if _is_amp(wrapper) and not case.machine.cuda:
        yield case.found(
            'error',
            'optim_wrapper.type',
            "mmengine's AmpOptimWrapper needs a GPU",
            "set optim_wrapper.type='cae_mm.BF16OptimWrapper' and leave out dtype and loss_scale",
        )
    elif wants_bf16 and case.machine.cuda and not case.machine.bf16:
        yield case.found(
            'warning',
            'optim_wrapper.type',
            'this GPU has no bfloat16: torch emulates it slowly, or refuses',
            "set optim_wrapper.type='AmpOptimWrapper' and optim_wrapper.dtype='float16'",
        )


def check_sync_bn(case: Case) -> Iterator[Finding]:
    """Batch statistics over processes where there is one process, or no GPU."""
    if case.model is None:
        return
    layers = [name for name, m in case.model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if not layers:
        return
    batch_size = case.get('train_dataloader.batch_size')
    where = f'{layers[0]} and {len(layers) - 1} more' if len(layers) > 1 else layers[0]
    if case.machine.processes == 1:
        yield Finding(
            'note',
            'model',
            f'SyncBN ({where}) becomes plain BN on one process: statistics of {batch_size} images',
            'nothing to do if these are enough; with two or three take a norm without batch, as '
            "dict(type='LN2d')",
        )
    elif not case.machine.cuda:
        yield Finding(
            'error',
            'model',
            f'SyncBN ({where}) works on GPUs only, not on {case.machine}',
            "set norm_cfg=dict(type='BN')",
        )


def _type(node: dict[str, Any]) -> str:
    return str(node.get('type', '')).rpartition('.')[2]


def _is_amp(wrapper: dict[str, Any]) -> bool:
    return _type(wrapper) == 'AmpOptimWrapper'
