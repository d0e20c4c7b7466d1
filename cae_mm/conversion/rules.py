"""Rules that say how the keys of another project's checkpoint map to ours, in both directions.

A template stands for many keys: ``{i}`` is a number, ``{p}`` is 'weight' or 'bias', ``{rest}`` is
anything. What a table of rules does not name is an error, in either direction.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from cae_mm.checkpoints.pretrained import name_some

_PLACEHOLDERS = {'i': r'(?P<i>\d+)', 'p': r'(?P<p>weight|bias)', 'rest': r'(?P<rest>.+)'}


@dataclass(frozen=True)
class Rule:
    """What becomes of some keys; the subclass says which of three things.

    Attributes:
        foreign: Template, or several joined by ' + ' whose tensors follow one another along the
            first axis of ours.
        ours: Template with the same placeholders. Where only this one has ``{i}``, one tensor of
            theirs stands for those of all blocks; that is read, but not written.
        note: For the report.
        pooled: For the final norm, which has two names in most projects: True where it is applied
            to the mean of the patch tokens, False where to each token. None for all other keys.
    """

    foreign: str
    ours: str = '(left out)'
    note: str = ''
    pooled: bool | None = None

    def foreign_keys(self, key: str) -> list[str]:
        """Their keys whose tensors make up our ``key``; none if the rule is about other keys."""
        values = _match(self.ours, key)
        return [] if values is None else [t.format(**values) for t in self.foreign.split(' + ')]


class Move(Rule):
    """Their tensor is ours, under another name."""


class Check(Rule):
    """Their tensor must equal one of ours, or one that we compute ('positions', for example)."""


class LeaveOut(Rule):
    """Tensors of theirs that are not taken, and why."""


class Translation(NamedTuple):
    """What the rules make of another project's state dict."""

    state: dict[str, Tensor]  # under our names
    # key of theirs -> what must equal it, a key of ours or of what we compute, and its tensor
    checks: dict[str, tuple[str, Tensor]]
    counts: dict[Rule, int]  # keys that each rule named


@cache
def _regex(template: str) -> re.Pattern[str]:
    parts = re.split(r'\{(\w+)\}', template)
    pattern = [_PLACEHOLDERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts)]
    return re.compile(''.join(pattern))


def _match(template: str, key: str) -> dict[str, str] | None:
    """Return the values of the placeholders if ``key`` is of the form ``template``."""
    match = _regex(template).fullmatch(key)
    return match.groupdict() if match else None


def to_ours(state: dict[str, Tensor], rules: Sequence[Rule]) -> Translation:
    """Translate another project's state dict, each key by the first rule that names it."""
    result, left = Translation({}, {}, {}), dict(state)
    origins: dict[str, str] = {}
    for rule in rules:
        before = len(left)
        for key, ours, tensor in _take(rule, left):
            if isinstance(rule, Check):
                result.checks[key] = ours, tensor
            elif isinstance(rule, Move):
                if ours in origins:
                    raise ValueError(
                        f'{key} and {origins[ours]} would both be {ours}: a network with both '
                        'cannot be expressed here'
                    )
                result.state[ours], origins[ours] = tensor, key
        if len(left) < before:
            result.counts[rule] = before - len(left)
    if left:
        raise ValueError(f'no rule knows {name_some(list(left))}')
    for key in [key for key in result.state if '{i}' in key]:
        shared, depth = result.state.pop(key), count_blocks(result.state)
        result.state.update({key.format(i=i): shared.clone() for i in range(depth)})
    return result


def _take(rule: Rule, left: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Take what a rule names out of ``left``: first key of theirs, key of ours, and tensor."""
    templates = rule.foreign.split(' + ')
    for key in list(left):
        values = next((v for t in templates if (v := _match(t, key)) is not None), None)
        if values is None or key not in left:  # or taken together with another
            continue
        keys = [template.format(**values) for template in templates]
        missing = [key for key in keys if key not in left]
        if missing:
            raise ValueError(f'{name_some(missing)} is missing')
        parts = [left.pop(key) for key in keys]
        ours = rule.ours.format_map({'i': '{i}'} | values)  # {i} alone stands for all blocks
        yield keys[0], ours, parts[0] if len(parts) == 1 else torch.cat(parts)


def to_foreign(
    state: dict[str, Tensor], computed: dict[str, Tensor], rules: Sequence[Rule], pooled: bool
) -> tuple[dict[str, Tensor], dict[Rule, int]]:
    """Translate our state dict back, and count the keys that each rule made.

    What others store beside it, ``computed``, is written where a rule names it.
    """
    weights: dict[str, Tensor] = {}
    counts: dict[Rule, int] = {}
    unknown = set(state)
    for rule in rules:
        shared = '{i}' in rule.ours and '{i}' not in rule.foreign
        if shared or rule.pooled not in (None, pooled):
            continue
        before = len(weights)
        for key, tensor in (state | computed).items():
            if names := rule.foreign_keys(key):
                unknown.discard(key)
                parts = zip(names, tensor.chunk(len(names)), strict=True)
                weights |= {name: part.clone() for name, part in parts}
        if len(weights) > before:
            counts[rule] = len(weights) - before
    if unknown:
        raise ValueError(f'no rule knows {name_some(sorted(unknown))}')
    return weights, counts


def print_counts(title: str, counts: dict[Rule, int], remarks: Sequence[str]) -> None:
    """Print a table of what became of each key, and what was assumed."""
    columns = (Column(name, overflow='fold') for name in ('theirs', 'ours', 'keys', 'note'))
    table = Table(*columns, title=title)
    for rule, count in counts.items():
        ours = f'= {rule.ours}' if isinstance(rule, Check) else rule.ours
        table.add_row(rule.foreign, ours, str(count), rule.note)
    console = Console()
    console.print(table)
    for remark in remarks:
        console.print(f'note: {remark}', style='yellow', highlight=False)


def count_blocks(state: dict[str, Tensor], prefix: str = 'backbone.blocks.') -> int:
    """Number of blocks with keys like ``backbone.blocks.0.norm1.weight``."""
    names = (k.removeprefix(prefix) for k in state if k.startswith(prefix))
    return len({name.split('.')[0] for name in names})
