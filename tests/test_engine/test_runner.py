"""A config fits itself to its machine, and stays the recipe that it was."""

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, RUNNERS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmpretrain.structures import DataSample
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from cae_mm.engine import CAERunner
from cae_mm.engine.message_hub import read_scalars
from cae_mm.engine.runner import count_processes, fit_batch, fit_config

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


@pytest.mark.parametrize(
    ('changes', 'processes', 'gathered', 'total'),
    [
        (dict(), 1, 4, 8),
        (dict(), 3, 1, 6),  # 12 would be farther from 8
        (dict(), 8, 1, 16),
        (dict(optim_wrapper__accumulative_counts=3), 1, 3, 6),
        (dict(train_dataloader__batch_size=5), 1, 2, 10),
    ],
)
def test_learning_rate_is_scaled_where_the_batch_is_another(changes, processes, gathered, total):
    cfg = toy()
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    fit_batch(cfg, processes)
    assert cfg.optim_wrapper.get('accumulative_counts', 1) == gathered
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.1 * total / 8)
    assert cfg.train_cfg.max_iters == 3 * gathered and cfg.train_cfg.val_interval == gathered
    assert cfg.default_hooks.checkpoint.interval == 2 * gathered


def test_nothing_changes_where_nothing_is_asked_for():
    for scale in (dict(enable=False, base_batch_size=8), None):
        cfg = toy(auto_scale_lr=scale)
        before = cfg.to_dict()
        assert fit_batch(cfg, 8, cpu_batch_size=1) == [] and cfg.to_dict() == before
    with pytest.raises(ValueError, match="needs the recipe's batch: set base_batch_size"):
        fit_batch(toy(auto_scale_lr=dict(enable=True)), 8)


@pytest.mark.parametrize(
    'scheduler',
    [
        dict(type='LinearLR', start_factor=1e-3, begin=0, end=11),
        dict(type='LinearLR', start_factor=1e-3, begin=5, end=21),
        dict(type='PolyLR', power=0.9, eta_min=0.01),
        dict(type='CosineAnnealingLR', eta_min=0.01, begin=4),
        dict(type='CosineAnnealingLR', T_max=20, end=25),
        dict(type='CosineRestartLR', periods=[8, 24], restart_weights=[1, 0.5], eta_min=0.0),
        dict(type='MultiStepLR', milestones=[7, 20], gamma=0.1),
        dict(type='StepLR', step_size=6, gamma=0.5),
        dict(type='ExponentialLR', gamma=0.9, begin=3),
        dict(type='ConstantLR', factor=0.1, end=9),
    ],
    ids=lambda scheduler: scheduler['type'],
)
# mmengine's, before the first step of an optimizer that this test never takes
@pytest.mark.filterwarnings('ignore:Detected call of `scheduler.step:UserWarning')
@pytest.mark.parametrize('gathered', [2, 5])
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
        )

    cfg = make()
    fit_batch(cfg, 1)
    stretched = list(rates(cfg.param_scheduler[0], cfg.train_cfg.max_iters))
    recipe = list(rates(make().param_scheduler[0], 30))
    assert stretched[::gathered] == pytest.approx(recipe, rel=1e-6, abs=1e-12)
    assert len(set(recipe)) > 1


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
    cfg.val_dataloader = dict(loader, num_workers=0)
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
