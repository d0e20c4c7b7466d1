"""A step whose numbers are not finite, as a file from which it can be repeated."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Batch:
    """The images of one process in one step, and the numbers that all of its randomness is of."""

    iteration: int  # of the run, from 0
    epoch: int  # from 0
    index: int  # of the batch in its epoch, from 0
    images: list[str]


@dataclass
class Fault:
    """One fault as one process saw it.

    Attributes:
        reason: What is not finite.
        losses: All numbers of the last batch that the log would have; of one with a broken loss.
        batches: Those that may be the cause: one, or all whose gradients were gathered.
        seed: Of the run.
        rank, world_size: Number of the process, and of processes.
        precision: Format of the step: 'float32', 'bfloat16' or 'float16'.
        config: File beside this one: the whole config of the run, a dict of plain Python values.
        weights: File beside this one: the model's weights when the fault was noticed.
    """

    reason: str
    losses: dict[str, float]
    batches: list[Batch]
    seed: int
    rank: int
    world_size: int
    precision: str
    config: str
    weights: str

    @property
    def iteration(self) -> int:
        """Of the last batch, from 1, as logs count."""
        return self.batches[-1].iteration + 1

    def __str__(self) -> str:
        """Say what and when, counted as logs do."""
        epoch = self.batches[-1].epoch + 1
        return f'{self.reason} at iteration {self.iteration} (epoch {epoch})'

    @property
    def file_name(self) -> str:
        """Where it is written."""
        return f'iter_{self.iteration}_rank_{self.rank}.json'

    def write(self, folder: Path) -> None:
        """Write it as JSON, which has no word for numbers that are not finite: they are strings."""
        content: dict[str, Any] = asdict(self)
        numbers = content['losses'].items()
        content['losses'] = {name: x if math.isfinite(x) else str(x) for name, x in numbers}
        (folder / self.file_name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def read_fault(path: str | Path) -> Fault:
    """Read what ``Fault.write`` wrote.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        content['losses'] = {name: float(x) for name, x in content['losses'].items()}
        content['batches'] = [Batch(**batch) for batch in content['batches']]
        fault = Fault(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} does not describe a fault of a run: {error}') from error
    for name in (fault.config, fault.weights):
        if Path(name).name != name:
            raise ValueError(f'{path} names {name}, which does not lie beside it')
    return fault
