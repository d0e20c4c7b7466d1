"""Repeat a training step whose numbers are not finite, and see where it breaks."""

import ast
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import IterBasedTrainLoop
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cae_mm.checkpoints.files import read_checkpoint
from cae_mm.engine.faults import Batch, Fault, read_fault
from cae_mm.engine.runner import CAERunner
from cae_mm.hooks.schedules import ScheduleHook
from cae_mm.seeds import STEP, seed_everything_for


@dataclass
class Findings:
    """What a step gave when it was repeated.

    Attributes:
        fault: The step as the run had it.
        losses: All numbers of the last batch, as in ``Fault.losses``.
        modules: Names of modules whose output is not finite, in the order in which they ended; the
            first one is where the numbers broke.
        gradients: Names of parameters whose gradients are not finite.
        parameters: How many parameters have gradients.
    """

    fault: Fault
    losses: dict[str, float] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    parameters: int = 0

    def __str__(self) -> str:
        """Say it in plain words."""
        fault = self.fault
        lines = [f'{fault}, process {fault.rank} of {fault.world_size}, {fault.precision}']
        lines += [f'  {path}' for batch in fault.batches for path in batch.images]
        lines.append(f'{"":20}{"in the run":>16}{"here":>16}')
        for name, number in self.losses.items():
            before = fault.losses.get(name, math.nan)
            lines.append(f'{name:20}{before:16.9g}{number:16.9g}')
        first = self.modules[0] if self.modules else 'none'
        lines.append(f'first module whose output is not finite: {first}')
        shown = ', '.join(self.gradients[:5]) + (', ...' if len(self.gradients) > 5 else '')
        text = f'parameters with gradients that are not finite: {len(self.gradients)}'
        lines.append(f'{text} of {self.parameters}{f" ({shown})" if shown else ""}')
        if not self.modules and not self.gradients:
            lines.append(
                'Nothing breaks here: look at the file of another process, and remember that on '
                'GPUs the weights are of up to one logging interval later'
            )
        return '\n'.join(lines)


def replay(path: str | Path) -> Findings:
    """Repeat the step of a file that ``NumericalFaultHook`` wrote, on this machine's device.

    Data is looked for where the run found it; nothing beside the file is executed.

    Raises:
        ValueError: If the file is none of these, or the data is not what it was.
    """
    fault, folder = read_fault(path), Path(path).parent
    with _as_process(fault.rank, fault.world_size), TemporaryDirectory() as work_dir:
        runner = _build_runner(fault, folder, work_dir)
        findings = Findings(fault)
        with _watch_outputs(runner.model, findings.modules):
            for batch in fault.batches:
                data = _read_batch(runner, batch)
                findings.losses = _run_step(runner, fault, batch, data)
    params = {n: p.grad for n, p in runner.model.named_parameters() if p.grad is not None}
    findings.parameters = len(params)
    findings.gradients = [n for n, grad in params.items() if not grad.isfinite().all()]
    return findings


@contextmanager
def _as_process(rank: int, processes: int) -> Iterator[None]:
    """Let samplers think that they are those of one of several processes; nothing is sent."""
    if processes == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group('fake', store=FakeStore(), rank=rank, world_size=processes)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _build_runner(fault: Fault, folder: Path, work_dir: str) -> CAERunner:
    """Build model, data and precision of the run; only the step's weights are loaded."""
    cfg = Config(ast.literal_eval((folder / fault.config).read_text(encoding='utf-8')))
    import_modules_from_strings(**cfg.get('custom_imports', {'imports': []}))
    for key in ('fsdp', 'compile', 'model_wrapper_cfg'):
        cfg.pop(key, None)
    cfg.update(work_dir=work_dir, experiment_name=Path(work_dir).name, launcher='none')
    cfg.update(resume=False, load_from=None)
    loader = dict(num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0)
    cfg.train_dataloader.update(loader)
    if 'MixedPrecision' in cfg.optim_wrapper.get('type', ''):
        cfg.optim_wrapper.dtype = fault.precision
    runner = CAERunner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner._init_model_weights()  # tokenizers load theirs
    runner.model.load_state_dict(read_checkpoint(folder / fault.weights).state)
    runner.model.train()
    return runner


def _read_batch(runner: CAERunner, batch: Batch) -> dict[str, Any]:
    """Read and transform the images of a step again, with the random numbers that it had."""
    loop: Any = runner._train_loop
    loop._iter, loop._epoch = batch.iteration, batch.epoch
    if isinstance(loop, IterBasedTrainLoop):
        data = next(loop.dataloader.endless_from(batch.iteration))
    else:
        sampler = loop.dataloader.batch_sampler.sampler
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(batch.epoch)
        data = next(loop.dataloader.epoch_from(batch.iteration, batch.index))
    images = [sample.get('img_path', 'unknown') for sample in data['data_samples']]
    if images != batch.images:
        raise ValueError(
            f'the data is not what it was: the batch of iteration {batch.iteration + 1} had '
            f'{batch.images}, now it has {images}'
        )
    return data


def _run_step(
    runner: CAERunner, fault: Fault, batch: Batch, data: dict[str, Any]
) -> dict[str, float]:
    """Run forward and backward pass, and return the numbers of the log."""
    model: Any = runner.model
    for hook in runner.hooks:
        if isinstance(hook, ScheduleHook):
            hook.before_train_iter(runner, batch.index)
    seed_everything_for(fault.seed, STEP, batch.iteration, fault.rank)
    with runner.optim_wrapper.optim_context(model):
        losses = model._run_forward(model.data_preprocessor(data, True), mode='loss')
    loss, numbers = model.parse_losses(losses)
    loss.backward()
    return {name: x.item() for name, x in numbers.items()}


@contextmanager
def _watch_outputs(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Append the names of modules when an output of theirs is not finite."""

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
            if not all(x.isfinite().all() for x in tensors) and name not in names:
                names.append(name)

        return look

    hooks = [module.register_forward_hook(watch(n)) for n, module in model.named_modules() if n]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
