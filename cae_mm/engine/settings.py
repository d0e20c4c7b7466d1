"""The few things that users change, each said once; everything that depends on them follows.

    python tools/train.py CONFIG --cfg-options settings.img_size=128 settings.data_root=MY_IMAGES

or in a config of one's own, whose ``_base_`` is edited in place:

    from cae_mm.engine.settings import apply_settings
    apply_settings(_base_, img_size=128, transforms=dict(LoadImage=dict(on_error='skip')))
"""

import difflib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any

from cae_mm.patches import to_pair

SETTINGS = (
    'batch_size',
    'cpu_batch_size',
    'data_root',
    'epochs',
    'fsdp',
    'img_size',
    'mask_ratio',
    'pictures',
    'shards',
    'transforms',
    'watch',
)
# backends of mmengine's visualizers, by the package that each writes with
BACKENDS = {
    'mlflow': 'MLflowVisBackend',
    'tensorboard': 'TensorboardVisBackend',
    'wandb': 'WandbVisBackend',
}
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
PIPELINES = ('train_pipeline', 'test_pipeline')
TOKEN_SIZE = 8  # pixels of the second view per token of DALL-E or a d-VAE, along each side


def apply_settings(cfg: Any, **settings: Any) -> None:
    """Write settings to all the places of a config that they concern.

    Args:
        cfg: A ``Config``, or the ``_base_`` of one; changed in place.
        settings: Any of
            ``img_size``: pixels, one number or (height, width), of the images that the encoder (the
            tokenizer, where that is trained) sees; crops, second view and evaluation follow;
            ``mask_ratio``: share of the patches that are masked;
            ``data_root``: folder of the data, for training and evaluation;
            ``shards``: folder of tar shards that training reads instead of image files;
            ``epochs``: of training; warm-up and milestones change in proportion;
            ``batch_size``: images in a training step of one process;
            ``cpu_batch_size``: at most so many where there is no GPU, unless ``batch_size`` is
            said beside it;
            ``fsdp``: whether several processes share parameters and states of the optimizer (see
            docs/scaling.md);
            ``transforms``: options by the class of a transform, wherever it stands in a pipeline;
            ``watch``: 'tensorboard', 'wandb' or 'mlflow', or several of them, where numbers and
            pictures of the run go beside the files in its work directory;
            ``pictures``: image files or folders, of which ``PictureHook`` paints sheets.

    Raises:
        ValueError: If a setting is unknown, or nothing in the config takes it.
        ImportError: If the package of ``watch`` is not installed.
    """
    for name, value in sorted(settings.items()):  # the folder of shards after that of the rest
        if name not in SETTINGS:
            raise ValueError(f"unknown setting 'settings.{name}'{suggest(name, SETTINGS)}")
        if name == 'cpu_batch_size':  # waits until it is known where the run takes place
            limit = None if 'batch_size' in settings else value
            cfg['settings'] = {**(cfg.get('settings') or {}), name: limit}
        elif name == 'img_size':
            _set_img_size(cfg, value)
        elif name == 'mask_ratio':
            _set_transforms(cfg, {'CAEMaskGenerator': {'mask_ratio': value}})
        elif name == 'data_root':
            _set_data_root(cfg, os.path.expanduser(value))
        elif name == 'shards':
            _set_shards(cfg, os.path.expanduser(value))
        elif name == 'epochs':
            _set_epochs(cfg, value)
        elif name == 'fsdp':
            cfg['fsdp'] = value
        elif name == 'batch_size':
            cfg['train_dataloader']['batch_size'] = value
        elif name == 'watch':
            _add_backends(cfg, [value] if isinstance(value, str) else value)
        elif name == 'pictures':
            _set_pictures(cfg, [value] if isinstance(value, str) else value)
        else:
            _set_transforms(cfg, value)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a proposal for a misspelt name, or all that there are."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f': did you mean {close[0]}?' if close else f': choose one of {", ".join(sorted(known))}'


def find_datasets(cfg: Any) -> Iterator[dict[str, Any]]:
    """All datasets of the config's loaders, inside wrappers such as ``RepeatDataset``."""
    nodes = [cfg[name]['dataset'] for name in LOADERS if cfg.get(name)]
    while nodes:
        node = nodes.pop()
        if node.get('datasets'):
            nodes += node['datasets']
        elif isinstance(node.get('dataset'), dict):
            nodes.append(node['dataset'])
        else:
            yield node


def find_schedulers(cfg: Any) -> list[dict[str, Any]]:
    """The schedulers of a config, which may have a list of them, one or none."""
    schedulers = cfg.get('param_scheduler') or []
    return [schedulers] if isinstance(schedulers, dict) else schedulers


def find_pipelines(cfg: Any) -> list[list[dict[str, Any]]]:
    """The pipelines of all datasets, and those that configs keep for their heirs, each once."""
    pipelines = [dataset.get('pipeline') for dataset in find_datasets(cfg)]
    pipelines += [cfg.get(name) for name in PIPELINES]
    return list({id(pipeline): pipeline for pipeline in pipelines if pipeline}.values())


def find_transforms(cfg: Any) -> list[dict[str, Any]]:
    """All transforms in the pipelines, inside ``RandomChoice`` and the like too, each once."""
    transforms, nodes = {}, list[Any](find_pipelines(cfg))
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            transforms[id(node)] = node
            nodes.append(node.get('transforms') or [])
        else:
            nodes += node
    return list(transforms.values())


def class_name(node: dict[str, Any]) -> str:
    """Name of a type without its scope."""
    return str(node['type']).rpartition('.')[2]


def _set_transforms(cfg: Any, options: dict[str, dict[str, Any]]) -> None:
    transforms = find_transforms(cfg)
    for name, values in options.items():
        chosen = [node for node in transforms if class_name(node) == name]
        if not chosen:
            choice = suggest(name, {class_name(node) for node in transforms})
            raise ValueError(f'no pipeline of this config has a transform {name}{choice}')
        for node in chosen:
            node.update(values)


def _add_backends(cfg: Any, names: Iterable[str]) -> None:
    visualizer = cfg.get('visualizer')
    if not visualizer:
        raise ValueError('settings.watch: this config has no visualizer to add a backend to')
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"settings.watch knows no '{name}'{suggest(name, BACKENDS)}")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'settings.watch={name} needs its package: pip install {name}')
        backends = visualizer.get('vis_backends') or []
        if BACKENDS[name] not in map(class_name, backends):
            visualizer['vis_backends'] = [*backends, dict(type=BACKENDS[name])]


def _set_pictures(cfg: Any, images: Iterable[str]) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    if 'PictureHook' not in map(class_name, hooks):
        hooks.append(dict(type='cae_mm.PictureHook'))
    for hook in hooks:
        if class_name(hook) == 'PictureHook':
            hook['images'] = [os.path.expanduser(path) for path in images]
    cfg['custom_hooks'] = hooks


def _set_data_root(cfg: Any, root: str) -> None:
    roots = set()
    for dataset in find_datasets(cfg):
        roots.add(dataset.get('data_root') or '')
        dataset['data_root'] = root
    for name in ('val_evaluator', 'test_evaluator'):
        evaluator = cfg.get(name)
        path = str(evaluator.get('ann_file', '')) if isinstance(evaluator, dict) else ''
        for old in roots - {''}:
            if path.startswith(old):
                evaluator['ann_file'] = f'{root.rstrip("/")}/{path.removeprefix(old).lstrip("/")}'


def _set_shards(cfg: Any, root: str) -> None:
    loader = cfg['train_dataloader']
    dataset = loader['dataset']
    if 'pipeline' not in dataset or dataset.get('ann_file'):
        what = dataset.get('ann_file') or dataset['type']
        raise ValueError(f'settings.shards replaces a folder of images, not one with {what}')
    loader['sampler'] = dict(type='cae_mm.ShardSampler')
    loader['dataset'] = dict(
        type='cae_mm.ShardDataset',
        data_root=root,
        with_label=dataset.get('with_label', True),  # the default of mmpretrain's datasets
        skip_broken=dataset.get('skip_broken', False),
        pipeline=dataset['pipeline'],
    )


def _set_epochs(cfg: Any, epochs: int) -> None:
    before = cfg['train_cfg'].get('max_epochs')
    if before is None:
        raise ValueError('settings.epochs: this config counts updates, set train_cfg.max_iters')
    cfg['train_cfg']['max_epochs'] = epochs
    for scheduler in find_schedulers(cfg):
        keys = (
            {'begin', 'end', 'T_max'} & scheduler.keys() if scheduler.get('by_epoch', True) else ()
        )
        for key in keys:  # whole epochs, but no warm-up of more than half of the training
            if scheduler[key]:
                new = max(round(scheduler[key] * epochs / before), 1)
                scheduler[key] = new if scheduler[key] >= before else min(new, epochs / 2)
        if 'milestones' in scheduler and scheduler.get('by_epoch', True):
            milestones = (round(at * epochs / before) for at in scheduler['milestones'])
            scheduler['milestones'] = sorted({max(at, 1) for at in milestones})


def _set_img_size(cfg: Any, value: int | tuple[int, int]) -> None:
    """Set the size in the model and in each transform that makes images of it."""
    size = value if isinstance(value, int) else (int(value[0]), int(value[1]))
    model = cfg['model']
    backbone = model.get('backbone')
    if 'rpn_head' in model or 'bbox_head' in model:
        raise ValueError(
            'settings.img_size is of models that see images of one size; detectors see many: set '
            'settings.transforms.Resize.scale and settings.transforms.RandomChoiceResize.scales'
        )
    if backbone is not None:
        if backbone.get('init_cfg') and class_name(backbone) == 'CAEViT':
            # for weights that do not say their own size
            backbone.setdefault('pretrain_img_size', backbone.get('img_size', 224))
        backbone['img_size'] = size
    if 'decode_head' in model:
        _set_crop_of_segmentation(cfg, to_pair(size))
        return
    patch_size = backbone.get('patch_size', 16) if backbone else TOKEN_SIZE
    token_size = (model.get('target_generator') or {}).get('patch_size', TOKEN_SIZE)
    second = tuple(side * token_size // patch_size for side in to_pair(size))
    for transform in find_transforms(cfg):
        name = class_name(transform)
        if name == 'TwoViewResizedCrop':
            transform['size'] = size
            if transform.get('second_size', 112) is not None:
                transform['second_size'] = second[0] if isinstance(size, int) else second
        elif name == 'RandomResizedCrop':
            _set_random_crop(transform, size)
    for pipeline in find_pipelines(cfg):
        steps = {class_name(step): step for step in pipeline}
        if crop := steps.get('CenterCrop'):
            if edge := steps.get('ResizeEdge'):  # the short edge before it, in proportion
                old = max(to_pair(crop['crop_size']))
                edge['scale'] = round(max(to_pair(size)) * edge['scale'] / old)
            crop['crop_size'] = size


def _set_random_crop(transform: Any, size: int | tuple[int, int]) -> None:
    """Set the size of mmpretrain's crop, and its range of width over height in proportion."""
    (old_height, old_width), (height, width) = to_pair(transform['scale']), to_pair(size)
    transform['scale'] = size
    stretch = (width / height) / (old_width / old_height)
    if stretch != 1:
        ratios = transform.get('aspect_ratio_range', (3 / 4, 4 / 3))
        transform['aspect_ratio_range'] = tuple(ratio * stretch for ratio in ratios)


def _set_crop_of_segmentation(cfg: Any, size: tuple[int, int]) -> None:
    """Set the crops of training and of sliding windows, and the images' scale in proportion."""
    model = cfg['model']
    old = to_pair(model['data_preprocessor']['size'])
    for preprocessor in (model['data_preprocessor'], model['data_preprocessor']['test_cfg']):
        preprocessor['size'] = size
    sides = zip(model['test_cfg']['stride'], size, old, strict=True)
    stride = tuple(round(stride * new / before) for stride, new, before in sides)
    model['test_cfg'].update(crop_size=size, stride=stride)
    for transform in find_transforms(cfg):
        if class_name(transform) == 'RandomCrop':
            transform['crop_size'] = size
        elif class_name(transform) in ('RandomResize', 'Resize'):
            scale = (round(side * max(size) / max(old)) for side in transform['scale'])
            transform['scale'] = tuple(scale)
