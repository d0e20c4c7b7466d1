"""Context Autoencoder pretraining (arXiv 2202.03026) for the OpenMMLab ecosystem."""

import sys

from cae_mm.dependencies import check_dependencies
from cae_mm.version import __version__

__all__ = ['__version__']

# `python -m cae_mm.doctor` imports this file first and has to run where the checks would fail.
if 'cae_mm.doctor' not in sys.orig_argv:
    check_dependencies()

    from cae_mm.model_index import register_model_index

    register_model_index()
