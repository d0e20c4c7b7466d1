"""What a config takes on some processes: counted, measured here, drawn out to its end."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from cae_mm.doctor.case import Case, Machine
from cae_mm.doctor.data import open_training_data
from cae_mm.doctor.finding import explain, failure, type_name
from cae_mm.doctor.trial import find_steps, find_training_key, make_batch
from cae_mm.plan.cost import Cost, count_step, make_fake
from cae_mm.plan.measure import Measurement, forget_weights, measure_loading, measure_steps
from cae_mm.plan.schedule import Schedule, count_images, make_schedule
from cae_mm.precision import Precision, choose_precision

# bytes that a process on a CPU has beside its tensors: Python, libraries, what the allocator keeps
RESIDENT = 1.4e9
CPU_IMAGES = 8  # in a step that is tried on a CPU instead of GPUs


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        config: The config's file.
        machine: What the run is planned for.
        precision: Of the step that was counted.
        is_fake: Whether that step was on fake tensors; if not, it was computed here.
        cost: Of that step.
        images: In the training set, None if nobody knows.
        has_data: Whether the training set is here; else images of noise took its place.
        schedule: None without ``images``.
        measurement: None if nothing was to be measured.
        loading: Images a second that one worker loads here, None without data.
        workers: Of each process.
    """

    config: Path
    machine: Machine
    precision: Precision
    is_fake: bool
    cost: Cost
    images: int | None
    has_data: bool
    schedule: Schedule | None
    measurement: Measurement | None = None
    loading: float | None = None
    workers: int = 0

    @property
    def flops_per_image(self) -> float:
        """Floating-point operations of training on one image."""
        return self.cost.flops / self.cost.images

    @property
    def rate(self) -> float | None:
        """Images a second of all processes, if each is as fast as one that was measured here."""
        return self.measurement.rate * self.machine.processes if self.measurement else None

    @property
    def loading_rate(self) -> float | None:
        """Images a second that all workers load, if each is as fast as one here."""
        return self.loading and self.loading * max(self.workers, 1) * self.machine.processes


def make_plan(
    config: Path,
    machine: Machine,
    options: dict[str, Any] | None = None,
    *,
    images: int | None = None,
    steps: int = 3,
) -> Plan:
    """Plan the run of a config.

    Args:
        config: The config's file; it is executed, as all configs are.
        machine: What the run is planned for.
        options: Values by key with dots that override the file's.
        images: In the training set, where it is not here.
        steps: Updates to take the time of; 0 measures nothing.

    Raises:
        ValueError: If the run cannot start, or its batch does not fit into memory.
    """
    case = Case.read(config, machine, options or {}, None)
    key = _check(case)
    dataset = open_training_data(case, key, large=images is None)
    if isinstance(dataset, Exception):
        raise ValueError(str(failure(case, key, dataset)))
    whole = key == 'train_dataloader.dataset'  # not repeated, and no part of another
    images = images or count_images(config, dataset if whole else None)
    has_data = hasattr(dataset, 'get_data_info')
    schedule = make_schedule(case, images)

    size = case.get('train_dataloader.batch_size')
    data = _succeed(case, key, make_batch, case, key, dataset if has_data else None, size)
    precision = _plan_precision(case)
    cost = case.attempt(_count_fake, case, data, size, precision)
    is_fake = isinstance(cost, Cost)
    here = _fit_here(case)
    if here < size:
        data = make_batch(case, key, dataset if has_data else None, here)
    if not is_fake:
        if not steps:
            raise ValueError(
                'the operations of this model depend on values, and cannot be counted without '
                f'computing them ({explain(cost).partition(" (")[0]}): leave out --no-measure'
            )
        cost = _succeed(case, 'model', _count_real, case, data, here)
    if is_fake and (steps or not _is_elsewhere(case)):
        check_memory(cost, here, '; --no-measure plans without' if _is_elsewhere(case) else '')
    measurement = _succeed(case, 'model', measure_steps, case, data, here, steps) if steps else None
    return Plan(
        config=config,
        machine=machine,
        precision=precision,
        is_fake=is_fake,
        cost=cost,
        images=images,
        has_data=has_data,
        schedule=schedule,
        measurement=measurement,
        loading=measure_loading(case, dataset) if has_data and steps else None,
        workers=case.get('train_dataloader.num_workers', 0),
    )


def check_memory(cost: Cost, images: int, way_out: str = '') -> None:
    """Raise a ValueError if a step of so many images does not fit into the memory that is free."""
    free = find_free_memory()
    per_image = cost.activations / cost.images
    fixed = cost.peak - cost.activations + (0 if torch.cuda.is_available() else RESIDENT)
    need = fixed + per_image * images
    if need > free:
        most = int((free - fixed) / per_image)
        remedy = f'settings.batch_size={most} would' if most > 0 else 'not even one image does'
        raise ValueError(
            f'a step of {images} images takes about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are '
            f'free here: it does not fit, {remedy}{way_out}'
        )


def find_free_memory() -> float:
    """Bytes that are free: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = Path('/proc/meminfo').read_text().splitlines()
    sizes = dict(line.split(':') for line in lines)
    return int(sizes['MemAvailable'].split()[0]) * 1024


def _check(case: Case) -> str:
    """Key of the training set; raise a ValueError if the parts of the run cannot be built."""
    for scope, error in case.unusable_scopes.items():
        raise ValueError(f'{scope} cannot be imported here: {explain(error)}')
    key = find_training_key(case)
    if not (case.get('model') and case.get('optim_wrapper') and case.get('train_cfg') and key):
        raise ValueError(
            'this config trains nothing: it needs model, optim_wrapper, train_cfg and a '
            'train_dataloader with a pipeline'
        )
    if isinstance(case.built, Exception):
        raise ValueError(str(failure(case, 'model', case.built)))
    for step in find_steps(case, key):
        if isinstance(step, Exception):
            raise ValueError(str(failure(case, key, step)))
    return key


def _succeed(case: Case, key: str, function: Any, *args: Any) -> Any:
    """Call a function quietly; what it raises is told with the key that it is about."""
    result = case.attempt(function, *args)
    if isinstance(result, Exception):
        raise ValueError(str(failure(case, key, result))) from result
    return result


def _plan_precision(case: Case) -> Precision:
    """The number format that the planned machine computes in."""
    wrapper = case.get('optim_wrapper')
    if type_name(wrapper) != 'MixedPrecisionOptimWrapper':
        return Precision(torch.float32, 'the config has no MixedPrecisionOptimWrapper')
    wish, device = wrapper.get('dtype', 'auto'), case.machine.device
    if wish == 'auto' and _is_elsewhere(case):
        return Precision(torch.bfloat16, 'assumed of GPUs that are not here')
    return choose_precision(device, wish)


def _fit_here(case: Case) -> int:
    """Images of a step that is to be computed here, fewer where GPUs are planned and not here."""
    size = case.get('train_dataloader.batch_size')
    return min(size, CPU_IMAGES) if _is_elsewhere(case) else size


def _is_elsewhere(case: Case) -> bool:
    return case.machine.device == 'cuda' and not torch.cuda.is_available()


def _count_fake(case: Case, data: Any, images: int, precision: Precision) -> Cost:
    model, data = make_fake(case.model, data)
    wrapper = _build_wrapper(case, model, str(precision.dtype).removeprefix('torch.'))
    wrapper.step = wrapper.optimizer.step  # its own looks at values
    if hasattr(wrapper, 'loss_scaler'):
        wrapper.device_type, wrapper.loss_scaler = 'cpu', torch.amp.GradScaler('cpu', enabled=False)
    return count_step(model.train(), wrapper, data, images, _gathers(case))


def _count_real(case: Case, data: Any, images: int) -> Cost:
    cfg = deepcopy(case.get('model'))
    forget_weights(cfg)
    model = MODELS.build(cfg).to(get_device())
    wrapper = _build_wrapper(case, model)
    return count_step(model.train(), wrapper, data, images, _gathers(case))


def _gathers(case: Case) -> bool:
    return case.get('optim_wrapper.accumulative_counts', 1) > 1


def _build_wrapper(case: Case, model: Any, dtype: str | None = None) -> Any:
    cfg = deepcopy(case.get('optim_wrapper'))
    cfg['accumulative_counts'] = 1
    if dtype and type_name(cfg) == 'MixedPrecisionOptimWrapper':
        cfg['dtype'] = dtype
    return build_optim_wrapper(model, cfg)
