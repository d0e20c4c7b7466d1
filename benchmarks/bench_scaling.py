"""Data parallel training: two processes with one thread each against one such process.

    python benchmarks/bench_scaling.py           # or: make bench

A step is that of CAE-S with DALL-E's tokenizer at 224 px on 8 images for each process: forward,
backward, all-reduce over gloo, gradient clipping and AdamW, wrapped as the Runner wraps it. It
runs on the CPU in the precision that it has, also where there is a GPU. Most steps of a recipe
gather gradients without an all-reduce; AdamW is in each step here.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection

import torch
from harness import Options, Row, alternate, main
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS, MODELS
from mmpretrain.structures import DataSample

import cae_mm.registry  # noqa: F401
from cae_mm.engine.fitting import wrapper_options
from cae_mm.precision import choose_precision

BATCH, WIDTH, HEADS = 8, 384, 6


def make_step(processes: int) -> Callable[[bool], None]:
    """Return a function that does one step of this process, with or without an all-reduce."""
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='cae_mm.CAE',
            backbone=dict(type='cae_mm.CAEViT', arch='small'),
            neck=dict(type='cae_mm.CAENeck', in_dims=WIDTH, embed_dims=WIDTH, num_heads=HEADS),
            head=dict(type='cae_mm.CAEPretrainHead'),
            target_generator=dict(type='cae_mm.DALLEEncoder'),
        )
    ).train()
    wrapped = model
    if processes > 1:
        options = wrapper_options(Config()) | dict(device_ids=None, module=model)
        wrapped = MODEL_WRAPPERS.build(options)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05, fused=True)
    views = [torch.rand(BATCH, 3, size, size) for size in (224, 112)]
    samples = [DataSample(mask=mask) for mask in torch.rand(BATCH, 196).argsort(1) < 98]

    def step(gathers: bool) -> None:
        with wrapped.no_sync() if gathers else nullcontext():
            with choose_precision('cpu').autocast('cpu'):
                losses = wrapped(views, samples, mode='loss')
            model.parse_losses(losses)[0].backward()
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(rank: int, processes: int, folder: str, orders: Connection) -> None:
    """Do the steps that the parent process orders, each answered when it is done."""
    torch.set_num_threads(1)
    if processes > 1:
        rendezvous = f'file://{folder}/rendezvous'
        torch.distributed.init_process_group(
            'gloo', init_method=rendezvous, rank=rank, world_size=processes
        )
    step = make_step(processes)
    while (gathers := orders.recv()) is not None:
        step(gathers)
        orders.send(True)


def start(processes: int, folder: str) -> list[Connection]:
    """Start processes that wait for orders."""
    context, ends = torch.multiprocessing.get_context('spawn'), []
    for rank in range(processes):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(rank, processes, folder, theirs), daemon=True).start()
        ends.append(ours)
    return ends


def do_step(workers: list[Connection], gathers: bool) -> None:
    """Let all workers do one step."""
    for worker in workers:
        worker.send(gathers)
    for worker in workers:
        worker.recv()


def measure(options: Options) -> list[Row]:
    """Time steps of one process and of two, in turns."""
    os.environ['OMP_NUM_THREADS'] = '1'
    with tempfile.TemporaryDirectory() as folder:
        one, two = start(1, folder), start(2, folder)
        steps = {
            'one': partial(do_step, one, False),
            'an all-reduce each step': partial(do_step, two, False),
            'steps that gather': partial(do_step, two, True),
        }
        seconds = alternate(steps, options)
        for worker in one + two:
            worker.send(None)
    alone, rows = BATCH / seconds.pop('one'), []
    for (what, value), target in zip(seconds.items(), (1.8, None), strict=True):
        both = 2 * BATCH / value
        detail = f'{both:.2f} to {alone:.2f} images/s'
        rows.append(Row(f'DDP, 2 processes to 1, {what}', both / alone, target, detail=detail))
    return rows


if __name__ == '__main__':
    main(measure, __doc__)
