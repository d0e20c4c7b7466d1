"""A config fits itself to its machine, and stays the recipe that it was."""

import json
import math
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS, PARAM_SCHEDULERS, RUNNERS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmpretrain.structures import DataSample
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from cae_mm.engine import CAERunner
from cae_mm.engine.fitting import count_cores, count_processes, fit_batch, fit_config
from cae_mm.engine.message_hub import read_scalars
from cae_mm.hooks import ProgressHook
from cae_mm.hooks.saving import SIGNALS

ROOT = Path(__file__).parent.parent.parent / 'configs'
LEAVES = sorted(path for path in ROOT.glob('*/*.py') if path.parent.name != '_base_')


@MODELS.register_module()
class RunnerToy(BaseModel):
    """A linear layer without bias."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1, bias=False)

    def forward(self, inputs, data_samples, mode='tensor'):
        return dict(loss=self.linear(torch.stack(inputs)).square().mean())


@DATASETS.register_module()
class RunnerToyData(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return dict(inputs=torch.full((2,), index / 10), data_samples=DataSample())


def toy(**changes):
    """A run of iterations with a recipe of 8 images an update."""
    cfg = dict(
        runner_type='cae_mm.CAERunner',
        custom_imports=dict(imports=['cae_mm'], allow_failed_imports=False),
        model=dict(type='RunnerToy'),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=dict(type='RunnerToyData'),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        optim_wrapper=dict(
            type='cae_mm.MixedPrecisionOptimWrapper',
            dtype='float32',
            optimizer=dict(type='SGD', lr=0.1),
        ),
        param_scheduler=[dict(type='PolyLR', by_epoch=False)],
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=3, val_interval=1),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
        auto_scale_lr=dict(enable=True, base_batch_size=8),
        randomness=dict(seed=0),
    )
    return Config(cfg | changes)


@pytest.mark.parametrize('path', LEAVES, ids=lambda path: path.stem)
def test_any_number_of_gpus_is_the_same_recipe(path):
    recipe = Config.fromfile(path)
    batch, lr = recipe.auto_scale_lr.base_batch_size, recipe.optim_wrapper.optimizer.lr
    for processes in (1, 8, 32):
        cfg = deepcopy(recipe)
        [remark] = fit_batch(cfg, processes)
        step = processes * cfg.train_dataloader.batch_size
        total = step * cfg.optim_wrapper.get('accumulative_counts', 1)
        assert total == max(batch, step)
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr * total / batch)
        assert f'= {total}' in remark and f'(the recipe: {batch})' in remark
        assert not cfg.auto_scale_lr.enable and fit_batch(cfg, 1) == []  # not a second time


@given(
    processes=st.integers(1, 100),
    batch_size=st.integers(1, 100),
    recipe=st.integers(1, 5000),
    chosen=st.none() | st.integers(1, 20),
    most=st.none() | st.integers(1, 100),
)
@example(3, 2, 8, None, None)  # 6 images; 12 would be farther from 8
@example(8, 2, 8, None, None)  # 16
def test_batch_is_as_near_to_the_recipes_as_steps_can_be(
    processes, batch_size, recipe, chosen, most
):
    """What remains is made up for by the learning rate, and updates stay as many."""
    cfg = toy(auto_scale_lr=dict(enable=True, base_batch_size=recipe))
    cfg.train_dataloader.batch_size = batch_size
    cfg.optim_wrapper.accumulative_counts = chosen
    remarks = fit_batch(cfg, processes, most)
    images, gathered = cfg.train_dataloader.batch_size, cfg.optim_wrapper.accumulative_counts or 1
    step = processes * images
    assert images == min(batch_size, most or batch_size)
    if chosen:
        assert gathered == chosen
    elif gathered > 1:
        assert abs(gathered * step - recipe) <= step / 2
    else:
        assert step >= 2 / 3 * recipe  # two steps would be no nearer
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.1 * gathered * step / recipe)
    assert cfg.train_cfg.max_iters == 3 * gathered and cfg.train_cfg.val_interval == gathered
    assert cfg.default_hooks.checkpoint.interval == 2 * gathered
    assert f'= {gathered * step}' in remarks[-1] and f'(the recipe: {recipe})' in remarks[-1]
    before = cfg.to_dict()
    assert fit_batch(cfg, processes, most) == [] and cfg.to_dict() == before  # not a second time


def test_nothing_changes_where_nothing_is_asked_for():
    for scale in (dict(enable=False, base_batch_size=8), None):
        cfg = toy(auto_scale_lr=scale)
        before = cfg.to_dict()
        assert fit_batch(cfg, 8, cpu_batch_size=1) == [] and cfg.to_dict() == before
    with pytest.raises(ValueError, match="needs the recipe's batch: set base_batch_size"):
        fit_batch(toy(auto_scale_lr=dict(enable=True)), 8)


def schedules(max_iters):
    """Any scheduler that counts iterations, with a stretch of ``max_iters``."""
    steps, factor = st.integers(1, max_iters - 5), st.floats(0.1, 0.9)
    stretch = st.tuples(st.integers(0, max_iters - 10), st.integers(5, max_iters)).map(
        lambda pair: dict(begin=pair[0], end=min(pair[0] + pair[1], max_iters))
    )
    points = st.lists(steps, min_size=1, max_size=3, unique=True).map(sorted)
    periods = st.tuples(steps, st.just(max_iters)).map(list)
    own = st.one_of(
        st.builds(dict, type=st.just('LinearLR'), start_factor=factor),
        st.builds(dict, type=st.just('PolyLR'), power=factor, eta_min=st.just(0.01)),
        st.builds(dict, type=st.just('CosineAnnealingLR'), eta_min=st.just(0.01)),
        st.builds(dict, type=st.just('CosineAnnealingLR'), eta_min=st.just(0.01), T_max=steps),
        st.builds(dict, type=st.just('MultiStepLR'), milestones=points, gamma=factor),
        st.builds(dict, type=st.just('StepLR'), step_size=steps, gamma=factor),
        st.builds(dict, type=st.just('ExponentialLR'), gamma=factor),
        st.builds(dict, type=st.just('ConstantLR'), factor=factor),
    )
    restarts = st.builds(
        dict,
        type=st.just('CosineRestartLR'),
        periods=periods,
        restart_weights=st.just([1, 0.5]),
        eta_min=st.just(0.0),
    )
    return restarts | st.builds(lambda *parts: parts[0] | parts[1], own, st.just({}) | stretch)


# mmengine's, before the first step of an optimizer that this test never takes
@pytest.mark.filterwarnings('ignore:Detected call of `scheduler.step:UserWarning')
@settings(max_examples=80)
@given(scheduler=schedules(30), gathered=st.integers(2, 6))
def test_schedules_go_by_updates(scheduler, gathered):
    """At step `gathered` x u the learning rate is the recipe's at update u."""

    def rates(scheduler, steps):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        built = PARAM_SCHEDULERS.build(
            dict(end=steps) | scheduler, default_args=dict(optimizer=optimizer)
        )
        for _ in range(steps):
            yield optimizer.param_groups[0]['lr']
            built.step()

    def make():
        param_scheduler = [dict(by_epoch=False, **scheduler)]
        return toy(
            param_scheduler=param_scheduler,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=30),
            optim_wrapper=dict(optimizer=dict(lr=1.0), accumulative_counts=gathered),
            auto_scale_lr=dict(enable=True, base_batch_size=2 * gathered),
        )

    cfg = make()
    fit_batch(cfg, 1)
    stretched = list(rates(cfg.param_scheduler[0], cfg.train_cfg.max_iters))
    recipe = list(rates(make().param_scheduler[0], 30))
    assert stretched[::gathered] == pytest.approx(recipe, rel=1e-6, abs=1e-12)


def test_schedules_of_epochs_are_left_alone():
    scheduler = dict(type='LinearLR', by_epoch=True, end=5, convert_to_iter_based=True)
    train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=9, val_interval=2)
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=3))
    cfg = toy(param_scheduler=dict(scheduler), train_cfg=dict(train_cfg), default_hooks=hooks)
    fit_batch(cfg, 1)
    assert cfg.optim_wrapper.accumulative_counts == 4
    assert (cfg.param_scheduler, cfg.train_cfg) == (scheduler, train_cfg)
    assert cfg.default_hooks.checkpoint.interval == 3


@pytest.mark.parametrize(
    ('cuda', 'settings', 'batch'),
    [
        (False, dict(cpu_batch_size=1), 1),
        (False, dict(cpu_batch_size=4), 2),
        (False, dict(cpu_batch_size=None), 2),
        (False, dict(cpu_batch_size=1, batch_size=4), 4),
        (True, dict(cpu_batch_size=1), 2),
    ],
)
def test_batch_and_workers_of_the_machine(cuda, settings, batch, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr('joblib.cpu_count', lambda: 4)
    cfg = toy(settings=settings)
    loader = dict(cfg.train_dataloader, num_workers=8, persistent_workers=True, pin_memory=True)
    cfg.train_dataloader = loader
    cfg.val_dataloader = dict(loader, num_workers=0, prefetch_factor=4)
    cfg.test_dataloader = dict(loader, num_workers=3)
    remarks = fit_config(cfg)
    assert 'workers: 4, one for each core (the config: 8)' in remarks
    assert any('no GPU: 1 images a step' in remark for remark in remarks) == (batch == 1)
    assert cfg.train_dataloader.batch_size == batch
    assert cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts == 8
    loaders = [cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader]
    assert [loader.num_workers for loader in loaders] == [4, 0, 3]
    assert [loader.persistent_workers for loader in loaders] == [True, False, True]
    assert [loader.pin_memory for loader in loaders] == [cuda] * 3
    assert 'prefetch_factor' not in cfg.val_dataloader  # torch refuses it without workers


def test_the_rate_that_a_schedule_ends_at_is_in_proportion_too():
    momentum = dict(type='CosineAnnealingMomentum', eta_min=0.8)
    cosine = dict(type='CosineAnnealingLR', eta_min=1e-3, T_max=3)
    cfg = toy(param_scheduler=[cosine, momentum])
    cfg.optim_wrapper.accumulative_counts = 1
    fit_batch(cfg, 1)  # 2 images instead of 8
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.1 / 4)
    assert [scheduler.eta_min for scheduler in cfg.param_scheduler] == [1e-3 / 4, 0.8]


@HOOKS.register_module()
class FailingHook(Hook):
    def after_train_iter(self, *_, **__):
        raise self.error


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_failed_run_leaves_nothing_behind(tmp_path, error, monkeypatch):
    """Signals are the program's again; where a run was told to end they are still listened to."""
    monkeypatch.setattr(FailingHook, 'error', error, raising=False)
    before = [signal.getsignal(number) for number in SIGNALS]
    cfg = toy(
        work_dir=str(tmp_path),
        experiment_name=tmp_path.name,
        default_hooks=dict(checkpoint=dict(type='cae_mm.CheckpointHook', interval=1)),
        custom_hooks=[dict(type='cae_mm.ProgressHook'), dict(type='FailingHook')],
    )
    runner = CAERunner.from_cfg(cfg)
    try:
        with pytest.raises(error):
            runner.train()
        after = [signal.getsignal(number) for number in SIGNALS]
        assert (after == before) == (error is not SystemExit)
        [bar] = [hook.bar for hook in runner.hooks if isinstance(hook, ProgressHook)]
        assert bar.disable == (error is not SystemExit)  # what tqdm calls closed
    finally:
        for hook in runner.hooks[:]:
            getattr(hook, 'close', lambda: None)()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_processes_of_the_launchers(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '6')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setenv('SLURM_NTASKS', '5')
    monkeypatch.setattr('joblib.cpu_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    counts = [count_processes(launcher) for launcher in ('none', 'pytorch', 'slurm', 'mpi')]
    assert counts == [1, 6, 5, 1]
    cfg = toy(launcher='pytorch')
    cfg.train_dataloader.num_workers = 8
    cfg.auto_scale_lr.base_batch_size = 24
    assert fit_config(cfg)[-1] == 'batch: 6 x 2 x 2 gathered = 24 (the recipe: 24)'
    assert cfg.train_dataloader.num_workers == 2
    monkeypatch.setenv('SLURM_NTASKS_PER_NODE', '2')
    assert count_cores('slurm') == 2
    for own, cores in (('3', 3), ('8', 4)):  # of a process, to which it may be bound
        monkeypatch.setenv('SLURM_CPUS_PER_TASK', own)
        assert count_cores('slurm') == cores
    assert cfg.model_wrapper_cfg.device_ids is None  # processes on CPUs


def test_run_and_a_run_of_what_it_dumped(tmp_path):
    """Same config before and after, updates as the recipe says, and nothing fitted twice."""
    toy(work_dir=str(tmp_path / 'one'), settings=dict(batch_size=4)).dump(tmp_path / 'toy.py')
    cfg = Config.fromfile(tmp_path / 'toy.py')
    before = cfg.to_dict()
    runner = RUNNERS.build(cfg)
    assert cfg.to_dict() == before
    updates = []
    hook = register_optimizer_step_post_hook(lambda *_: updates.append(runner.iter))
    runner.train()
    hook.remove()
    assert updates == [1, 3, 5] and runner.max_iters == 6
    log = next((tmp_path / 'one').glob('*/*.log')).read_text()
    assert 'batch: 1 x 4 x 2 gathered = 8 (the recipe: 8)' in log

    dumped = Config.fromfile(tmp_path / 'one/toy.py')
    assert 'settings' not in dumped
    dumped.update(work_dir=str(tmp_path / 'two'), experiment_name='two')
    again = RUNNERS.build(dumped)
    assert again.cfg.train_cfg.max_iters == 6
    for name in ('optim_wrapper', 'param_scheduler', 'train_cfg', 'default_hooks'):
        assert again.cfg[name] == dumped[name]


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from the device one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_host_waits_for_the_device_when_a_line_is_due_only(tmp_path, monkeypatch):
    """The lines are those of mmengine's own way, which reads each number of each step."""
    monkeypatch.setattr('cae_mm.hooks.progress.SECONDS_IN_FILE', math.inf)
    monkeypatch.setattr('cae_mm.hooks.faults.reads_at_once', lambda _: False)  # as on a GPU
    lines, reads = [], []
    for build in (Runner.build_message_hub, CAERunner.build_message_hub):
        monkeypatch.setattr(CAERunner, 'build_message_hub', build)
        cfg = toy(
            work_dir=str(tmp_path / str(len(lines))),
            experiment_name=f'{tmp_path.name}-{len(lines)}',
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=7),
            custom_hooks=[dict(type=f'cae_mm.{x}Hook') for x in ('NumericalFault', 'Progress')],
            log_processor=dict(by_epoch=False, window_size=3),
        )
        cfg.auto_scale_lr.base_batch_size = 2
        cfg.default_hooks.logger = dict(type='LoggerHook', interval=3)
        cfg.optim_wrapper.update(
            dtype='bfloat16', optimizer=dict(type='AdamW', fused=True), clip_grad=dict(max_norm=1.0)
        )
        runner = RUNNERS.build(cfg)
        for module in ('engine.message_hub', 'hooks.faults'):

            def spy(tensors, iteration=lambda: runner.iter):
                if tensors:
                    reads.append((iteration() + 1, len(tensors)))
                return read_scalars(tensors)

            monkeypatch.setattr(f'cae_mm.{module}.read_scalars', spy)
        one_by_one, run_iter = Reads(), IterBasedTrainLoop.run_iter

        def run_and_count(loop, batch, run=run_iter, count=one_by_one):
            with count:
                run(loop, batch)

        monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', run_and_count)
        runner.train()
        monkeypatch.setattr(IterBasedTrainLoop, 'run_iter', run_iter)
        assert one_by_one.count == (0 if lines else 7 * 2)  # two numbers in each step
        text = next((tmp_path / str(len(lines))).glob('*/vis_data/scalars.json')).read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
        if len(lines) == 1:
            reads.clear()
    assert len(lines[0]) == 2 and {'loss', 'grad_norm', 'lr', 'images_per_s'} <= lines[0][0].keys()
    for line in lines[0] + lines[1]:
        for key in ('time', 'data_time', 'images_per_s'):
            del line[key]
    assert lines[0] == lines[1]
    # loss and norm of each step, once for the guard and once for bar, line or checkpoint; nothing
    # is logged at an epoch's end, the fifth step
    guard = [(2, 4), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2)]
    log = [(1, 2), (2, 2), (3, 2), (4, 2), (6, 4), (7, 2)]
    weights = [(2, 1), (4, 1), (6, 1), (7, 1)]  # are they finite, before they are saved
    assert sorted(reads) == sorted(guard + log + weights)


def test_schedule_that_begins_after_the_end_names_the_way_out():
    late = dict(type='CosineAnnealingLR', by_epoch=True, begin=10)
    cfg = toy(train_cfg=dict(by_epoch=True, max_epochs=2), param_scheduler=[late])
    message = (
        'CosineAnnealingLR of param_scheduler begins at epoch 10, .* settings.epochs=2 shortens'
    )
    with pytest.raises(ValueError, match=message):
        fit_config(cfg)


@pytest.mark.parametrize(
    ('dataset', 'setting'), [('RunnerToyData', 'data_root'), ('cae_mm.ShardDataset', 'shards')]
)
def test_missing_data_is_named_before_anything_is_trained(tmp_path, dataset, setting):
    cfg = toy(work_dir=str(tmp_path), experiment_name=tmp_path.name)
    cfg.train_dataloader.dataset = dict(type=dataset, data_root=str(tmp_path / 'absent'))
    with pytest.raises(FileNotFoundError, match=f'no data at .*absent: set settings.{setting} to'):
        CAERunner.from_cfg(cfg).train()


def test_shards_that_are_taken_for_files_are_named(tmp_path):
    (tmp_path / 'index.npz').touch()
    cfg = toy(work_dir=str(tmp_path), experiment_name=tmp_path.name)
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    message = f'{tmp_path} holds shards: set settings.shards to it, not data_root'
    with pytest.raises(ValueError, match=message):
        CAERunner.from_cfg(cfg).train()


def test_timeout_that_is_no_number_is_named(tmp_path):
    cfg = toy(work_dir=str(tmp_path), env_cfg=dict(dist_cfg=dict(timeout='10 min')))
    with pytest.raises(ValueError, match="env_cfg.dist_cfg.timeout .* seconds, not '10 min'"):
        RUNNERS.build(cfg)
