"""All checks in their order, and the report on them."""

import argparse
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import DictAction

from cae_mm.doctor import data, model, training, weights
from cae_mm.doctor.case import LEVELS, Case, Finding, Machine
from cae_mm.doctor.failures import explain

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    model.check_types,
    model.check_model,
    model.check_transforms,
    model.check_views,
    model.check_probe,
    model.check_pretraining_options,
    weights.check_weights,
    weights.check_layer_scale,
    weights.check_positions,
    weights.check_normalization,
    weights.check_second_view,
    training.check_learning_rate,
    training.check_optimizer,
    training.check_precision,
    training.check_sync_bn,
    data.check_data,
)
WIDTH = 100


def lint(
    config: Path,
    machine: Machine,
    options: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
) -> list[Finding]:
    """Check a config.

    Args:
        config: The config file. It is executed, as all configs are; a checkpoint never is.
        machine: What it is going to run on.
        options: Values by key with dots that override the file's.
        checkpoint: The weights that the run is going to start from or to be tested with: whole
            ones, or those of the backbone where it has an ``init_cfg``.

    Returns:
        What was found, errors first.
    """
    if not config.is_file():
        missing = f'{config.absolute()} does not exist'
        return [Finding('error', 'CONFIG', missing, 'give the path of a config')]
    try:
        case = Case.read(config, machine, options or {}, checkpoint)
    except Exception as error:  # a config is a program
        text = f'it cannot be read: {type(error).__name__}: {explain(error)}'
        return [Finding('error', 'CONFIG', text, 'mend the file, or --cfg-options')]
    findings: list[Finding] = []
    for check in CHECKS:
        found = list(check(case))
        findings += [new for new in found if not any(_is_cause(old, new) for old in findings)]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _is_cause(known: Finding, finding: Finding) -> bool:
    """Whether an error was said already, and more precisely, by an earlier check."""
    levels = {known.level, finding.level}
    return levels == {'error'} and f'{known.key}.'.startswith(f'{finding.key}.')


def main(config: Path, checkpoint: Path | None, gpus: int | None, options: Sequence[str]) -> int:
    """Print what is found; return 1 if there is an error, else 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    overrides = parser.parse_args(['--cfg-options', *options] if options else []).cfg_options
    machine = Machine.detect(gpus)
    findings = lint(config, machine, overrides, checkpoint)
    print(f'{config} on {machine}')
    for finding in findings:
        print(format_finding(finding))
    counts = [sum(finding.level == level for finding in findings) for level in LEVELS]
    words = [level if n == 1 else f'{level}s' for n, level in zip(counts, LEVELS, strict=True)]
    print(', '.join(f'{n} {word}' for n, word in zip(counts, words, strict=True)))
    return int(counts[0] > 0)


def format_finding(finding: Finding) -> str:
    """A few lines: level, key and value; what is wrong; the way out."""
    indent = ' ' * 9
    value = f' = {finding.value}' if finding.value else ''
    lines = [f'{finding.level:8} {finding.key}{value}']
    for text in (finding.text, f'-> {finding.remedy}'):
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return '\n'.join(lines)
