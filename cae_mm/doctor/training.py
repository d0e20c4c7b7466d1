"""Learning rate, number format and batch statistics against the machine; what a probe trains."""

from collections.abc import Iterator

import torch
from torch import nn

from cae_mm.doctor.case import Case, get
from cae_mm.doctor.finding import Finding
from cae_mm.models import LinearProbeHead
from cae_mm.precision import choose_precision

MAX_FACTOR = 1.5  # by which the learning rate per image may differ from the recipe's


def check_learning_rate(case: Case) -> Iterator[Finding]:
    """Learning rate over batch, as the Runner fits them to the machine, against the recipe's."""
    key = 'optim_wrapper.optimizer.lr'
    lr, recipe_lr = case.get(key), get(case.recipe, key)
    batch_size = case.get('train_dataloader.batch_size')
    if not lr or not recipe_lr or not batch_size:
        return
    recipe = get(case.recipe, 'auto_scale_lr.base_batch_size')
    if recipe is None:
        text = f'nothing says which batch lr={lr:g} is for'
        remedy = 'set auto_scale_lr=dict(enable=True, base_batch_size=...)'
        yield case.finding('note', 'auto_scale_lr', text, remedy)
        return
    accumulation = case.get('optim_wrapper.accumulative_counts', 1)
    seen = case.machine.processes * batch_size
    if case.get('auto_scale_lr.enable'):  # left to mmengine, which does not count accumulation
        lr *= seen / case.get('auto_scale_lr.base_batch_size')
    expected = recipe_lr * seen * accumulation / recipe
    if not 1 / MAX_FACTOR <= lr / expected <= MAX_FACTOR:
        factors = f'{case.machine.processes} x {batch_size} x {accumulation}'
        text = (
            f'it is {lr:.4g} for a batch of {seen * accumulation} = {factors} (processes x '
            f'images x gathered); {recipe_lr:g} for {recipe}, the recipe, makes {expected:.4g}'
        )
        remedy = f'{key}={recipe_lr:g} is fitted to any batch by auto_scale_lr.enable=True'
        yield case.finding('warning', key, text, f"{remedy} and runner_type='cae_mm.CAERunner'")


def check_precision(case: Case) -> Iterator[Finding]:
    """A format that the machine would emulate; GPUs that cannot be seen may have it."""
    key, device = 'optim_wrapper.dtype', case.machine.device
    if case.get(key) != 'bfloat16' or (device == 'cuda' and not torch.cuda.is_available()):
        return
    precision = choose_precision(device)
    if precision.dtype != torch.bfloat16:
        text = f'torch emulates it slowly: {precision.reason}'
        yield case.finding('warning', key, text, f"set {key}='auto'")


def check_sync_bn(case: Case) -> Iterator[Finding]:
    """Batch statistics over processes where there is one process."""
    modules = case.model.named_modules() if case.model is not None else ()
    name = next((name for name, module in modules if isinstance(module, nn.SyncBatchNorm)), None)
    if name and case.machine.processes == 1:
        batch_size = case.get('train_dataloader.batch_size')
        text = f'SyncBN ({name}, ...) is plain BN on one process: statistics of {batch_size} images'
        remedy = "with two or three images take a norm without batch, as dict(type='LN2d')"
        yield Finding('note', 'model', text, remedy)


def check_probe(case: Case) -> Iterator[Finding]:
    """A probe judges an encoder that stays as it is."""
    if case.encoder is None or not isinstance(getattr(case.model, 'head', None), LinearProbeHead):
        return
    depth = case.encoder.depth
    if case.encoder.frozen_stages != depth:
        key, text = 'model.backbone.frozen_stages', 'a probe trains the head alone'
        yield case.finding('error', key, text, f'set frozen_stages={depth}, all blocks')
    if case.get('model.backbone.drop_path_rate', 0) > 0:
        key, text = 'model.backbone.drop_path_rate', 'frozen blocks, as those of a probe, ignore it'
        yield case.finding('warning', key, text, 'leave drop_path_rate out')
