"""What a recipe comes to on a number of processes: images, steps, updates, warm-up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cae_mm.doctor.case import Case
from cae_mm.doctor.finding import type_name
from cae_mm.engine.settings import find_schedulers

# images of the training sets that our configs are for, by the last field of a config's name
KNOWN_IMAGES = {
    'in1k': 1_281_167,
    'ade20k': 20_210,
    'coco': 117_266,  # those with objects
    'food101': 75_750,
    'imagenette': 9_469,
}


@dataclass(frozen=True)
class Schedule:
    """A training from its first to its last step.

    Attributes:
        processes: That train together.
        batch_size: Images in a step of one process.
        gathered: Steps whose gradients make an update.
        steps: Of each process, from first to last.
        updates: Of the parameters.
        epochs: None where the config counts iterations.
        warm_up: Share of the training in which the learning rate grows.
    """

    processes: int
    batch_size: int
    gathered: int
    steps: int
    updates: int
    epochs: int | None
    warm_up: float

    @property
    def batch(self) -> int:
        """Images of an update."""
        return self.processes * self.batch_size * self.gathered

    @property
    def images(self) -> int:
        """Images seen by all processes in the whole training."""
        return self.processes * self.batch_size * self.steps


def count_images(config: Path, dataset: Any) -> int | None:
    """Images of a training set that is here, or whose name is known; None if it is neither."""
    if dataset is not None:
        return len(dataset)
    name = config.stem.rpartition('_')[2].partition('-')[0]
    return KNOWN_IMAGES.get(name)


def make_schedule(case: Case, images: int | None) -> Schedule | None:
    """Follow a config over its whole training; None if nobody knows how many images there are.

    Raises:
        ValueError: If an epoch has no step.
    """
    loop, loader = case.get('train_cfg'), case.get('train_dataloader')
    batch_size, processes = loader['batch_size'], case.machine.processes
    gathered = case.get('optim_wrapper.accumulative_counts', 1)
    epochs = loop.get('max_epochs')
    if epochs is None:
        steps, updates = loop['max_iters'], -(-loop['max_iters'] // gathered)
        warm_up = _find_warm_up(case, by_epoch=False) / steps
    elif images is None:
        return None
    else:
        share = -(-images // processes)  # as the sampler deals
        length = share // batch_size if loader.get('drop_last') else -(-share // batch_size)
        if not length:
            raise ValueError(
                f'{images} images are {share} a process, less than a batch of {batch_size}: set '
                f'settings.batch_size={share} or less'
            )
        steps, updates = epochs * length, epochs * -(-length // gathered)  # none across epochs
        warm_up = _find_warm_up(case, by_epoch=True) / epochs
    return Schedule(processes, batch_size, gathered, steps, updates, epochs, warm_up)


def _find_warm_up(case: Case, by_epoch: bool) -> float:
    """Epochs, or iterations, until the learning rate has grown to its full value."""
    for scheduler in find_schedulers(case):
        starts = type_name(scheduler) == 'LinearLR' and not scheduler.get('begin')
        if starts and scheduler.get('by_epoch', True) == by_epoch:
            return scheduler['end']
    return 0
