"""Context Autoencoder pretraining (arXiv 2202.03026) for the OpenMMLab ecosystem."""

import warnings

from cae_mm.dependencies import check_dependencies
from cae_mm.version import __version__

__all__ = ['__version__']

try:
    check_dependencies(imports=False)
except ImportError as error:  # cae_mm.registry raises it
    # `python -m cae_mm.doctor` gets here from runpy; it has to run, and it reports the same.
    warnings.filterwarnings('ignore', 'cae_mm cannot be used', module='runpy')
    warnings.warn(str(error), stacklevel=2)
