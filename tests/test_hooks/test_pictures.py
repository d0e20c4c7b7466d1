"""PictureHook in whole runs of a tiny model."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import cae_config, loader_config, make_images
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import MLflowVisBackend
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import count_calls, in_two_processes

from cae_mm.engine import sharding
from cae_mm.engine.settings import apply_settings
from cae_mm.hooks import PictureHook, pictures
from cae_mm.visualization.attention import class_attention
from cae_mm.visualization.images import find_images
from cae_mm.visualization.pretraining import build_cae, load_views, load_weights
from cae_mm.visualization.reconstruction import paint_reconstruction
from cae_mm.visualization.sheet import save_sheet

pytestmark = pytest.mark.filterwarnings('ignore')  # of the Runner
NAMES = ['attention_3.png', 'reconstruction_3.png']
RGB = dict(target_generator=dict(type='cae_mm.RGBTarget'), neck=dict(out_dims=48))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp('images') / 'all', dict(dark=150, light=250), 5))


def make_config(images, work_dir, hook=None, watch=(), **model):
    config = cae_config(**{**RGB, **model})
    config['backbone']['drop_path_rate'] = 0.3
    hooks = [] if hook is None else [dict(type='cae_mm.PictureHook', images=[images]) | hook]
    cfg = dict(
        model=config,
        work_dir=str(work_dir),
        default_scope='mmpretrain',
        train_dataloader=loader_config(Path(images), batch_size=4),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=hooks,
        randomness=dict(seed=0),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        log_level='ERROR',
        experiment_name=f'{work_dir.name}{work_dir.parent.name}',
    )
    apply_settings(cfg, watch=watch)
    return Config(cfg)


@pytest.fixture
def make_runner(images, tmp_path):
    """Makes Runners of mmengine itself, whose steps draw from the global generators."""

    def make(name, hook=None, **options):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            return Runner.from_cfg(make_config(images, tmp_path / name, hook, **options))

    return make


def sheets(runner):
    return sorted(path.name for path in Path(runner.log_dir).glob('vis_data/vis_image/*'))


def test_training_is_the_same_with_and_without_the_hook(make_runner):
    runners, states = [], []
    for name, hook in (('without', None), ('with', dict(interval=1, count=2))):
        runners.append(make_runner(name, hook))  # seeds
        runners[-1].train()
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.rand(1)))
    without, with_hook = runners
    assert states[0] == states[1]
    state, expected = with_hook.model.state_dict(), without.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    modes = [[module.training for module in r.model.modules()] for r in (without, with_hook)]
    assert modes[0] == modes[1] and any(modes[0])
    names = [f'{name}_{epoch}.png' for name in ('attention', 'reconstruction') for epoch in '123']
    assert sheets(with_hook) == names
    assert not sheets(without)


def test_sheets_show_the_model_of_their_epoch(make_runner, images, tmp_path):
    """The last epoch's, painted again from its checkpoint, pixel by pixel."""
    runner = make_runner('run', dict(interval=2, count=3, seed=5))
    runner.train()
    assert sheets(runner) == [f'{n}_{e}.png' for n in ('attention', 'reconstruction') for e in '23']
    folder = Path(runner.log_dir, 'vis_data/vis_image')
    painted = [np.asarray(Image.open(folder / f'reconstruction_{epoch}.png')) for epoch in (2, 3)]
    assert (painted[0] != painted[1]).any()

    model = load_weights(build_cae(runner.cfg), Path(runner.work_dir, 'epoch_3.pth'))
    views, masks = load_views(runner.cfg, find_images([images], 3, seed=5), seed=5)
    pictures = paint_reconstruction(model, views, masks)
    save_sheet([*zip(*pictures.values(), strict=True)], tmp_path / 'own.png', titles=[*pictures])
    own = np.asarray(Image.open(tmp_path / 'own.png'))[..., :3]
    np.testing.assert_array_equal(painted[1], own)

    [normalised] = model.data_preprocessor({'inputs': views[:1]})['inputs']
    weights = class_attention(model.backbone, normalised)
    sheet = np.asarray(Image.open(folder / 'attention_3.png'))
    height, width = sheet.shape[:2]
    assert (width - 4) // 164 == 2 + weights.shape[1]  # image, mean, heads
    assert (height - 48) // 164 == 3


def test_the_main_process_paints(images, tmp_path):
    """The other one computes with it where the model is sharded, and nothing else."""
    modes = ['ddp', 'fsdp'] if sharding.fully_shard else ['ddp']
    runs = {mode: make_config(images, tmp_path / mode, dict(interval=5)) for mode in modes}
    for mode, cfg in runs.items():
        cfg.optim_wrapper = dict(
            type='cae_mm.MixedPrecisionOptimWrapper',
            dtype='float32',
            optimizer=dict(type='AdamW', lr=0.0),  # for the same sheets, whoever trains
        )
        cfg.settings = dict(fsdp=mode == 'fsdp')
    names = ('paint_reconstruction', 'class_attention', 'draw_sheet')
    main, other = in_two_processes(count_calls, runs, pictures.__name__, names)
    assert main == {mode: [1, 1, 2] for mode in modes}
    assert other == {mode: [int(mode == 'fsdp')] * 2 + [0] for mode in modes}
    sheets = [sorted((tmp_path / mode).glob('*/vis_data/vis_image/*.png')) for mode in modes]
    assert all([path.name for path in paths] == NAMES for paths in sheets)
    for paths in zip(*sheets, strict=True):  # sharding changes no pixel
        assert len({path.read_bytes() for path in paths}) == 1


class Backend:
    """Keeps what is added, as a backend of a visualizer."""

    def __init__(self):
        self.images = {}

    def add_image(self, name, image, step):
        self.images[name, step] = image

    def ignore(self, *_, **__):
        pass

    add_config = add_graph = add_scalar = add_scalars = close = ignore


def test_every_backend_gets_the_sheets(make_runner):
    runner = make_runner('run', dict(interval=5, sheets=['reconstruction']))
    runner.visualizer._vis_backends['own'] = backend = Backend()
    runner.train()
    [((name, step), image)] = backend.images.items()
    assert (name, step, image.dtype, image.shape[-1]) == ('reconstruction', 3, np.uint8, 3)
    assert sheets(runner) == ['reconstruction_3.png']


def test_mlflow_gets_files(make_runner):
    """It would end the run at a name without an ending."""

    class MLflow(Backend, MLflowVisBackend):
        pass

    runner = make_runner('run', dict(interval=5, sheets=['attention']))
    runner.visualizer._vis_backends = {'own': MLflow(), 'other': Backend()}
    runner.train()
    own, other = runner.visualizer._vis_backends.values()
    assert ([*own.images], [*other.images]) == ([('attention_3.png', 3)], [('attention', 3)])


def test_tensorboard_has_numbers_and_pictures(make_runner):
    runner = make_runner('run', dict(sheets=['attention']), watch='tensorboard')
    runner.train()
    folder = Path(runner.log_dir, 'vis_data')
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = map(json.loads, (folder / 'scalars.json').read_text().splitlines())
    logged = {line['step']: line['loss'] for line in lines}
    shown = {event.step: event.value for event in events.Scalars('loss')}
    assert shown == pytest.approx(logged) and shown
    [image] = events.Images('attention')
    sheet = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(sheet, Image.open(folder / 'vis_image/attention_3.png'))


HOG = dict(target_generator=dict(type='cae_mm.HOGTarget'), neck=dict(out_dims=108))


@pytest.mark.parametrize(
    ('hook', 'model', 'error', 'message'),
    [
        (dict(sheets=['map']), {}, ValueError, "Unknown sheet 'map': choose of reconstruction, at"),
        (dict(images=['none']), {}, FileNotFoundError, 'none is neither an image nor a folder'),
        ({}, HOG, ValueError, 'what a HOGTarget makes of an image cannot be painted'),
    ],
)
def test_mistakes_are_said_before_training(make_runner, hook, model, error, message):
    with pytest.raises(error, match=message):
        make_runner('run', hook, **model).train()


def test_targets_without_a_picture_have_attention(make_runner):
    runner = make_runner('run', dict(sheets=['attention']), **HOG)
    runner.train()
    assert sheets(runner) == ['attention_3.png']


def test_iterations_are_refused(make_runner):
    runner = make_runner('run', {})
    runner._train_loop = dict(by_epoch=False, max_iters=2)
    with pytest.raises(ValueError, match='PictureHook counts epochs: set train_cfg.type'):
        runner.train()


def test_only_pretrainings_are_painted(make_runner):
    runner = make_runner('run', {})
    runner.model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="a pretraining of cae_mm.CAE, not <class 'torch.nn.*Line"):
        PictureHook(images=[]).before_train(runner)
