"""Registries of the scope ``cae_mm``: children of mmengine's root registries.

``type='cae_mm.X'`` in any config makes mmengine import this module and then ``locations``, so an
installed package needs no ``custom_imports``.
"""

from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS as MMENGINE_OPTIMIZERS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

__all__ = [
    'FUNCTIONS',
    'HOOKS',
    'MODELS',
    'OPTIMIZERS',
    'OPTIM_WRAPPERS',
    'OPTIM_WRAPPER_CONSTRUCTORS',
    'RUNNERS',
    'TRANSFORMS',
]


def _child(parent: Registry, *locations: str) -> Registry:
    return Registry(parent.name, parent=parent, scope='cae_mm', locations=list(locations))


FUNCTIONS = _child(MMENGINE_FUNCTIONS, 'cae_mm.hooks')
HOOKS = _child(MMENGINE_HOOKS, 'cae_mm.hooks')
MODELS = _child(MMENGINE_MODELS, 'cae_mm.models')
OPTIMIZERS = _child(MMENGINE_OPTIMIZERS, 'cae_mm.engine')
OPTIM_WRAPPERS = _child(MMENGINE_OPTIM_WRAPPERS, 'cae_mm.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS, 'cae_mm.engine')
RUNNERS = _child(MMENGINE_RUNNERS, 'cae_mm.engine')
TRANSFORMS = _child(MMENGINE_TRANSFORMS, 'cae_mm.datasets')
