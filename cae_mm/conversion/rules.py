"""Rules that say how the keys of another project's checkpoint map to ours, in both directions.

A template stands for many keys: ``{i}`` is a number, ``{p}`` is 'weight' or 'bias', ``{rest}`` is
anything. What a table of rules does not name is an error, in either direction.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from cae_mm.checkpoints.pretrained import name_some

_PLACEHOLDERS = {'i': r'(?P<i>\d+)', 'p': r'(?P<p>weight|bias)', 'rest': r'(?P<rest>.+)'}


@dataclass(frozen=True)
class Rule:
    """What becomes of some keys; the subclass says which of five things.

    Attributes:
        foreign: Template, or several joined by ' + ' whose tensors follow one another along the
            first axis of ours.
        ours: Template with the same placeholders.
        note: For the report.
        pooled: For the final norm, which has two names in most projects: True where it is applied
            to the mean of the patch tokens, False where to each token. None for all other keys.
    """

    foreign: str
    ours: str = ''
    note: str = ''
    pooled: bool | None = None


class Move(Rule):
    """Their tensor is ours, under another name."""


class Same(Rule):
    """A duplicate: their tensor must equal one of ours."""


class Shared(Rule):
    """One tensor of theirs stands for all of ours; only read, we write them one by one."""


class Fixed(Rule):
    """A tensor that we compute, 'positions' for example: theirs must equal it."""


class LeaveOut(Rule):
    """Tensors of theirs that are not taken, and why."""


@dataclass(frozen=True)
class Row:
    """A line of the report: what became of the keys of one rule."""

    foreign: str
    ours: str
    count: int
    note: str = ''


@dataclass
class Translation:
    """What the rules make of a state dict.

    Attributes:
        state: The translated tensors.
        fixed: Key of theirs -> name of what we compute and its tensor, to be compared.
        same: Key of theirs -> our key that must equal it and its tensor, to be compared.
        pooled: Whether the final norm is that of the mean of patch tokens; None without norm.
        rows: The report.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    same: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    pooled: bool | None = None
    rows: list[Row] = field(default_factory=list)

    def report(self, rule: Rule, count: int) -> None:
        """Add a line about ``count`` keys, if there are some."""
        marks = {Same: f'= {rule.ours}', Fixed: '(computed)', LeaveOut: '(left out)'}
        notes = {Shared: 'one table for all blocks', Fixed: f'fixed {rule.ours}'}
        if count:
            note = rule.note or notes.get(type(rule), '')
            self.rows.append(Row(rule.foreign, marks.get(type(rule), rule.ours), count, note))


@cache
def _regex(template: str) -> re.Pattern[str]:
    parts = re.split(r'\{(\w+)\}', template)
    pattern = [_PLACEHOLDERS[p] if i % 2 else re.escape(p) for i, p in enumerate(parts)]
    return re.compile(''.join(pattern))


def match_key(template: str, key: str) -> dict[str, str] | None:
    """Return the values of the placeholders if ``key`` is of the form ``template``."""
    match = _regex(template).fullmatch(key)
    return match.groupdict() if match else None


def to_ours(state: dict[str, Tensor], rules: Sequence[Rule]) -> Translation:
    """Translate another project's state dict, each key by the first rule that names it.

    Raises:
        ValueError: If no rule names a key, a tensor is missing beside others that it belongs to,
            or two tensors of theirs are one of ours.
    """
    result, left = Translation(), dict(state)
    origins: dict[str, str] = {}
    for rule in rules:
        before = len(left)
        for key, ours, tensor in _take(rule, left):
            if isinstance(rule, (Move, Shared)):
                if ours in origins:
                    raise ValueError(
                        f'{key} and {origins[ours]} would both be {ours}: a network with both '
                        'cannot be expressed here'
                    )
                result.state[ours], origins[ours] = tensor, key
            elif isinstance(rule, (Fixed, Same)):
                (result.fixed if isinstance(rule, Fixed) else result.same)[key] = ours, tensor
            if rule.pooled is not None:
                result.pooled = rule.pooled
        result.report(rule, before - len(left))
    if left:
        raise ValueError(f'no rule knows {name_some(list(left))}')
    for key in [key for key in result.state if '{i}' in key]:
        shared, depth = result.state.pop(key), count_blocks(result.state)
        result.state |= {key.format(i=i): shared.clone() for i in range(depth)}
    return result


def _take(rule: Rule, left: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Take what a rule names out of ``left``: first key of theirs, key of ours, and tensor."""
    templates = rule.foreign.split(' + ')
    for key in list(left):
        values = next((v for t in templates if (v := match_key(t, key)) is not None), None)
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
    state: dict[str, Tensor], rules: Sequence[Rule], fixed: dict[str, Tensor], pooled: bool
) -> Translation:
    """Translate our state dict back.

    Args:
        state: Ours.
        rules: The table of the other project.
        fixed: What ``Fixed`` rules write, by name; those not in it are not written.
        pooled: Which of two names the final norm gets.

    Raises:
        ValueError: If no rule names a key.
    """
    result, unknown = Translation(), set(state)
    for rule in rules:
        written = {}
        if isinstance(rule, Fixed) and rule.ours in fixed:
            blocks = range(count_blocks(state) if '{i}' in rule.foreign else 1)
            written = {rule.foreign.format(i=i): fixed[rule.ours].clone() for i in blocks}
        elif isinstance(rule, (Move, Same)) and rule.pooled in (None, pooled):
            templates = rule.foreign.split(' + ')
            for key, tensor in state.items():
                if (values := match_key(rule.ours, key)) is not None:
                    unknown.discard(key)
                    parts = zip(templates, tensor.chunk(len(templates)), strict=True)
                    written |= {t.format(**values): part.clone() for t, part in parts}
        result.state |= written
        result.report(rule, len(written))
    if unknown:
        raise ValueError(f'no rule knows {name_some(sorted(unknown))}')
    return result


def count_blocks(state: dict[str, Tensor], prefix: str = 'backbone.blocks.') -> int:
    """Number of blocks with keys like ``backbone.blocks.0.norm1.weight``."""
    names = (k.removeprefix(prefix) for k in state if k.startswith(prefix))
    return len({name.split('.')[0] for name in names})
