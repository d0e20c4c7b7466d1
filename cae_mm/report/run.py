"""What a work directory tells of its run: all that is there, whether it ended or not."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from cae_mm.checkpoints.config_text import read_values
from cae_mm.hooks.collapse import SIGNS
from cae_mm.report.charts import Point
from cae_mm.report.values import flatten

NO_CURVES = {'step', 'iter', 'epoch', 'base_lr', 'time', 'eta'}
LINE = re.compile(r'(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - \S+ - ([A-Z]+) - ?(.*)')
SIGN = re.compile(rf'({"|".join(sign.name for sign in SIGNS)}) is \S+, (below|above) ')
FAULT = re.compile(r'(.+ at iteration \d+ \(epoch \d+\)): (the update is skipped; )?images of this')
# of mmengine about itself: nothing that a user could act upon
NOISE = ('"FileClient" will be deprecated', '"HardDiskBackend" is the alias')
PICTURE = re.compile(r'(.+)_(\d+)')


@dataclass
class Message:
    """Lines of the log that say the same, up to their numbers."""

    text: str  # of the first
    time: str
    count: int = 1


@dataclass
class Run:
    """A run, read from the files in its work directory when they are first asked for.

    Attributes:
        folder: The work directory.
        problems: What could not be read, for the user.
    """

    folder: Path
    name: str = ''
    problems: list[str] = field(default_factory=list)

    @cached_property
    def parts(self) -> list[Path]:
        """Folders that the run wrote to, one each time it was started, in order."""
        return sorted({path.parent for path in self.folder.glob('*/vis_data')})

    @cached_property
    def config(self) -> dict[str, Any]:
        """Values of the config by dotted key; of the last part."""
        candidates = [part / 'vis_data/config.py' for part in reversed(self.parts)]
        for path in [*candidates, *sorted(self.folder.glob('*.py'))]:
            if path.is_file():
                try:
                    return flatten(read_values(path.read_bytes()))
                except (ValueError, OSError) as error:
                    self.problems.append(f'{path} cannot be read: {error}')
        return {}

    @cached_property
    def curves(self) -> dict[tuple[str, str], list[Point]]:
        """Points (step, value) of each number, by its unit ('iteration' or 'epoch') and name.

        A part that was resumed replaces what an earlier one did after the place it began at.
        """
        by_epoch = self.config.get('default_hooks.logger.log_metric_by_epoch', True)
        metrics = 'epoch' if by_epoch else 'iteration'
        curves: dict[tuple[str, str], list[Point]] = {}
        for part in self.parts:
            lines = list(self._read_lines(part / 'vis_data/scalars.json'))
            if first := next((line for line in lines if 'iter' in line), None):
                begin = {'iteration': first['iter'], 'epoch': first.get('epoch', math.inf)}
                for (unit, _), points in curves.items():
                    points[:] = [point for point in points if point[0] < begin[unit]]
            for line in lines:
                unit = 'iteration' if 'iter' in line else metrics
                for name in line.keys() - NO_CURVES:
                    if isinstance(line[name], int | float):
                        point = (float(line['step']), float(line[name]))
                        curves.setdefault((unit, name), []).append(point)
        return {key: points for key, points in curves.items() if points}

    def _read_lines(self, path: Path) -> Iterator[dict[str, Any]]:
        if not path.is_file():
            return
        texts = path.read_bytes().splitlines()
        for number, text in enumerate(texts, start=1):
            try:
                line = json.loads(text)
                if not all(
                    isinstance(line[key], int) for key in {'step', 'iter'} & {*line, 'step'}
                ):
                    raise ValueError('its step is no number')
            except (ValueError, TypeError, KeyError) as error:
                if number < len(texts):  # the last may be half written
                    self.problems.append(f'{path}, line {number} is left out: {error}')
            else:
                yield line

    @cached_property
    def log(self) -> list[tuple[str, str, str]]:
        """Time, level and text of all lines of the log; a text may have several lines."""
        entries: list[list[str]] = []
        for part in self.parts:
            for path in sorted(part.glob('*.log')):
                with path.open(encoding='utf-8', errors='replace') as file:
                    for line in file:
                        if match := LINE.match(line):
                            entries.append([*match.groups()])
                        elif entries:
                            entries[-1][2] += f'\n{line.rstrip()}'
        return [(time, level, text) for time, level, text in entries]

    @cached_property
    def environment(self) -> dict[str, str]:
        """What the log says of machine and versions, by name; of the last part."""
        found: dict[str, str] = {}
        for _, _, text in self.log:
            if 'System environment:' in text:
                lines = re.findall(r'^    (\w[^:\n]*): (.*)$', text, re.MULTILINE)
                found = {name: value for name, value in lines if 'compiling details' not in name}
            elif text.startswith('precision: '):
                found['precision'] = text.removeprefix('precision: ').split('\n')[0]
        return found

    @cached_property
    def warnings(self) -> list[Message]:
        """Warnings and errors that no monitor is the source of."""
        messages: dict[str, Message] = {}
        for time, level, text in self.log:
            kinds = (*NOISE,) if level in ('WARNING', 'ERROR', 'CRITICAL') else ('',)
            ours = SIGN.match(text) or FAULT.match(text) or 'images cannot be read, see' in text
            if ours or text.startswith(kinds):
                continue
            key = re.sub(r'\d+', '#', text)
            if key in messages:
                messages[key].count += 1
            else:
                messages[key] = Message(text.split('\n')[0], time)
        return list(messages.values())

    @cached_property
    def signs(self) -> list[tuple[str, bool]]:
        """What ``CollapseHook`` said, and whether it said later that this is over."""
        told: dict[str, tuple[str, bool]] = {}
        for _, _, text in self.log:
            if match := SIGN.match(text):
                name, side = match.groups()
                told[name] = (text, False) if side == 'below' else (told.get(name, ('',))[0], True)
        return [sign for sign in told.values() if sign[0]]

    @cached_property
    def faults(self) -> list[str]:
        """Steps whose numbers are not finite, as the log tells of them."""
        return [match[1] for _, _, text in self.log if (match := FAULT.match(text))]

    @cached_property
    def fault_files(self) -> list[Path]:
        """Steps that can be repeated."""
        return sorted(self.folder.glob('faults/iter_*.json'))

    @cached_property
    def unreadable(self) -> list[str]:
        """Images that were left out, with reasons."""
        path = self.folder / 'unreadable.txt'
        text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
        return [line.replace('\t', ': ') for line in text.split('\n') if line]

    @cached_property
    def pictures(self) -> dict[str, dict[int, Path]]:
        """Sheets by name and step."""
        found: dict[str, dict[int, Path]] = {}
        for part in self.parts:
            for path in sorted(part.glob('vis_data/vis_image/*.png')):
                try:
                    with Image.open(path) as image:
                        image.verify()
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    self.problems.append(f'{path} is left out: {error}')
                    continue
                if match := PICTURE.fullmatch(path.stem):
                    found.setdefault(match[1], {})[int(match[2])] = path
        return {name: dict(sorted(steps.items())) for name, steps in sorted(found.items())}

    @cached_property
    def finished(self) -> bool:
        """Whether there is a checkpoint of the last epoch or iteration."""
        limits = {'epoch': 'max_epochs', 'iter': 'max_iters'}
        names = (f'{unit}_{self.config.get(f"train_cfg.{key}")}' for unit, key in limits.items())
        return any((self.folder / f'{name}.pth').is_file() for name in names)

    @cached_property
    def progress(self) -> str:
        """How far it came."""
        steps = [points[-1][0] for (unit, _), points in self.curves.items() if unit == 'iteration']
        if not steps:
            return 'no line of numbers yet' if self.parts else 'not trained'
        epochs = [re.match(r'Epoch\(train\) +\[(\d+)\]', text) for _, _, text in self.log]
        reached = next((match[1] for match in reversed(epochs) if match), None)
        limit = self.config.get('train_cfg.max_epochs')
        where = f'epoch {reached} of {limit}, ' if reached and limit else ''
        return f'{where}iteration {max(steps):.0f}'

    def watches(self, hook: str) -> bool:
        """Whether the run had a hook."""
        return f'custom_hooks.{hook}.type' in self.config
