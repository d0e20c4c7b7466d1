"""A plan as tables, and sentences on what of it was counted, measured and assumed."""

from collections.abc import Iterator, Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from cae_mm.plan.plan import RESIDENT, Plan

COLUMNS = {  # of the table of parts
    'params': 'M',
    'trained': 'M',
    'forward': 'GFLOP',
    'backward': 'GFLOP',
    'share': '%',
    'at peak': 'MB',
}
# 10^12 operations a second of GPUs that are not here: a third of an A100's peak, and of an H100's
TFLOPS = (100.0, 330.0)
Row = tuple[str, str, str]  # what, how much, of what it is made


def show(plan: Plan, tflops: Sequence[float] = ()) -> Group:
    """A plan for a terminal.

    Args:
        plan: What was counted and measured.
        tflops: 10^12 operations a second that each process is assumed to do, instead of the speed
            that was measured; a line for each of them.
    """
    if not tflops and plan.machine.device == 'cuda' and not torch.cuda.is_available():
        tflops = TFLOPS
    sections = {
        f'memory of {"each" if plan.machine.processes > 1 else "the"} process': _memory(plan),
        'the recipe': _recipe(plan),
        'speed': _speed(plan, tflops),
    }
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for title, rows in sections.items():
        table.add_row(f'[bold]{title}')
        for row in rows:
            table.add_row(*row)
        table.add_section()
    head = f'{plan.config} on {plan.machine}'
    return Group(head, '', _show_parts(plan), table, *_remarks(plan, tflops))


def _show_parts(plan: Plan) -> Table:
    cost = plan.cost
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f'step of {cost.images} images\n(GFLOP of one)')
    for name, unit in COLUMNS.items():
        table.add_column(f'{name}\n{unit}', justify='right')
    rows = [
        (part.name, part.parameters, part.trained, part.forward, part.backward, part.held)
        for part in cost.parts
    ]
    rows = [row for row in rows if any(row[1:])]
    sums = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    for name, parameters, trained, forward, backward, held in (*rows, ('all', *sums)):
        table.add_row(
            name,
            f'{parameters / 1e6:.1f}',
            f'{trained / 1e6:.1f}',
            f'{forward / cost.images / 1e9:.1f}',
            f'{backward / cost.images / 1e9:.1f}',
            f'{100 * (forward + backward) / max(cost.flops, 1):.0f}',
            f'{held / 1e6:.0f}',
            end_section=name == rows[-1][0],
        )
    return table


def _memory(plan: Plan) -> Iterator[Row]:
    cost, processes = plan.cost, plan.machine.processes
    yield 'weights', _gb(cost.weights), ''
    yield 'gradients', _gb(cost.gradients), 'those that exist at the peak'
    yield 'states of the optimizer', _gb(cost.optimizer), ''
    yield 'activations', _gb(cost.activations), f'{cost.images} images'
    beside = '' if plan.machine.device == 'cuda' else f'and about {RESIDENT / 1e9:g} GB beside them'
    yield 'all tensors at the peak', _gb(cost.peak), beside
    if processes > 1:
        remark = f'FSDP: weights, gradients and states in {processes} shares'
        yield 'the same, sharded', _gb(cost.sharded(processes)), remark
    yield 'a checkpoint on disk', _gb(cost.checkpoint), ''


def _recipe(plan: Plan) -> Iterator[Row]:
    schedule = plan.schedule
    if schedule is None:
        yield 'images of the data', 'unknown', 'the data is not here: say --images N'
        return
    if schedule.epochs and plan.images:
        yield 'images of the data', f'{plan.images:,}', f'{schedule.epochs} epochs'
    factors = f'{schedule.processes} x {schedule.batch_size} x {schedule.gathered} gathered'
    yield 'batch', f'{schedule.batch:,}', factors
    yield 'updates', f'{schedule.updates:,}', f'{100 * schedule.warm_up:.3g} % of them warm-up'
    yield 'steps', f'{schedule.steps:,}', 'of each process'
    yield 'images seen', f'{schedule.images:,}', ''
    yield 'operations', f'{_round(schedule.images * plan.flops_per_image / 1e18)} EFLOP', ''


def _speed(plan: Plan, tflops: Sequence[float]) -> Iterator[Row]:
    measured = plan.measurement
    if measured is not None:
        processes = f'{measured.processes} process{"es" if measured.processes > 1 else ""}'
        images = measured.images // measured.processes
        yield 'a step', f'{measured.seconds:.3g} s', f'{images} images, {processes}, here'
        yield 'images/s of a process', _round(measured.rate), ''
        speed = measured.rate * plan.flops_per_image
        yield 'operations of a process', f'{_round(speed / 1e9)} GFLOP/s', ''
        where = "of the GPU's tensors" if measured.on_gpu else 'of the resident process'
        yield 'peak of memory', _gb(measured.peak), where
    if plan.loading is not None:
        yield 'images/s of a worker', _round(plan.loading), 'loaded and transformed, here'
    for each in tflops:
        rate = 1e12 * each * plan.machine.processes / plan.flops_per_image
        yield from _duration(plan, rate, f'{each:g} TFLOP/s each')
    if plan.rate is not None and not tflops:
        yield from _duration(plan, plan.rate, 'as here')


def _duration(plan: Plan, rate: float, how: str) -> Iterator[Row]:
    """Speed and length of the recipe on all processes, bound by the model or by the data."""
    yield f'on {plan.machine}', f'{_round(rate)} images/s', how
    if plan.loading_rate is not None and plan.loading_rate < rate:
        rate = plan.loading_rate
        workers = f'{max(plan.workers, 1)} x {plan.machine.processes} workers'
        yield 'bound by the data', f'{_round(rate)} images/s', f'of {workers} such as here'
    if plan.schedule is not None:
        hours = plan.schedule.images / rate / 3600
        days = f'{_round(hours / 24)} days' if hours > 48 else ''
        yield '[bold]the recipe takes', f'[bold]{_round(hours)} hours', days


def _remarks(plan: Plan, tflops: Sequence[float]) -> Iterator[str]:
    """What the numbers rest on."""
    data = 'images of the data' if plan.has_data else 'an image of noise, as the data is not here'
    how = 'tensors without memory' if plan.is_fake else 'real tensors'
    yield f'Counted: operations and bytes of a step on {how}, of {data}, in {plan.precision}.'
    measured, processes = plan.measurement, plan.machine.processes
    if measured is not None:
        yield (
            'Measured: some updates of this Runner with random weights on one batch, that is '
            'without loading data, evaluation and checkpoints.'
        )
    if tflops:
        yield 'Assumed: the TFLOP/s that are named; --tflops sets others.'
    elif measured is not None and measured.processes != processes:
        yield (
            f'Assumed: {processes} processes, each as fast as one here, and nothing lost between '
            'them; with --launcher several are measured.'
        )


def _gb(size: float) -> str:
    return f'{size / 1e9:.2f} GB'


def _round(number: float) -> str:
    """Three digits, thousands apart."""
    return f'{float(f"{number:.3g}"):,.10g}'
