"""One full training step of ViT-B CAE: ours against mmpretrain's, on the same inputs.

A step is tokenizer, forward, backward, gradient clipping and AdamW, 224 px, 98 of 196 patches
masked, random weights, each project with the optimizer of its configs. On a CPU batch 8, each in
float32 and in bfloat16; on a GPU batches 64 and 256 under autocast, which is mmpretrain's AMP.
"""

import sys
from collections.abc import Callable
from statistics import median

import mmpretrain.models  # noqa: F401  registers mmpretrain's CAE
import torch
from harness import Options, Row, alternate, console, in_turns, main, serve
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample
from torch.utils.flop_counter import FlopCounterMode

import cae_mm.registry  # noqa: F401  registers ours
from cae_mm.precision import choose_precision

DALLE_PIXELS = 112
REPEATS = 5


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


def make_step(name: str, device: str) -> Callable[[], None]:
    """Return one training step of a variant: project, format and batch, as 'cae-mm fp32 8'."""
    project, number_format, batch_size = name.split()
    ours = project == 'cae-mm'
    model = (build_ours if ours else build_mmpretrain)().to(device).train()
    views, samples = make_batch(int(batch_size), device)
    if not ours:
        samples = [DataSample(mask=sample.mask.to(device)) for sample in samples]
    params = [param for param in model.parameters() if param.requires_grad]
    fused = dict(fused=True) if ours else {}
    optimizer = torch.optim.AdamW(params, lr=1.5e-3, weight_decay=0.05, **fused)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=number_format == 'bf16'):
            losses = model(views, samples, mode='loss')
        loss, _ = model.parse_losses(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        optimizer.step()
        optimizer.zero_grad()  # after the step, as mmengine's OptimWrapper does

    return step


def compare(name: str, baseline: str, target: float, options: Options) -> list[Row]:
    """Speed and peak memory of a variant against another, several times in fresh processes."""
    speeds, ratios = [], []
    for i in range(REPEATS):
        console.print(f'{name} : {baseline}, run {i + 1} of {REPEATS}')
        seconds, peaks = in_turns(__file__, (baseline, name), options)
        speeds.append(seconds[baseline] / seconds[name])
        ratios.append(peaks[name] / peaks[baseline])
    times = f'{seconds[baseline]:.3f} -> {seconds[name]:.3f} s; runs: {_join(speeds)}'
    memory = f'{peaks[baseline]:.2f} -> {peaks[name]:.2f} GB; runs: {_join(ratios)}'
    what = f'{name} : {baseline}'
    return [
        Row(f'step, {what}', median(speeds), target, detail=times),
        Row(f'peak memory, {what}, worst', max(ratios), 0.6, at_most=True, detail=memory),
    ]


def _join(numbers: list[float]) -> str:
    return ', '.join(f'{number:.2f}' for number in numbers)


def measure_on_cpu(options: Options) -> list[Row]:
    """Batch 8; bfloat16 where it is native, float32 being mmpretrain's default."""
    avx512 = torch.backends.cpu.get_cpu_capability() == 'AVX512'
    rows = compare('cae-mm fp32 8', 'mmpretrain fp32 8', 1.5 if avx512 else 1.3, options)
    if choose_precision('cpu').dtype == torch.bfloat16:
        rows += compare('cae-mm bf16 8', 'mmpretrain fp32 8', 4.2, options)
        rows += compare('cae-mm bf16 8', 'mmpretrain bf16 8', 1.5, options)
    return rows


def measure_on_gpu(options: Options) -> list[Row]:
    """Batches 64 and 256 under autocast, and the share of the GPU's matrix peak."""
    rows = []
    peak_flops = measure_matrix_peak()
    h200 = 2250 if 'H200' in torch.cuda.get_device_name() else None
    for batch_size in (64, 256):
        rows += compare(f'cae-mm bf16 {batch_size}', f'mmpretrain bf16 {batch_size}', 2.0, options)
        step = make_step(f'cae-mm bf16 {batch_size}', 'cuda')
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = alternate({'step': step}, options)['step']
        share = 100 * counter.get_total_flops() / seconds / peak_flops
        detail = f'of {peak_flops / 1e12:.0f} TFLOP/s measured'
        rows += [
            Row(
                f'step, batch {batch_size}, of the matrix peak', share, 45, unit=' %', detail=detail
            ),
            Row(f'step, batch {batch_size}', batch_size / seconds, h200, unit=' images/s'),
        ]
    return rows


def measure_matrix_peak() -> float:
    """FLOP/s of a large matrix product in bfloat16."""
    n = 8192
    a, b = (torch.randn(n, n, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    seconds = alternate({'product': lambda: a @ b}, Options(20, 'cuda'))
    return 2 * n**3 / seconds['product']


def measure(options: Options) -> list[Row]:
    """All rows of this machine."""
    return measure_on_gpu(options) if options.device == 'cuda' else measure_on_cpu(options)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--serve']:
        where = 'cuda' if torch.cuda.is_available() else 'cpu'
        serve(make_step(sys.argv[2], where), where)
    else:
        main(measure, __doc__)
