"""Registries of the scope ``cae_mm``: children of mmengine's root registries.

``type='cae_mm.X'`` in any config makes mmengine import this module, then the location of X. From
then on checkpoints are read as plain data, whichever function of mmengine is called for it.
"""

from cae_mm.dependencies import check_dependencies

check_dependencies(imports=False)  # tells more than the import of what is missing

from mmengine import registry as roots  # noqa: E402

import cae_mm.checkpoints  # noqa: E402, F401

__all__ = [
    'DATASETS',
    'DATA_SAMPLERS',
    'HOOKS',
    'MODELS',
    'OPTIMIZERS',
    'OPTIM_WRAPPERS',
    'OPTIM_WRAPPER_CONSTRUCTORS',
    'RUNNERS',
    'TRANSFORMS',
]


def _child(parent: roots.Registry, location: str) -> roots.Registry:
    return roots.Registry(parent.name, parent=parent, scope='cae_mm', locations=[location])


DATASETS = _child(roots.DATASETS, 'cae_mm.datasets')
DATA_SAMPLERS = _child(roots.DATA_SAMPLERS, 'cae_mm.datasets')
HOOKS = _child(roots.HOOKS, 'cae_mm.hooks')
MODELS = _child(roots.MODELS, 'cae_mm.models')
OPTIMIZERS = _child(roots.OPTIMIZERS, 'cae_mm.engine')
OPTIM_WRAPPERS = _child(roots.OPTIM_WRAPPERS, 'cae_mm.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(roots.OPTIM_WRAPPER_CONSTRUCTORS, 'cae_mm.engine')
RUNNERS = _child(roots.RUNNERS, 'cae_mm.engine')
TRANSFORMS = _child(roots.TRANSFORMS, 'cae_mm.datasets')
