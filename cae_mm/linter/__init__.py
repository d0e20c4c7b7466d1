"""What is wrong with a config, said before the run: ``python -m cae_mm.doctor CONFIG``."""

from cae_mm.linter.case import Case, Finding, Machine
from cae_mm.linter.report import lint, main

__all__ = ['Case', 'Finding', 'Machine', 'lint', 'main']
