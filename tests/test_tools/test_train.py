"""tools/train.py and tools/test.py as a user runs them."""

import json
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from cae_mm.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent.parent
CONFIG = 'configs/demo/cae_demo.py'
SHRINK = [
    'model.backbone.arch._delete_=True',  # a name
    'model.backbone.arch.embed_dims=16',
    'model.backbone.arch.depth=2',
    'model.backbone.arch.num_heads=2',
    'model.backbone.arch.layer_scale=0.1',
    'model.backbone.drop_path_rate=0.2',
    'model.neck.in_dims=16',
    'model.neck.embed_dims=16',
    'model.neck.num_heads=2',
    'model.neck.out_dims=192',
    'model.target_generator._delete_=True',
    'model.target_generator.type=cae_mm.RGBTarget',
    'settings.batch_size=2',
    'auto_scale_lr.base_batch_size=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=1',
    'default_hooks.checkpoint.max_keep_ckpts=-1',
    'train_cfg.max_epochs=4',
]


def run(tool, *args, **env):
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'} | env
    return subprocess.run(
        [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / tool), *map(str, args)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def fail(monkeypatch):
    """What a tool raises, run in this process: starting one takes seconds."""

    def run_here(tool, *args):
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
        with pytest.raises(Exception) as caught:
            runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
        return str(caught.value)

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('LOCAL_RANK', '0')  # a tool sets it
    return run_here


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for i in range(6):
        path = folder / 'train' / f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(80, 90, 3), dtype=np.uint8)).save(path)
    return ['--cfg-options', *SHRINK, f'settings.data_root={folder}']


def losses(work_dir: Path) -> dict[int, float]:
    """The losses that were logged, by iteration, over all runs in the folder."""
    lines = [
        json.loads(line)
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


@pytest.mark.parametrize(('workers', 'batch'), [(0, 2), (2, 4)])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(options, tmp_path, workers, batch):
    """From an epoch's second batch, which ends an update when two of three are gathered.

    With random crops, flips, masks and drop path.
    """
    options = [*options, f'train_dataloader.num_workers={workers}']
    options += [f'auto_scale_lr.base_batch_size={batch}']
    options += ['default_hooks.checkpoint.by_epoch=False']
    whole = run('train.py', CONFIG, '--work-dir', tmp_path / 'whole', *options)
    assert whole.returncode == 0, whole.stderr
    first, second = tmp_path / 'whole/iter_8.pth', tmp_path / 'resumed'
    resumed = run('train.py', CONFIG, '--work-dir', second, '--resume', first, *options)
    assert resumed.returncode == 0, resumed.stderr

    before, after = losses(tmp_path / 'whole'), losses(second)
    assert len(before) == 4 * 3 and sorted(after) == sorted(before)[8:]
    assert all(after[step] == before[step] for step in after)
    assert len(set(before.values())) == len(before)
    one, other = (read_checkpoint(d / 'iter_12.pth').state for d in (tmp_path / 'whole', second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resume_finds_the_last_checkpoint(options, tmp_path):
    args = (CONFIG, '--work-dir', tmp_path, *options)
    assert run('train.py', *args, 'train_cfg.max_epochs=3').returncode == 0
    resumed = run('train.py', *args, '--resume')
    assert resumed.returncode == 0, resumed.stderr
    assert 'resumed epoch: 3' in resumed.stdout + resumed.stderr
    last = tmp_path / 'epoch_4.pth'
    assert last.exists()

    args = (CONFIG, '--work-dir', tmp_path / 'next', *options, f'load_from={last}')
    begun = run('train.py', *args, 'train_cfg.max_epochs=3', '--resume')
    assert begun.returncode == 0, begun.stderr
    assert f'next: the run starts from {last}' in begun.stdout + begun.stderr


@pytest.mark.parametrize(
    ('said', 'load_from', 'resume', 'loaded'),
    [
        ('auto', None, True, None),
        ('auto', 'a.pth', 'auto', 'a.pth'),
        ('b.pth', 'a.pth', True, 'b.pth'),
        (None, 'a.pth', False, 'a.pth'),
    ],
)
def test_resume_and_load_from(said, load_from, resume, loaded):
    """What of the two the Runner is told."""
    merge_args = runpy.run_path(str(ROOT / 'tools/train.py'))['merge_args']
    hooks = [dict(type='cae_mm.SafeLoadHook')]
    cfg = Config(dict(resume=False, load_from=load_from, custom_hooks=hooks))
    args = Namespace(no_validate=False, amp=False, auto_scale_lr=False, resume=said)
    merge_args(cfg, args)
    assert (cfg.resume, cfg.load_from) == (resume, loaded)
    if resume == 'auto':
        cfg.pop('custom_hooks')
        with pytest.raises(ValueError, match='--resume beside a load_from: .*SafeLoadHook.* add'):
            merge_args(cfg, args)


def test_options_and_settings_reach_the_run(options, tmp_path):
    """What the run dumped and logged, and what a user sees from the first step on."""
    result = run(
        *('train.py', CONFIG, '--work-dir', tmp_path, '--amp', '--no-validate', '--resume'),
        *('--auto-scale-lr', '--local-rank', '0', '--local_rank', '0', *options),
        *('optim_wrapper.type=OptimWrapper', 'train_cfg.max_epochs=3', 'settings.img_size=48'),
        *('settings.mask_ratio=0.25', 'auto_scale_lr.base_batch_size=4'),
        *('train_dataloader.num_workers=1000',),
    )
    assert result.returncode == 0, result.stderr
    cfg = Config.fromfile(tmp_path / 'cae_demo.py')
    assert cfg.optim_wrapper.type == 'cae_mm.MixedPrecisionOptimWrapper'
    assert (cfg.optim_wrapper.dtype, cfg.optim_wrapper.accumulative_counts) == ('auto', 2)
    assert cfg.model.backbone.img_size == 48
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['cae_mm.TwoViewResizedCrop'].size == 48
    assert steps['cae_mm.CAEMaskGenerator'].mask_ratio == 0.25
    log = result.stdout + result.stderr
    assert f'nothing to resume in {tmp_path}: the run starts from the beginning' in log
    assert len(re.findall(r'precision: \w+: .*CPU', log)) == 1
    assert 'batch: 1 x 2 x 2 gathered = 4 (the recipe: 4)' in log
    assert re.search(r'workers: \d+, one for each core \(the config: 1000\)', log)
    assert 'scheduler.step' not in log and 'DataLoader will create' not in log  # torch's warnings
    assert 'images_per_s' in log and 'eta' in log and 'token_acc: ' not in log
    assert re.search(r'CAE: .* 1/9 \[\d\d:\d\d<.*loss .*, .* images/s\]', result.stderr)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('settings.image_size=64', "unknown setting 'settings.image_size': did you mean img_size?"),
        ('train_dataloadr.batch_size=2', 'did you mean train_dataloader?'),
        ('settings.transforms.MaskGenerator.mask_ratio=0.4', 'did you mean CAEMaskGenerator?'),
    ],
)
def test_misspelt_options_are_errors(option, message, fail):
    assert message in fail('train.py', CONFIG, '--cfg-options', option)


def test_work_dir_defaults_to_the_name_of_the_config(tmp_path, options):
    config = tmp_path / 'my_run.py'
    config.write_text(f"_base_ = '{ROOT / CONFIG}'\n")
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', ROOT / 'tools/train.py', config, *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'work_dirs/my_run/epoch_4.pth').exists()


def test_torchrun_on_two_cpu_processes(options, tmp_path):
    """Both ranks train, over gloo, and one of them writes checkpoints."""
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc-per-node', '2']
        + ['--master-port', str(20000 + os.getpid() % 20000), str(ROOT / 'tools/train.py')]
        + [CONFIG, '--launcher', 'pytorch', '--work-dir', str(tmp_path), *options],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path)) == 4  # epochs; 6 images are one batch of 2 for each process
    assert (tmp_path / 'epoch_4.pth').exists()


def test_two_nodes_make_one_run(options, tmp_path):
    """The command of docs/scaling.md on two nodes, both of them this machine."""
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nnodes', '2']
    command += ['--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-id', 'test']
    command += ['--rdzv-endpoint', f'127.0.0.1:{port}', '--local-addr', '127.0.0.1']
    nodes = [
        subprocess.Popen(
            [*command, '--node-rank', str(rank), str(ROOT / 'tools/train.py'), CONFIG]
            + ['--launcher', 'pytorch', '--work-dir', str(tmp_path), *options],
            cwd=ROOT,
            env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], '\n'.join(outputs)
    assert len(losses(tmp_path)) == 4  # epochs; 6 images are one batch of 2 for each node
    assert [path.name for path in tmp_path.glob('epoch_4*')] == ['epoch_4.pth']
    assert sum('images_per_s' in output for output in outputs) == 1  # one of them logs


# runs the command as the tasks of two nodes with one GPU each, and keeps the options before it
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do echo "$1" >> "$SRUN_LOG"; shift; done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_NODELIST='node[1-2]' SLURM_LOCALID=0
SLURM_PROCID=1 "$@" & SLURM_PROCID=0 "$@" && wait $!
"""
SCONTROL = (
    '#!/usr/bin/env bash\n[[ $* == "show hostnames node[1-2]" ]] && printf "127.0.0.1\nnode2\n"\n'
)


def test_slurm_script_trains_on_two_nodes(options, tmp_path):
    """Paths and options with blanks arrive whole."""
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    work_dir = tmp_path / 'my run'
    environment = dict(
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        SRUN_LOG=str(tmp_path / 'log'),
        SRUN_ARGS='--time=1:00:00 --exclusive',
        PYTHON=sys.executable,
        PYTHONWARNINGS='ignore',
        OMP_NUM_THREADS='1',
        GPUS='2',
        GPUS_PER_NODE='1',
        MASTER_PORT=str(20000 + os.getpid() % 20000),
    )
    result = subprocess.run(
        [ROOT / 'tools/slurm_train.sh', 'gpu', 'a run', CONFIG, '--work-dir', work_dir, *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(losses(work_dir)) == 4 and (work_dir / 'epoch_4.pth').exists()
    assert (tmp_path / 'log').read_text().splitlines() == [
        *('--partition=gpu', '--job-name=a run', '--gres=gpu:1', '--ntasks=2'),
        *('--ntasks-per-node=1', '--cpus-per-task=5', '--kill-on-bad-exit=1'),
        *('--signal=USR1@120', '--time=1:00:00', '--exclusive'),
    ]


@pytest.mark.parametrize(
    ('status', 'restarts', 'allowed'),
    [(75, 1, 0), (75, 0, 0), (1, 1, 0), (1, 1, 2), (1, 2, 2), (0, 0, 2)],
)
def test_slurm_script_queues_again_what_may_go_on(status, restarts, allowed, tmp_path):
    """A job that was queued again goes on where it was."""
    log = tmp_path / 'log'
    for name, code in (('srun', status), ('scontrol', 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    environment = dict(
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        SLURM_JOB_ID='7',
        SLURM_RESTART_COUNT=str(restarts),
        RESTARTS=str(allowed),
        SIGNAL='TERM@30',
    )
    command = [ROOT / 'tools/slurm_train.sh', 'gpu', 'name', CONFIG, '--amp']
    assert subprocess.run(command, env=os.environ | environment).returncode == status
    first, *others = log.read_text().splitlines()
    assert '--signal=TERM@30' in first and first.endswith('--amp' + ' --resume' * bool(restarts))
    assert others == ['scontrol requeue 7'] * (status == 75 or status == 1 and restarts < allowed)


@pytest.mark.parametrize(
    ('arguments', 'gpus', 'message'),
    [
        (['gpu', 'name'], '8', 'usage: [GPUS=16] '),
        (['gpu', 'name', CONFIG], '12', 'GPUS=12 is no multiple of GPUS_PER_NODE=8'),
    ],
)
def test_slurm_script_says_what_is_wrong(arguments, gpus, message):
    result = subprocess.run(
        [ROOT / 'tools/slurm_train.sh', *arguments],
        env=os.environ | {'GPUS': gpus},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and message in result.stderr


def test_missing_config_and_missing_weights_are_named(tmp_path, options, fail):
    assert f'no config at {ROOT}/configs/none.py' in fail('train.py', 'configs/none.py')
    config = 'configs/pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
    result = run(
        *('train.py', config, '--work-dir', tmp_path, '--cfg-options'),
        *('model.target_generator.n_hid=8', 'model.target_generator.vocab_size=8'),
        *('model.neck.out_dims=8',),
        *('model.backbone.arch=tiny', 'model.neck.in_dims=192', options[-1]),
        *('train_dataloader.batch_size=2', 'train_dataloader.num_workers=0'),
    )
    assert result.returncode == 1
    assert 'no weights for DALLEEncoder at' in result.stderr
    assert 'dalle_encoder.safetensors' in result.stderr and 'convert_dalle.py' in result.stderr


CLASSIFIER = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['cae_mm'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(
        type='cae_mm.CAEViT',
        arch=dict(embed_dims=16, depth=2, num_heads=2, layer_scale=0.1),
        img_size=32,
        out_type='cls_token',
    ),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=16),
)
test_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type='CustomDataset',
        data_prefix={data!r},
        pipeline=[
            dict(type='cae_mm.LoadImage'),
            dict(type='Resize', scale=(32, 32)),
            dict(type='PackInputs'),
        ],
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
)
test_evaluator = dict(type='Accuracy', topk=(1,))
test_cfg = dict()
default_hooks = dict(visualization=dict(type='VisualizationHook'))
visualizer = dict(type='UniversalVisualizer')
env_cfg = dict(dist_cfg=dict(backend='nccl'))
"""


def test_test_tool_writes_metrics_predictions_and_pictures(tmp_path):
    for name, value in (('dark', 0), ('light', 255)):
        for i in range(2):
            path = tmp_path / 'data' / name / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (40, 40), (value,) * 3).save(path)
    config = tmp_path / 'classify.py'
    config.write_text(CLASSIFIER.format(data=str(tmp_path / 'data')))
    from mmengine.registry import MODELS

    cfg = Config.fromfile(config)
    model = MODELS.build(cfg.model | dict(type='mmpretrain.ImageClassifier'))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    result = run(
        *('test.py', config, tmp_path / 'weights.pth', '--work-dir', tmp_path / 'work'),
        *('--out', tmp_path / 'metrics.json', '--dump', tmp_path / 'predictions.pkl'),
        *('--show-dir', tmp_path / 'shown'),
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['accuracy/top1'] in (0, 50, 100)
    assert (tmp_path / 'predictions.pkl').exists()
    assert any((tmp_path / 'shown').iterdir())


def test_test_tool_refuses_a_pretraining_config(tmp_path, fail):
    message = 'has no test_dataloader: it describes pretraining'
    assert message in fail('test.py', CONFIG, tmp_path / 'none.pth')
