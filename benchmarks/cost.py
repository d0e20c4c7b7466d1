"""How a CAE step's speed and memory grow: image size, batch, encoder, masked share, processes.

    python benchmarks/cost.py --minutes 2    # again and again until all points are measured
    python benchmarks/cost.py --draw         # docs/images/cost.png and the table in docs

Each point is a plan (``cae_mm.plan``) of the paper's recipe with one thing changed, in a fresh
process. Beside what was measured stand the counts, which are to explain it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from harness import console, describe_machine, in_fresh_process
from matplotlib import pyplot as plt
from mmengine.dist import is_main_process

from cae_mm.doctor.case import Machine
from cae_mm.models.archs import resolve_arch
from cae_mm.plan.plan import RESIDENT, make_plan

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
PAGE, PICTURE = ROOT / 'docs/performance.md', ROOT / 'docs/images/cost.png'
START, END = '<!-- benchmarks/cost.py: start -->', '<!-- end -->'
FORMATS = ('float32', 'bfloat16')
REFERENCE = dict(size=224, batch=4, arch='base', masked=0.5, processes=1, threads=2)
SERIES: dict[str, tuple[str, tuple[Any, ...]]] = {
    'size': ('side of the images, pixels', (112, 160, 224, 320, 448)),
    'batch': ('images in a step', (1, 2, 4, 8, 16)),
    'arch': ('encoder', ('small', 'base', 'large')),
    'masked': ('masked share of the patches', (0.25, 0.5, 0.75)),
    'processes': ('processes of one thread each', (1, 2)),
}
STEPS = 2
Point = dict[str, Any]


def make_points(series: str) -> list[Point]:
    """The reference with one thing changed; a process has one thread where their number does."""
    change = dict(threads=1) if series == 'processes' else {}
    return [REFERENCE | change | {series: value} for value in SERIES[series][1]]


def name_of(point: Point, dtype: str) -> str:
    """Key of a result."""
    return ' '.join(f'{key}={value}' for key, value in (point | dict(dtype=dtype)).items())


def measure_point(point: Point, dtype: str) -> Point:
    """Plan the recipe as this point wants it."""
    arch, processes = resolve_arch(point['arch']), point['processes']
    options = {
        'model.backbone.arch': point['arch'],
        'model.neck.in_dims': arch['embed_dims'],
        'model.neck.embed_dims': arch['embed_dims'],
        'model.neck.num_heads': arch['num_heads'],
        'settings.img_size': point['size'],
        'settings.mask_ratio': point['masked'],
        'settings.batch_size': point['batch'],
        'optim_wrapper.dtype': dtype,
        'auto_scale_lr.enable': False,  # no gathering: each step is an update
        'launcher': 'pytorch' if processes > 1 else 'none',
    }
    torch.set_num_threads(point['threads'])
    plan = make_plan(CONFIG, Machine(processes), options, images=10**6, steps=STEPS)
    assert plan.measurement is not None
    return dict(
        images_per_s=plan.rate,
        peak_gb=plan.measurement.peak / 1e9,
        counted_gb=plan.cost.peak / 1e9,
        gflop=plan.flops_per_image / 1e9,
    )


def measure_missing(results: Path, minutes: float) -> None:
    """Measure points without a result until the time is over, and keep each."""
    known = json.loads(results.read_text()) if results.exists() else {}
    wanted = [(point, dtype) for name in SERIES for point in make_points(name) for dtype in FORMATS]
    missing = {name_of(*pair): pair for pair in wanted if name_of(*pair) not in known}
    start = time.perf_counter()
    for i, (name, (point, dtype)) in enumerate(missing.items()):
        if time.perf_counter() - start > 60 * minutes:
            console.print(f'{len(missing) - i} points are missing: call again')
            return
        console.print(name)
        command = [__file__, '--point', json.dumps(point), '--dtype', dtype]
        if point['processes'] > 1:
            launch = f'-m torch.distributed.run --nproc-per-node {point["processes"]}'
            command = [*launch.split(), *command]
        known[name] = in_fresh_process(*command)
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps(known | dict(machine=describe_machine()), indent=1))
    console.print('no point is missing: --draw')


def draw(results: dict[str, Any]) -> None:
    """Speed above, memory below; dashed is what the counts make of the reference."""
    figure, axes = plt.subplots(2, len(SERIES), figsize=(15, 6), layout='constrained')
    for (name, (label, values)), (speed, memory) in zip(SERIES.items(), axes.T, strict=True):
        points = make_points(name)
        places = range(len(values))
        for dtype, colour in zip(FORMATS, ('tab:blue', 'tab:orange'), strict=True):
            found = [results[name_of(point, dtype)] for point in points]
            line: dict[str, Any] = dict(color=colour, marker='o', label=f'{dtype}, measured')
            dashes: dict[str, Any] = dict(color=colour, linestyle='--', label=f'{dtype}, counted')
            speed.plot(places, [result['images_per_s'] for result in found], **line)
            speed.plot(places, expect_speed(name, found), **dashes)
            memory.plot(places, [result['peak_gb'] for result in found], **line)
            memory.plot(places, [r['counted_gb'] + RESIDENT / 1e9 for r in found], **dashes)
        for axis in (speed, memory):
            axis.set_xticks(places, [str(value) for value in values])
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        memory.set_xlabel(label)
    axes[0, 0].set_ylabel('images/s, all processes')
    axes[1, 0].set_ylabel('peak of a process, GB')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=4)
    figure.savefig(PICTURE, dpi=90)
    plt.close(figure)


def expect_speed(series: str, found: list[Point]) -> list[float]:
    """Images/s at the reference's operations a second, on as many processes."""
    values = SERIES[series][1]
    reference = found[values.index(REFERENCE[series])]
    flops = reference['images_per_s'] * reference['gflop']
    processes = values if series == 'processes' else [1] * len(values)
    return [n * flops / result['gflop'] for n, result in zip(processes, found, strict=True)]


def write_table(results: dict[str, Any]) -> None:
    """Replace the table of the page."""
    head = ['', 'GFLOP/image']
    for dtype in FORMATS:
        head += [f'{dtype}: images/s', 'GFLOP/s', 'GB', 'counted']
    lines = [head, ['---'] * len(head)]
    for name, (label, _) in SERIES.items():
        for point in make_points(name):
            found = [results[name_of(point, dtype)] for dtype in FORMATS]
            cells = [f'{label}: {point[name]}', f'{found[0]["gflop"]:.0f}']
            for result in found:
                speed = result['images_per_s']
                cells += [f'{speed:.2f}', f'{speed * result["gflop"]:.0f}']
                cells += [f'{result[key]:.1f}' for key in ('peak_gb', 'counted_gb')]
            lines.append(cells)
    table = '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    text = f'Measured on {results["machine"]}.\n\n{table}'
    PAGE.write_text(f'{before}{START}\n{text}\n{END}{after}')


def main() -> None:
    """Measure what is missing, or draw what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--results', type=Path, default=ROOT / 'work_dirs/cost.json')
    parser.add_argument('--minutes', type=float, default=60, help='to stop after')
    parser.add_argument('--draw', action='store_true', help='write picture and table')
    parser.add_argument('--point', type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument('--dtype', choices=FORMATS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        result = measure_point(args.point, args.dtype)
        if is_main_process():
            print(json.dumps(result))
    elif args.draw:
        results = json.loads(args.results.read_text())
        draw(results)
        write_table(results)
    else:
        measure_missing(args.results, args.minutes)


if __name__ == '__main__':
    main()
