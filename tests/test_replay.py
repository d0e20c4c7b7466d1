"""A broken step is repeated from its file: same data, same random numbers, same losses."""

import json
import math

import pytest
import torch
from builders import cae_config, make_images, run_tool
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from two_processes import train_faulty

from cae_mm.engine import CAERunner
from cae_mm.engine.faults import read_fault
from cae_mm.models import CAE
from cae_mm.replay import replay


@MODELS.register_module()
class FragileCAE(CAE):
    """Its gradient is NaN for an image of one colour, whose loss is finite: sqrt at 0."""

    def loss(self, inputs, data_samples):
        losses = super().loss(inputs, data_samples)
        contrast = inputs[0].std((2, 3)).sum(1)  # [B]
        more = (contrast * self.neck.mask_token.norm()).sqrt().mean()
        return losses | dict(loss_main=losses['loss_main'] + more)


def run_config(folder, work_dir):
    """Two epochs of three steps on shuffled images, with drop path."""
    rgb = dict(target_generator=dict(type='cae_mm.RGBTarget'), neck=dict(out_dims=48))
    model = cae_config(**rgb, backbone=dict(drop_path_rate=0.5)) | dict(type='FragileCAE')
    pipeline = [
        dict(type='cae_mm.LoadImage'),
        dict(type='cae_mm.TwoViewResizedCrop', size=16, flip_prob=0.5),
        dict(type='cae_mm.CAEMaskGenerator', patch_size=4, mask_ratio=0.5, min_block=2),
        dict(type='mmpretrain.PackInputs'),
    ]
    dataset = dict(data_root=str(folder), with_label=False, pipeline=pipeline)
    cfg = dict(
        model=model,
        train_dataloader=dict(
            batch_size=4,
            num_workers=1,
            dataset=dict(type='mmpretrain.CustomDataset', extensions=('.png',), **dataset),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
        ),
        optim_wrapper=dict(
            type='cae_mm.MixedPrecisionOptimWrapper',
            dtype='bfloat16',
            optimizer=dict(type='AdamW', lr=1e-3, fused=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        custom_hooks=[dict(type='cae_mm.NumericalFaultHook')],
        default_scope='mmengine',
        log_level='ERROR',
        randomness=dict(seed=5),
        work_dir=str(work_dir),
        experiment_name=work_dir.name,
    )
    return Config(cfg)


def test_losses_are_those_of_the_run(tmp_path, capsys):
    """Bit for bit: order, crops, masks and drop path are drawn as they were."""
    images = make_images(tmp_path / 'images', dict(a=255), 12)
    Image.new('RGB', (24, 20), 'black').save(images / 'a/0.png')
    CAERunner.from_cfg(run_config(images, tmp_path / 'run')).train()
    first, second = sorted((tmp_path / 'run/faults').glob('*.json'))
    fault = read_fault(second)
    assert fault.batches[0].epoch == 1 and fault.precision == 'bfloat16'
    assert fault.reason == 'the norm of the gradients is nan'
    assert any(path.endswith('a/0.png') for path in fault.batches[0].images)
    findings = replay(second)
    assert findings.losses == fault.losses and len(fault.losses) == 5
    assert all(math.isfinite(x) for x in fault.losses.values())
    assert findings.modules == [] and findings.gradients == ['neck.mask_token']
    assert findings.losses != read_fault(first).losses
    run_tool('replay.py', second)
    text = capsys.readouterr().out
    assert str(fault) in text and fault.batches[0].images[0] in text
    assert 'gradients that are not finite: 1 of ' in text and '(neck.mask_token)' in text
    content = json.loads(second.read_text())
    content['batches'][0]['images'][0] = 'other.png'
    second.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='the data is not what it was: the batch of iteration'):
        replay(second)


def test_the_first_module_that_breaks_is_named(tmp_path):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        train_faulty(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=1))
        findings = replay(tmp_path / 'faults/iter_2_rank_0.json')
    finally:
        torch.set_default_dtype(default)
    assert findings.modules[0] == 'data_preprocessor'  # the image itself is NaN
    assert 'backbone.norm' in findings.modules and 'neck.output' in findings.modules
    assert math.isnan(findings.losses['loss_main'])
    assert 'neck.output.bias' in findings.gradients
    assert 0 < len(findings.gradients) <= findings.parameters
