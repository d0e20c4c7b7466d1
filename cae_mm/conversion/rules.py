"""Rules that say how the keys of another project's checkpoint map to ours, in both directions.

A template stands for many keys: ``{i}`` is a number, ``{p}`` is 'weight' or 'bias', ``{rest}`` is
anything. What a table of rules does not name is an error, in either direction.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

_PLACEHOLDERS = {'i': r'(?P<i>\d+)', 'p': r'(?P<p>weight|bias)', 'rest': r'(?P<rest>.+)'}


@dataclass(frozen=True)
class Move:
    """One or more tensors of theirs, one after the other along the first axis, are one of ours.

    Attributes:
        theirs: Templates with the same placeholders as ``ours``.
        ours: Template.
        pooled: For the final norm, which has two names in most projects: True where it is applied
            to the mean of the patch tokens, False where to each token. None for all other keys.
    """

    theirs: tuple[str, ...]
    ours: str
    pooled: bool | None = None


@dataclass(frozen=True)
class Same:
    """A duplicate: the tensor of theirs must equal one of ours."""

    theirs: str
    ours: str
    reason: str


@dataclass(frozen=True)
class Shared:
    """One tensor of theirs stands for all of ours; only read, we write them one by one."""

    theirs: str
    ours: str


@dataclass(frozen=True)
class Fixed:
    """A tensor that we compute: theirs must equal it.

    Attributes:
        theirs: Template.
        what: 'positions', 'neck_positions' or 'relative_position_index'.
    """

    theirs: str
    what: str


@dataclass(frozen=True)
class LeaveOut:
    """Tensors of theirs that are not taken, and why."""

    theirs: str
    reason: str


Rule: TypeAlias = Move | Same | Shared | Fixed | LeaveOut


@dataclass(frozen=True)
class Row:
    """A line of the report: what became of the keys of one rule."""

    theirs: str
    ours: str
    count: int
    note: str = ''


@dataclass
class Translation:
    """What the rules make of a state dict.

    Attributes:
        state: The translated tensors.
        fixed: Key of theirs -> what it must equal and its tensor, to be compared.
        same: Key of theirs -> key of ours that must equal it and its tensor, to be compared.
        unknown: Keys that no rule names.
        incomplete: Keys of theirs that are missing beside others which they belong to.
        pooled: Whether the final norm is that of the mean of patch tokens; None without norm.
        rows: The report.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    same: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    pooled: bool | None = None
    rows: list[Row] = field(default_factory=list)


@cache
def _regex(template: str) -> re.Pattern[str]:
    parts = re.split(r'\{(\w+)\}', template)
    pattern = [_PLACEHOLDERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts)]
    return re.compile(''.join(pattern))


def match_key(template: str, key: str) -> dict[str, str] | None:
    """Return the values of the placeholders if ``key`` is of the form ``template``."""
    found = _regex(template).fullmatch(key)
    return found.groupdict() if found else None


def find_rule(key: str, rules: Sequence[Rule]) -> tuple[Rule, dict[str, str]] | None:
    """Return the first rule with a template of theirs that fits ``key``."""
    for rule in rules:
        for template in rule.theirs if isinstance(rule, Move) else (rule.theirs,):
            values = match_key(template, key)
            if values is not None:
                return rule, values
    return None


def to_ours(state: dict[str, Tensor], rules: Sequence[Rule]) -> Translation:
    """Translate another project's state dict; nothing is lost silently.

    Raises:
        ValueError: If two tensors of theirs are one of ours.
    """
    result = Translation()
    counts: dict[Rule, int] = {}
    groups: dict[str, tuple[Move, dict[str, str]]] = {}
    for key, tensor in state.items():
        found = find_rule(key, rules)
        if found is None:
            result.unknown.append(key)
            continue
        rule, values = found
        counts[rule] = counts.get(rule, 0) + 1
        if isinstance(rule, Move):
            target = rule.ours.format(**values)
            if groups.setdefault(target, (rule, values))[0] is not rule:
                raise ValueError(
                    f'{key} and {groups[target][0].theirs[0].format(**values)} would both be '
                    f'{target}: a network with both cannot be expressed here'
                )
        elif isinstance(rule, Same):
            result.same[key] = (rule.ours.format(**values), tensor)
        elif isinstance(rule, Fixed):
            result.fixed[key] = (rule.what, tensor)
        elif isinstance(rule, Shared):
            result.state[rule.ours] = tensor  # for all {i}, filled in when the depth is known
    for target, (rule, values) in groups.items():
        names = [template.format(**values) for template in rule.theirs]
        missing = [name for name in names if name not in state]
        result.incomplete += missing
        if not missing:
            parts = [state[name] for name in names]
            result.state[target] = parts[0] if len(parts) == 1 else torch.cat(parts)
        if rule.pooled is not None:
            result.pooled = rule.pooled
    result.rows = [_row(rule, counts[rule]) for rule in rules if rule in counts]
    return result


def to_theirs(
    state: dict[str, Tensor],
    rules: Sequence[Rule],
    fixed: dict[str, Tensor],
    pooled: bool,
) -> Translation:
    """Translate our state dict back.

    Args:
        state: Ours.
        rules: The table of the other project.
        fixed: What ``Fixed`` rules write, by name; those not in it are not written.
        pooled: Which of two names the final norm gets.
    """
    result = Translation(pooled=pooled)
    counts: dict[Rule, int] = {}
    for key, tensor in state.items():
        written = len(result.state)
        for rule in rules:
            if not isinstance(rule, (Move, Same)):
                continue
            values = match_key(rule.ours, key)
            if values is None or getattr(rule, 'pooled', None) not in (None, pooled):
                continue
            counts[rule] = counts.get(rule, 0) + 1
            templates = rule.theirs if isinstance(rule, Move) else (rule.theirs,)
            for template, part in zip(templates, tensor.chunk(len(templates)), strict=True):
                result.state[template.format(**values)] = part.clone()
        if len(result.state) == written:
            result.unknown.append(key)
    depth = count_blocks(state)
    for rule in rules:
        if isinstance(rule, Fixed) and rule.what in fixed:
            numbers = range(depth) if '{i}' in rule.theirs else range(1)
            for i in numbers:
                result.state[rule.theirs.format(i=i)] = fixed[rule.what].clone()
            counts[rule] = len(numbers)
    result.rows = [_row(rule, counts[rule]) for rule in rules if rule in counts]
    return result


def count_blocks(state: dict[str, Tensor], prefix: str = 'backbone.blocks.') -> int:
    """Number of blocks with keys like ``backbone.blocks.0.norm1.weight``."""
    names = (k.removeprefix(prefix) for k in state if k.startswith(prefix))
    return len({name.split('.')[0] for name in names} - {'{i}'})


def _row(rule: Rule, count: int) -> Row:
    if isinstance(rule, Move):
        return Row(' + '.join(rule.theirs), rule.ours, count)
    if isinstance(rule, Same):
        return Row(rule.theirs, f'= {rule.ours}', count, rule.reason)
    if isinstance(rule, Shared):
        return Row(rule.theirs, rule.ours, count, 'one table for all blocks')
    if isinstance(rule, Fixed):
        return Row(rule.theirs, '(computed)', count, f'fixed {rule.what}')
    return Row(rule.theirs, '(left out)', count, rule.reason)
