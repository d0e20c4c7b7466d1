"""All checks of a config in their order, and the report on them."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cae_mm.doctor import data, names, pretraining, training, trial, weights
from cae_mm.doctor.case import Case, Machine
from cae_mm.doctor.finding import LEVELS, Finding, explain
from cae_mm.engine.cli import add_config_arguments

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    names.check_names,
    trial.check_build,
    weights.check_weights,
    pretraining.check_pretrained,
    pretraining.check_tokenizer,
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
        text = f'it cannot be read: {type(error).__name__}: {explain(error)}'
        return [Finding('error', 'CONFIG', text)]
    findings: list[Finding] = []
    for check in CHECKS:
        causes = [f'{known.key}.' for known in findings if known.level == 'error']
        findings += [  # but for errors that an earlier check told, and more precisely
            new
            for new in check(case)
            if new.level != 'error' or not any(key.startswith(f'{new.key}.') for key in causes)
        ]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def main(config: Path, checkpoint: Path | None, gpus: int | None, options: Sequence[str]) -> int:
    """Print what is found; return 1 if there is an error, else 0."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    arguments = [str(config), *(['--cfg-options', *options] if options else [])]
    machine = Machine.detect(gpus)
    findings = diagnose(config, machine, parser.parse_args(arguments).cfg_options, checkpoint)
    print(f'{config} on {machine}', *findings, sep='\n')
    counts = [sum(finding.level == level for finding in findings) for level in LEVELS]
    pairs = zip(counts, LEVELS, strict=True)
    print(', '.join(f'{n} {level}' if n == 1 else f'{n} {level}s' for n, level in pairs))
    return int(counts[0] > 0)
