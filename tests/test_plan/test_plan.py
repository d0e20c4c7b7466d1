"""A plan of tiny configs: real steps by their Runner, hours, and what stops it by its message."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import cae_config, loader_config, make_images, run_tool
from mmengine.registry import VISBACKENDS
from mmengine.visualization import BaseVisBackend
from rich.console import Console

from cae_mm.doctor.case import Machine
from cae_mm.plan import plan as planning
from cae_mm.plan.measure import Measurement, StepTimer
from cae_mm.plan.plan import check_memory, make_plan
from cae_mm.plan.report import show
from cae_mm.precision import Precision

pytestmark = pytest.mark.usefixtures('plain_config_text')
CPU, GPUS = Machine(1, 'cpu'), Machine(8, 'cuda')
ABSENT = {'train_dataloader.dataset.data_root': '/absent'}


@VISBACKENDS.register_module()
class PlanBackend(BaseVisBackend):
    """As those of W&B and MLflow, what begins an experiment on a server."""

    def _init_env(self):
        raise AssertionError('a plan is no experiment')

    @property
    def experiment(self):
        self._init_env()

    add_config = _init_env


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """Pretraining on twelve images, gathered over two steps, with hooks of a real run."""
    folder = tmp_path_factory.mktemp('plan')
    make_images(folder / 'images', dict(a=200, b=100), 6)
    weights = dict(type='Pretrained', checkpoint='absent.pth')
    cae = cae_config()
    cfg = dict(
        default_scope='mmpretrain',
        runner_type='cae_mm.CAERunner',
        model=cae | dict(target_generator=cae['target_generator'] | dict(init_cfg=weights)),
        train_dataloader=loader_config(folder / 'images', batch_size=4),
        optim_wrapper=dict(
            type='cae_mm.MixedPrecisionOptimWrapper',
            constructor='cae_mm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3, fused=True),
            clip_grad=dict(max_norm=3.0),
            dtype='float32',
        ),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2),
        auto_scale_lr=dict(enable=True, base_batch_size=8),
        custom_hooks=[dict(type='cae_mm.SafeLoadHook'), dict(type='cae_mm.ProgressHook')],
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='PlanBackend')]),
        settings=dict(cpu_batch_size=2, pictures=str(folder / 'images')),
    )
    path = folder / 'cae_custom.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()))
    return path


def text_of(plan, **options) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(show(plan, **options))
    return capture.get()


def test_steps_are_those_of_the_run(config):
    plan = make_plan(config, CPU, steps=1)
    measured = plan.measurement
    assert plan.has_data and plan.images == 12 and plan.is_fake
    assert (plan.schedule.batch_size, plan.schedule.gathered) == (2, 4)
    assert (measured.processes, measured.images, measured.on_gpu) == (1, 2, False)
    assert plan.cost.images == 2 and measured.seconds > 0
    assert measured.peak > plan.cost.peak
    assert plan.rate == measured.rate == pytest.approx(2 / measured.seconds)
    assert plan.loading > 0
    text = text_of(plan)
    assert 'images of the data' in text and '2 epochs' in text and 'Assumed' not in text
    assert 'images of the data, in float32' in text.replace('\n', ' ')


def test_gpus_that_are_not_here(config, monkeypatch):
    monkeypatch.setattr(planning, 'CPU_IMAGES', 3)
    plan = make_plan(config, GPUS, ABSENT, images=1000, steps=1)
    measured, schedule = plan.measurement, plan.schedule
    assert plan.cost.images == 4 and measured.images == 3  # there, and on this CPU
    assert plan.rate == pytest.approx(8 * measured.rate) and plan.loading is None
    assert schedule.processes == 8 and schedule.images == 2 * (125 // 4) * 4 * 8
    text = text_of(plan)
    assert 'an image of noise' in text and 'as here' not in text  # a CPU tells nothing of GPUs
    assert '100 TFLOP/s each' in text and 'Assumed: the TFLOP/s' in text
    text = text_of(plan, tflops=[1e-6])
    hours = schedule.images * plan.flops_per_image / (8 * 1e6) / 3600
    assert f'{float(f"{hours:.3g}"):,.10g} hours' in text and '1e-06 TFLOP/s each' in text
    assert '100 TFLOP/s' not in text


def test_hours_are_shared_by_processes(config):
    plan = make_plan(config, CPU, steps=0)
    assert plan.measurement is plan.rate is plan.loading is None
    plan = replace(plan, measurement=Measurement(2, 8, 0.5, 10**9, False))
    assert plan.measurement.rate == 8 and plan.rate == 8
    many = replace(plan, machine=Machine(4, 'cpu'))
    assert many.rate == 4 * plan.rate
    assert 'Assumed: 4 processes, each as fast as one here' in text_of(many)
    schedule = replace(plan.schedule, steps=8 * 3600)
    assert '2 hours' in text_of(replace(plan, schedule=schedule))
    slow = replace(many, schedule=schedule, loading=1.0, workers=2)
    assert slow.loading_rate == 8
    text = text_of(slow)
    assert 'bound by the data' in text and '2 hours' in text


def test_timer_tells_steps_with_and_without_update():
    timer = StepTimer(gathered=2)
    timer.ends = [5.0, 10.0, 11.0, 14.0, 15.0, 18.0]  # warm-up, then 1 and 3 seconds in turn
    assert timer.seconds(2) == 2
    assert timer.seconds(4) == 1.5
    timer = StepTimer(gathered=1)
    timer.ends = [5.0, 7.0, 9.0, 20.0]
    assert timer.seconds(1) == 2


def test_precision_is_that_of_the_machine(config, monkeypatch):
    auto = {'optim_wrapper.dtype': 'auto'}
    found = Precision(torch.float32, 'this CPU has none')
    monkeypatch.setattr(planning, 'choose_precision', lambda *_: found)
    assert make_plan(config, CPU, auto, steps=0).precision == found
    half = make_plan(config, Machine(1, 'cuda'), auto, steps=0)
    assert half.precision.dtype == torch.bfloat16 and 'not here' in half.precision.reason
    full = make_plan(config, Machine(1, 'cuda'), auto | {'optim_wrapper.dtype': 'float32'}, steps=0)
    assert half.cost.activations < full.cost.activations and half.cost.flops == full.cost.flops


def test_images_are_not_known(config):
    plan = make_plan(config, CPU, ABSENT, steps=0)
    assert plan.schedule is None and 'say --images N' in text_of(plan)


def test_batch_that_does_not_fit(config, monkeypatch):
    plan = make_plan(config, CPU, {'settings.batch_size': 8}, steps=0)
    cost = plan.cost
    fixed = cost.peak - cost.activations + planning.RESIDENT
    free = fixed + 5.5 * cost.activations / cost.images
    monkeypatch.setattr(planning, 'find_free_memory', lambda: free)
    check_memory(cost, 5)
    with pytest.raises(ValueError, match='a step of 6 images .* settings.batch_size=5 would'):
        check_memory(cost, 6)
    with pytest.raises(ValueError, match='8 images .* settings.batch_size=5 would'):
        make_plan(config, CPU, {'settings.batch_size': 8}, steps=1)
    monkeypatch.setattr(planning, 'find_free_memory', lambda: fixed)
    with pytest.raises(ValueError, match='not even one image'):
        check_memory(cost, 1)


def test_model_whose_operations_depend_on_values(config, monkeypatch):
    def fail(*_):
        raise RuntimeError('a value is needed')

    monkeypatch.setattr(planning, 'make_fake', fail)
    with pytest.raises(ValueError, match='a value is needed.*leave out --no-measure'):
        make_plan(config, CPU, steps=0)
    plan = make_plan(config, CPU, steps=1)
    assert not plan.is_fake and plan.cost.flops > 0 and 'on real tensors' in text_of(plan)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'optim_wrapper': None}, 'trains nothing: it needs model, optim_wrapper'),
        ({'train_dataloader': None}, 'trains nothing'),
        ({'model.neck.in_dims': 8}, 'neck.in_dims is 8, but must be 16'),
        ({'model.type': 'cae_mm.CEA'}, 'CEA'),
        ({'train_dataloader.dataset.pipeline.2.patch_size': 8}, 'masks have'),
        ({'train_dataloader.dataset.data_prefix': 'empty'}, 'Found 0 files'),
    ],
)
def test_what_stops_it(config, options, message):
    (config.parent / 'images' / 'empty').mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        make_plan(config, CPU, options, steps=1)


def test_tool(config, capsys):
    for arguments, code in ((['--no-measure'], 0), (['--cfg-options', 'model.neck.x=1'], 1)):
        with pytest.raises(SystemExit) as end:
            run_tool('plan.py', config, '--gpus', 2, *arguments)
        assert end.value.code == code
    out, err = capsys.readouterr()
    assert f'{config} on 2 GPUs' in out.replace('\n', '') and 'alignment target' in out
    assert "unexpected keyword argument 'x'" in err
    with pytest.raises(SystemExit):
        run_tool('plan.py', Path('absent.py'))
    assert 'no config at' in capsys.readouterr().err
