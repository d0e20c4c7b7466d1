"""Models for inference: strictly loaded, in the frameworks' inferencers, from data alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CLASSES, IMAGE, ROOT, save_trained, shrink_task
from mmengine.config import Config
from pickles import Call

pytest.importorskip('mmcv.ops', reason='mmcv has no compiled operators', exc_type=ImportError)
pytest.importorskip('mmdet', reason='mmdetection is not installed')
pytest.importorskip('mmseg.models', reason='mmsegmentation is not installed', exc_type=ImportError)

import mmdet.apis  # noqa: E402
import mmpretrain  # noqa: E402
import mmseg.apis  # noqa: E402

from cae_mm.apis import init_inferencer, init_model  # noqa: E402


@pytest.fixture(scope='module', params=list(CLASSES))
def case(request, tmp_path_factory):
    """Scope, config and checkpoint, the latter with names of classes as a Runner writes them."""
    scope, folder = request.param, tmp_path_factory.mktemp(request.param)
    return scope, save_trained(scope, folder / 'a.pth'), folder / 'a.pth'


def changed(path, name, change):
    """Writes another file beside ``path``."""
    content = torch.load(path)
    change(content['state_dict'])
    torch.save(content, path.with_name(name))
    return path.with_name(name)


def results(scope, model):
    """What the framework's own function predicts for an image."""
    if scope == 'mmpretrain':
        found = mmpretrain.ImageClassificationInferencer(model)(IMAGE)[0]
        return torch.tensor(found['pred_scores'])
    if scope == 'mmseg':
        return mmseg.apis.inference_model(model, IMAGE).seg_logits.data
    return mmdet.apis.inference_detector(model, IMAGE).pred_instances.bboxes


def test_models_are_those_of_the_frameworks(case):
    """Weights, names of classes and predictions are what their own functions give."""
    scope, cfg, path = case
    model = init_model(cfg, path, device='cpu')
    assert not model.training and {p.device.type for p in model.parameters()} == {'cpu'}
    state = model.state_dict()
    saved = torch.load(path)['state_dict']
    assert state.keys() == saved.keys() and all(torch.equal(state[k], saved[k]) for k in state)
    meta = model.dataset_meta
    assert {k: meta[k] for k in CLASSES[scope]} == CLASSES[scope]
    cfg = model.cfg.copy()  # which they change
    theirs = {
        'mmpretrain': lambda: mmpretrain.get_model(cfg, pretrained=str(path), device='cpu'),
        'mmseg': lambda: mmseg.apis.init_model(cfg, str(path), device='cpu'),
        'mmdet': lambda: mmdet.apis.init_detector(cfg, str(path), device='cpu', palette='random'),
    }[scope]()
    assert torch.equal(results(scope, model), results(scope, theirs))
    assert type(model) is type(theirs)


def test_inferencers_are_those_of_the_frameworks(case, tmp_path):
    scope, cfg, path = case
    infer = init_inferencer(cfg, path, device='cpu')
    folder = {'mmpretrain': 'show_dir'}.get(scope, 'out_dir')
    found = infer([IMAGE], **{folder: str(tmp_path)})
    if scope == 'mmpretrain':
        assert isinstance(infer, mmpretrain.ImageClassificationInferencer)
        own = mmpretrain.ImageClassificationInferencer(cfg, pretrained=str(path), device='cpu')
        assert np.array_equal(own(IMAGE)[0]['pred_scores'], found[0]['pred_scores'])
        assert found[0]['pred_class'] == CLASSES[scope]['classes'][found[0]['pred_label']]
    elif scope == 'mmseg':
        assert isinstance(infer, mmseg.apis.MMSegInferencer)
        assert found['predictions'].shape == IMAGE.shape[:2]
        assert infer.visualizer.dataset_meta['palette'] == CLASSES[scope]['palette']
    else:
        assert isinstance(infer, mmdet.apis.DetInferencer)
        assert len(found['predictions'][0]['bboxes']) == 4
        assert infer.visualizer.dataset_meta['classes'] == CLASSES[scope]['classes']
    assert list(tmp_path.rglob('*.*'))  # a picture


def test_every_tensor_of_the_model_is_needed(case):
    scope, cfg, path = case
    key = list(torch.load(path)['state_dict'])[-1]
    with pytest.raises(ValueError, match=f'less.pth does not fit .*: 1 keys missing: {key}'):
        init_model(cfg, changed(path, 'less.pth', lambda state: state.pop(key)))

    def grow(state):
        state[key] = torch.zeros(99)

    with pytest.raises(ValueError, match=rf'other.pth does not fit .*{key} is \(99,\) in the file'):
        init_model(cfg, changed(path, 'other.pth', grow))
    more = changed(path, 'more.pth', lambda state: state.update(unused=torch.zeros(1)))
    init_model(cfg, more)


def test_names_of_classes_come_from_the_config_where_the_file_has_none(case):
    scope, cfg, path = case
    bare = path.with_name('bare.pth')
    torch.save(torch.load(path)['state_dict'], bare)
    meta = init_model(cfg, bare).dataset_meta
    dataset = cfg.test_dataloader.dataset
    expected = {
        'mmpretrain': None,  # of a folder, known when it is listed
        'mmseg': ('wall', 'building', 'sky', 'tree', 'grass'),
        'mmdet': mmdet.datasets.CocoDataset.METAINFO['classes'],
    }[scope]
    assert meta.get('classes') == expected, dataset
    old = path.with_name('old.pth')
    content = dict(state_dict=torch.load(path)['state_dict'], meta=dict(CLASSES=('x', 'y')))
    torch.save(content, old)
    assert init_model(cfg, old).dataset_meta['classes'] == ('x', 'y')


def test_other_configs_are_refused(case):
    pretraining = ROOT / 'configs/pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
    with pytest.raises(ValueError, match='300e_in1k.py has no test_dataloader, as those of pretra'):
        init_model(pretraining, case[2])
    cfg = Config.fromfile(pretraining)
    cfg.default_scope = 'mmocr'
    with pytest.raises(ValueError, match=r"default_scope of \['mmpretrain', .*not 'mmocr'"):
        init_model(cfg, case[2])
    with pytest.raises(FileNotFoundError, match='no weights for .* at .*none.pth'):
        init_model(case[1], 'none.pth')


def test_no_function_of_the_frameworks_executes_a_file(tmp_path):
    """In a process that knows of cae_mm from the configs alone."""
    for scope in CLASSES:
        shrink_task(scope).dump(tmp_path / f'{scope}.py')
    executed = tmp_path / 'executed'
    text = f"open({str(executed)!r}, 'w').close()"
    torch.save(dict(state_dict={}, meta=Call(exec, text)), tmp_path / 'hostile.pth')
    meta = dict(cfg=text, config=text)
    content = dict(state_dict={}, meta=meta, message_hub=dict(runtime_info=dict(cfg=text)))
    torch.save(content, tmp_path / 'config.pth')
    script = Path(__file__).with_name('hostile_loads.py')
    output = subprocess.run(
        [sys.executable, script, tmp_path],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    ).stdout
    errors = json.loads(output.splitlines()[-1])
    assert 'Cannot find the config in the checkpoint' in errors.pop('a config in a file')
    assert len(errors) == 10
    for name, error in errors.items():
        refusal = 'hostile.pth was refused, nothing in it was executed: it refers to builtins.exec'
        assert refusal in error, (name, error)
    assert not executed.exists()
