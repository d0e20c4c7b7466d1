"""All checks of a config in their order, and the report on them."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import DictAction

from cae_mm.doctor import data, names, pretraining, training, trial, weights
from cae_mm.doctor.case import Case, Machine
from cae_mm.doctor.finding import LEVELS, Finding, explain

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    names.check_names,
    trial.check_build,
    weights.check_weights,
    pretraining.check_pretrained,
    pretraining.check_views,
    pretraining.check_transforms,
    training.check_learning_rate,
    training.check_precision,
    training.check_sync_bn,
    training.check_probe,
    data.check_data,
    trial.check_batch,
)


def diagnose(
    config: Path,
    machine: Machine,
    options: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
) -> list[Finding]:
    """Check a config for a machine; return what is wrong, errors first.

    Args:
        config: The config file. It is executed, as all configs are; a checkpoint never is.
        machine: What it is going to run on.
        options: Values by key with dots that override the file's.
        checkpoint: The weights that the run is going to start from or to be tested with.
    """
    try:
        case = Case.read(config, machine, options or {}, checkpoint)
    except Exception as error:  # a config is a program
        return [
            Finding(
                'error', 'CONFIG', f'it cannot be read: {type(error).__name__}: {explain(error)}'
            )
        ]
    findings: list[Finding] = []
    for check in CHECKS:
        new = list(check(case))
        findings += [one for one in new if not any(_is_cause(known, one) for known in findings)]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _is_cause(known: Finding, finding: Finding) -> bool:
    """Whether an error was said already, and more precisely, by an earlier check."""
    are_errors = known.level == finding.level == 'error'
    return are_errors and f'{known.key}.'.startswith(f'{finding.key}.')


def main(config: Path, checkpoint: Path | None, gpus: int | None, options: Sequence[str]) -> int:
    """Print what is found; return 1 if there is an error, else 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    overrides = parser.parse_args(['--cfg-options', *options] if options else []).cfg_options
    machine = Machine.detect(gpus)
    findings = diagnose(config, machine, overrides, checkpoint)
    print(f'{config} on {machine}', *findings, sep='\n')
    counts = [sum(finding.level == level for finding in findings) for level in LEVELS]
    words = [level if n == 1 else f'{level}s' for n, level in zip(counts, LEVELS, strict=True)]
    print(', '.join(f'{n} {word}' for n, word in zip(counts, words, strict=True)))
    return int(counts[0] > 0)
