"""Weights of other projects in and out; nothing else needs this package."""

from cae_mm.conversion.convert import convert_checkpoint
from cae_mm.conversion.dalle import convert_dalle
from cae_mm.conversion.export import export_checkpoint

__all__ = ['convert_checkpoint', 'convert_dalle', 'export_checkpoint']
