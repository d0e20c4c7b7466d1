"""One full training step of ViT-B CAE: ours against mmpretrain's, on the same inputs.

    python benchmarks/bench_step.py              # or: make bench

A step is tokenizer, forward, backward, gradient clipping and AdamW, 224 px, 98 of 196 patches
masked, random weights. The implementations take turns in one process, so that a busy machine
slows down all of them alike; medians and ratios are printed. Peak memory is read from one fresh
process for each, because a process' peak never falls.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import mmpretrain.models  # noqa: F401  registers mmpretrain's CAE
import torch
from mmengine.registry import MODELS
from mmengine.runner.amp import autocast
from mmpretrain.structures import DataSample
from rich.console import Console
from rich.table import Table

import cae_mm.registry  # noqa: F401  registers ours

DALLE_PIXELS = 112
VARIANTS = {
    # name: (whose, bfloat16 autocast)
    'mmpretrain fp32': ('mmpretrain', False),
    'mmpretrain bf16': ('mmpretrain', True),
    'cae-mm fp32': ('cae_mm', False),
    'cae-mm bf16': ('cae_mm', True),
}
BASELINE = 'mmpretrain fp32'  # mmpretrain's default on a CPU


def build_ours() -> torch.nn.Module:
    """ViT-B with the recipe's drop path."""
    return MODELS.build(
        dict(
            type='cae_mm.CAE',
            backbone=dict(type='cae_mm.CAEViT', arch='base', drop_path_rate=0.1),
            neck=dict(type='cae_mm.CAENeck', drop_path_rate=0.1),
            head=dict(type='cae_mm.CAEPretrainHead'),
            target_generator=dict(type='cae_mm.DALLEEncoder'),
        )
    )


def build_mmpretrain() -> torch.nn.Module:
    """ViT-B as in mmpretrain's config, with the paper's 98 masked patches."""
    return MODELS.build(
        dict(
            type='mmpretrain.CAE',
            backbone=dict(type='mmpretrain.CAEPretrainViT', arch='b', layer_scale_init_value=0.1),
            neck=dict(
                type='mmpretrain.CAENeck',
                regressor_depth=4,
                decoder_depth=4,
                layer_scale_init_value=0.1,
                mask_tokens_num=98,
            ),
            head=dict(type='mmpretrain.CAEHead', loss=dict(type='mmpretrain.CAELoss', lambd=2)),
            target_generator=dict(type='mmpretrain.DALL-E'),
        )
    )


def make_batch(batch_size: int, device: str) -> tuple[list[torch.Tensor], list[DataSample]]:
    """Two views and masks; mmpretrain's pipeline leaves masks on the device, ours on the host."""
    generator = torch.Generator().manual_seed(0)
    sizes = (224, DALLE_PIXELS)
    views = [torch.rand(batch_size, 3, s, s, generator=generator).to(device) for s in sizes]
    masks = torch.rand(batch_size, 196, generator=generator).argsort(1) < 98
    return views, [DataSample(mask=mask) for mask in masks]


def make_step(name: str, batch_size: int, device: str) -> Callable[[], float]:
    """Return a function that does one training step and returns its seconds."""
    whose, bf16 = VARIANTS[name]
    model = (build_ours if whose == 'cae_mm' else build_mmpretrain)().to(device).train()
    views, samples = make_batch(batch_size, device)
    if whose == 'mmpretrain':
        samples = [DataSample(mask=sample.mask.to(device)) for sample in samples]
    params = [param for param in model.parameters() if param.requires_grad]
    fused = dict(fused=True) if whose == 'cae_mm' else {}
    optimizer = torch.optim.AdamW(params, lr=1.5e-3, weight_decay=0.05, **fused)

    def step() -> float:
        _synchronize(device)
        start = time.perf_counter()
        with autocast(device_type=device, dtype=torch.bfloat16, enabled=bf16):
            losses = model(views, samples, mode='loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        optimizer.step()
        optimizer.zero_grad()  # after the step, as mmengine's OptimWrapper does
        _synchronize(device)
        return time.perf_counter() - start

    return step


def _synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """Peak of this process in GB: of the GPU where there is one, else resident."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_memory(name: str, args: argparse.Namespace) -> float:
    """Run three steps in a fresh process and return its peak in GB."""
    command = [sys.executable, __file__, '--memory-of', name, '--batch-size', str(args.batch_size)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])['peak_gb']


def main() -> None:
    """Time all variants in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=5, help='timed steps of each variant')
    parser.add_argument('--memory-of', choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)

    if args.memory_of:
        step = make_step(args.memory_of, args.batch_size, device)
        for _ in range(3):
            step()
        print(json.dumps({'peak_gb': peak_memory(device)}))
        return

    console = Console()
    peaks = {}
    for name in VARIANTS:
        console.print(f'peak memory of {name} ...')
        peaks[name] = measure_memory(name, args)
    steps = {name: make_step(name, args.batch_size, device) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(args.rounds + 1):
        console.print('warm-up' if i == 0 else f'round {i} of {args.rounds}')
        for name, step in steps.items():
            seconds = step()
            if i > 0:
                times[name].append(seconds)

    where = torch.cuda.get_device_name() if device == 'cuda' else platform.processor() or 'CPU'
    table = Table(
        title=f'ViT-B step, batch {args.batch_size}, torch {torch.__version__}, {where}, '
        f'{torch.get_num_threads()} threads, median of {args.rounds}'
    )
    for column in ('', 's / step', 'images / s', 'speed-up', 'peak GB', 'peak ratio'):
        table.add_column(column, justify='left' if not column else 'right')
    for name in VARIANTS:
        seconds = median(times[name])
        table.add_row(
            name,
            f'{seconds:.3f}',
            f'{args.batch_size / seconds:.1f}',
            f'{median(times[BASELINE]) / seconds:.2f}x',
            f'{peaks[name]:.2f}',
            f'{peaks[name] / peaks[BASELINE]:.2f}',
        )
    console.print(table)


if __name__ == '__main__':
    main()
