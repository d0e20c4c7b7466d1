"""A finding: what is wrong at which key of a config, and the key that an exception is about."""

import re
import reprlib
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from mmengine.registry import build_from_cfg

if TYPE_CHECKING:
    from cae_mm.doctor.case import Case

LEVELS = ('error', 'warning', 'note')
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60
ARGUMENT = re.compile(
    r"\b(\w+)=|argument '(\w+)'|^(\w+) must|Unknown (\w+)|\b([a-z]+(?:_[a-z]+)+)\b"
)


class Finding(NamedTuple):
    """Something that a check noticed."""

    level: str  # one of LEVELS
    key: str  # place in the config, with dots
    text: str
    remedy: str = ''  # '' where the text says it
    value: Any = None  # what stands there

    def __str__(self) -> str:
        """Two or three lines: level, key and value; what is wrong; the way out."""
        value = '' if self.value is None else f' = {SHORT.repr(self.value)}'
        if isinstance(self.value, dict):
            value = f' = dict(type={self.value.get("type")!r}, ...)'
        remedy = f'\n         -> {self.remedy}' if self.remedy else ''
        return f'{self.level:8} {self.key}{value}\n         {self.text}{remedy}'


def explain(error: Exception) -> str:
    """What was raised, on one line and without mmengine's advice."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.partition('. Please check whether the value of')[0]
    return ' '.join(text.split()) or type(error).__name__


def failure(case: 'Case', top: str, error: Exception) -> Finding:
    """A finding about what stands at ``top``, or the place in it that the exception is about."""
    places = [*_places(case, top, error), top]
    text, owner = explain(error), type_name(case.get(places[0]))
    prefix = '' if owner in text else f'{owner}: '
    return case.finding('error', _locate(case, text, places), f'{prefix}{text}')


def _places(case: 'Case', top: str, error: Exception) -> list[str]:
    """Keys of what was being built or run, as the frames of an exception tell, innermost first."""
    modules = dict(case.model.named_modules(prefix='model')) if case.model is not None else {}
    keys = {id(part): key for key, part in (case.transforms | modules).items()}
    places: list[str] = []
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_code is build_from_cfg.__code__:
            kind = frame.f_locals['cfg'].get('type')
            inside = [key for key, _ in case.typed if f'{key}.'.startswith(f'{top}.')]
            places += [key for key in inside if case.get(key)['type'] == kind][:1]
        elif type_name(case.get(keys.get(id(frame.f_locals.get('self')), ''))):
            places.append(keys[id(frame.f_locals['self'])])
    return places


def _locate(case: 'Case', text: str, places: list[str]) -> str:
    """The key that a message names: with dots, by its last part, or by the type of its dict."""
    for name in re.findall(r'[a-z]\w*(?:\.\w+)+', text):
        for key in (name, f'model.{name}'):
            if case.get(key) is not None:
                return key
    nodes = {k: v for k, v in case.typed if k.startswith(('model', 'train_dataloader'))}
    words = re.findall(r'\w+', text)
    named = [key for key, node in nodes.items() if type_name(node) in words]
    arguments = [next(filter(None, groups)) for groups in ARGUMENT.findall(text)]
    for key in (*places, *named, *nodes):
        for argument in arguments:
            if case.get(f'{key}.{argument}') is not None:
                return f'{key}.{argument}'
    return named[0] if named and places[0] in ('model', places[-1]) else places[0]


def type_name(node: Any) -> str:
    """Last part of the type of a dict, '' if it has none."""
    kind = node.get('type', '') if isinstance(node, dict) else ''
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]
