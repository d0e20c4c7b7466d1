"""Weights of ours, carried out, compute the same in the networks of others."""

import builtins
import hashlib
import json
import re
import sys

import official_reference as official
import pytest
import torch
import yaml
from mmengine.registry import MODELS

import cae_mm.conversion.export as export_module
from cae_mm.checkpoints import Checkpoint, EncoderDescription, read_checkpoint
from cae_mm.checkpoints.files import write_safetensors
from cae_mm.checkpoints.pretrained import strip_prefix
from cae_mm.conversion import convert_checkpoint, export_checkpoint
from cae_mm.conversion.card import UNKNOWN, write_card
from cae_mm.conversion.convert import Conversion
from cae_mm.conversion.targets import TARGETS
from cae_mm.models import CAEViT, build_encoder

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
OPTIONS = dict(num_heads=3, img_size=12)


def build(pooled=False, **options):
    arch = dict(embed_dims=24, depth=2, num_heads=3, layer_scale=0.1)
    options = dict(img_size=12, use_rel_pos_bias=pooled) | options
    model = CAEViT(
        arch=arch, patch_size=4, out_type='avg_featmap' if pooled else 'raw', **options
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        param.data.copy_(0.3 * noise + (param.ndim == 1 and 'weight' in name))
    return model


def save(model, path, **more):
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    torch.save({'state_dict': state | more, 'meta': {}}, path)
    return path


def load_mmpretrain(usage, path):
    import mmpretrain.models  # noqa: F401  registers it

    config = eval(usage.removeprefix('backbone='))  # what the tool prints for a config
    model = MODELS.build(config)
    model.load_state_dict(strip_prefix(read_checkpoint(path).state, 'backbone.'))
    return model, lambda images: model(images)[0]


def load_timm(usage, path):
    timm = pytest.importorskip('timm')
    model = timm.create_model(re.search(r"'(local-dir:.*?)'", usage)[1], pretrained=True)

    def features(images):
        tokens = model.forward_features(images)
        pooled = model.global_pool == 'avg'
        return model.forward_head(tokens, pre_logits=True) if pooled else tokens

    return model, features


def load_huggingface(usage, path):
    transformers = pytest.importorskip('transformers')
    model, info = transformers.BeitModel.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())

    def features(images):
        output = model(images)
        return output.pooler_output if model.config.use_mean_pooling else output.last_hidden_state

    return model, features


def run_card(path):
    """Rows of a card's table, and the images and features of its code."""
    _, header, text = path.read_text().split('---\n', 2)
    assert yaml.safe_load(header)['pipeline_tag'] == 'image-feature-extraction'
    values = {}
    exec(re.search(r'```python\n(.*)```', text, re.DOTALL)[1], values)
    return read_rows(text), values['images'], values['features']


def read_rows(text):
    return dict(re.findall(r'^\| (\w.*?) \| (.*) \|$', text, re.MULTILINE))


LOADERS = dict(mmpretrain=load_mmpretrain, timm=load_timm, huggingface=load_huggingface)


@pytest.mark.parametrize('pooled', [False, True], ids=['pretrained', 'fine-tuned'])
@pytest.mark.parametrize('target', list(LOADERS))
def test_features_are_the_same_there(tmp_path, monkeypatch, target, pooled):
    if target != 'mmpretrain':
        pytest.importorskip('timm' if target == 'timm' else 'transformers')
    ours = build(pooled)
    path = save(ours, tmp_path / 'own.pth')
    result = export_checkpoint(path, tmp_path / 'out', target, **OPTIONS)
    assert result.path.name == 'out_encoder' + TARGETS[target].suffix
    assert result.errors[torch.float64] <= 1e-9 and result.errors[torch.float32] <= 1e-5
    assert any('--pool' in remark for remark in result.remarks)
    theirs, features = LOADERS[target](result.usage, result.path)
    theirs.eval()
    monkeypatch.chdir(tmp_path)
    rows, images, found = run_card(result.card)
    assert rows['network'] == '2 blocks of width 24, 3 heads, patches of 4 px'
    assert rows['images'].startswith('12 x 12 px') and 'normalisation not known' in rows['images']
    assert hashlib.sha256(path.read_bytes()).hexdigest() in rows['weights']
    assert rows['trained'] == rows['data'] == rows['metrics'] == 'not known: the file does not tell'
    expected = ours(images)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        expected = ours.to(dtype)(IMAGES.to(dtype))[0]
        theirs.to(dtype)
        actual = features(IMAGES.to(dtype))
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=tolerance * expected.abs().max().item()
        )
    back = convert_checkpoint(result.path, tmp_path / 'back', num_heads=3)
    for key, value in ours.state_dict().items():
        assert torch.equal(back.state[f'backbone.{key}'], value.float())
    assert back.description.pooled_norm == pooled


@pytest.mark.parametrize('state', [official.pretraining_state(24, 12), official.finetuned_state()])
def test_official_weights_come_back_bit_for_bit(tmp_path, state):
    torch.save({'model': state}, tmp_path / 'a.pth')
    ours = convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'ours', num_heads=3, decoder_heads=3)
    result = export_checkpoint(ours.path, tmp_path / 'theirs', 'official')
    assert result.path == tmp_path / 'theirs_full.pth' and not result.remarks
    back = torch.load(result.path, weights_only=True)['model']
    assert back.keys() == state.keys()
    for key, value in state.items():
        if 'pos_embed' in key:  # ours is computed, in another order of operations
            torch.testing.assert_close(back[key], value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(back[key], value), key


def test_a_card_tells_what_the_run_wrote(tmp_path, monkeypatch):
    model = build()
    known = dict(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    meta = dict(experiment_name='mine_20260101', epoch=3, iter=60, seed=7, cae_mm={})
    meta['cae_mm']['encoder'] = model.describe().to_dict() | known
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    hub = {'runtime_info': {'best_score': 0.5}}
    torch.save(dict(state_dict=state, meta=meta, message_hub=hub), tmp_path / 'own.pth')
    result = export_checkpoint(tmp_path / 'own.pth', tmp_path / 'out', 'mmpretrain')
    monkeypatch.chdir(tmp_path)
    rows, _, features = run_card(result.card)
    assert rows['trained'] == 'experiment_name mine_20260101, epoch 3, iter 60, seed 7'
    assert rows['metrics'] == 'best score 0.5'
    assert 'minus (1.0, 2.0, 3.0), divided by (4.0, 5.0, 6.0)' in rows['images']
    text = result.card.read_text()
    assert 'images - torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1)) / torch.tensor([4.0' in text


DATASET = "type='a.B', data_root='/my/images', data_prefix='train', pipeline=[]"
KNOWN = '`a.B`, `/my/images`, `train`', 'epoch 3, 300 epochs planned'
NOT_KNOWN = UNKNOWN, 'epoch 3'


@pytest.mark.parametrize(
    ('loader', 'told'),
    [
        (f'dict(dataset=dict({DATASET}))', KNOWN),
        (f"dict(dataset=dict(type='Repeat', dataset=dict({DATASET})))", KNOWN),
        ("dict(dataset=dict(type='a | `b\\n', data_root=''))", ('`a b `', KNOWN[1])),
        ("open('executed', 'w')", NOT_KNOWN),
        ('(', NOT_KNOWN),
        ('-' * 200_000 + '1', NOT_KNOWN),
    ],
)
def test_a_card_names_the_data_of_the_config(tmp_path, monkeypatch, loader, told):
    monkeypatch.chdir(tmp_path)
    meta = dict(epoch=3, cfg=f'train_dataloader = {loader}\ntrain_cfg = dict(max_epochs=300)\n')
    source = Checkpoint(tmp_path / 'own.pth', dict(state_dict={}, meta=meta))
    source.path.touch()
    options = dict(library='none', code='', checked='not', language='text')
    text = write_card(tmp_path / 'out.pth', build().describe(), source, **options).read_text()
    rows = read_rows(text)
    assert (rows['data'], rows['trained']) == told
    assert not (tmp_path / 'executed').exists()


def test_official_encoder_alone(tmp_path):
    path = save(build(), tmp_path / 'own.pth')
    result = export_checkpoint(path, tmp_path, 'official', **OPTIONS)
    assert result.path == tmp_path / 'own_encoder.pth' and result.errors == {}
    card = (tmp_path / 'own_encoder.pth.md').read_text()
    assert '```text\n--finetune own_encoder.pth,' in card and 'converted back, all' in card
    state = torch.load(result.path, weights_only=True)['model']
    expected = {k for k in official.pretraining_state() if k.startswith('encoder.')}
    assert state.keys() == expected


@pytest.mark.parametrize('target', ['mmpretrain', 'timm'])
def test_a_classifier_goes_with_its_head(tmp_path, target):
    if target == 'timm':
        pytest.importorskip('timm')
    head = {'head.fc.weight': torch.randn(5, 24), 'head.fc.bias': torch.randn(5)}
    path = save(build(pooled=True), tmp_path / 'own.pth', **head)
    result = export_checkpoint(path, tmp_path / 'out', target, **OPTIONS)
    assert result.path.name.startswith('out_full')
    model, _ = LOADERS[target](result.usage, result.path)
    if target == 'timm':
        assert torch.equal(model.head.weight, head['head.fc.weight'])
    else:
        assert torch.equal(read_checkpoint(result.path).state['head.fc.bias'], head['head.fc.bias'])
    alone = export_checkpoint(path, tmp_path / 'out', target, part='encoder', **OPTIONS)
    assert alone.path.name.startswith('out_encoder')
    assert [(rule.ours, n) for rule, n in alone.counts.items() if rule.foreign == '(left out)'] == [
        ('head.{rest}', 2)
    ]


def test_hugging_face_gets_no_head_and_says_so(tmp_path):
    pytest.importorskip('transformers')
    path = save(build(pooled=True), tmp_path / 'own.pth', **{'head.fc.bias': torch.ones(5)})
    result = export_checkpoint(path, tmp_path / 'out', 'huggingface', **OPTIONS)
    *_, last = result.counts
    assert last.ours == 'head.{rest}' and last.note == 'not exported'
    config = json.loads((result.path / 'config.json').read_text())
    assert config['layer_norm_eps'] == 1e-6 and config['use_mean_pooling']


def test_positions_resized_from_another_size_go_along(tmp_path):
    model = build(img_size=(12, 20), pretrain_img_size=56)
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    metadata = {'encoder': model.describe().to_dict()}
    write_safetensors(tmp_path / 'a.safetensors', state, metadata)
    result = export_checkpoint(tmp_path / 'a.safetensors', tmp_path / 'b', 'mmpretrain')
    assert not result.remarks
    table = read_checkpoint(result.path).state['backbone.pos_embed']
    expected = model.positions((3, 5), torch.device('cpu'))
    assert torch.equal(table[0, 1:], expected) and not table[0, 0].any()
    pytest.importorskip('transformers')
    with pytest.raises(ValueError, match='takes square images only'):
        export_checkpoint(tmp_path / 'a.safetensors', tmp_path / 'b', 'huggingface')


def test_dense_prediction_without_final_norm(tmp_path):
    path = save(build(final_norm=False), tmp_path / 'own.pth')
    result = export_checkpoint(path, tmp_path / 'out', 'mmpretrain', **OPTIONS)
    assert "'final_norm': False" in result.usage
    pytest.importorskip('timm')
    with pytest.raises(ValueError, match='has no final norm .* the network there always does'):
        export_checkpoint(path, tmp_path / 'out', 'timm', **OPTIONS)


def test_other_features_are_found_and_nothing_is_written(tmp_path, monkeypatch):
    target = TARGETS['mmpretrain']

    def build_other(*args):
        network = target.build(*args)
        return network._replace(features=lambda images: network.features(images) * (1 + 1e-7))

    monkeypatch.setitem(TARGETS, 'mmpretrain', target._replace(build=build_other))
    path = save(build(), tmp_path / 'own.pth')
    with pytest.raises(RuntimeError, match='gives other features in torch.float64: .* 1e-0[78] '):
        export_checkpoint(path, tmp_path / 'out', 'mmpretrain', **OPTIONS)
    assert list(tmp_path.iterdir()) == [path]


def test_a_changed_way_back_is_found(tmp_path, monkeypatch):
    def translate(state, *args, **kwargs):
        changed = {key: value + 1 for key, value in state.items()}
        return Conversion(changed, 'official', None, None, {}, [])

    monkeypatch.setattr(export_module, 'translate', translate)
    path = save(build(), tmp_path / 'own.pth')
    with pytest.raises(RuntimeError, match='the way back from official names gives other weights'):
        export_checkpoint(path, tmp_path / 'out', 'official', **OPTIONS)


def test_what_the_file_tells_is_not_assumed_and_not_contradicted(tmp_path):
    model = build()
    meta = {'cae_mm': {'encoder': model.describe().to_dict()}}
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    torch.save({'state_dict': state, 'meta': meta}, tmp_path / 'own.pth')
    assert not export_checkpoint(tmp_path / 'own.pth', tmp_path, 'official', **OPTIONS).remarks
    for option in (dict(num_heads=4), dict(img_size=(12, 16)), dict(pooled=True)):
        with pytest.raises(ValueError, match='own.pth tells .*, not .*: leave the option out'):
            export_checkpoint(tmp_path / 'own.pth', tmp_path, 'official', **option)
    meta['cae_mm']['encoder'].pop('depth')
    torch.save({'state_dict': state, 'meta': meta}, tmp_path / 'own.pth')
    with pytest.raises(ValueError, match="own.pth describes its encoder wrongly: .*'depth'"):
        export_checkpoint(tmp_path / 'own.pth', tmp_path, 'official')


def test_missing_packages_are_named(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split('.')[0] in ('timm', 'transformers'):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    path = save(build(), tmp_path / 'own.pth')
    for target, package in (('timm', 'timm'), ('huggingface', 'transformers')):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f'{package} is needed for this: pip install -c'):
            export_checkpoint(path, tmp_path / 'out', target, **OPTIONS)


def test_arguments_that_make_no_sense(tmp_path):
    path = save(build(), tmp_path / 'own.pth')
    with pytest.raises(ValueError, match="Unknown target 'onnx': choose one of"):
        export_checkpoint(path, tmp_path, 'onnx')
    with pytest.raises(ValueError, match="Unknown part 'all': choose one of"):
        export_checkpoint(path, tmp_path, 'official', part='all')
    with pytest.raises(ValueError, match='does not tell the number of heads, .* give --num-heads'):
        export_checkpoint(path, tmp_path, 'official')
    torch.save({'cls_token': torch.zeros(1, 1, 24)}, path)
    message = "no 'backbone.cls_token'. Weights of others are brought in with tools/convert_check"
    with pytest.raises(ValueError, match=message):
        export_checkpoint(path, tmp_path, 'official')


def test_timm_is_told_all_sizes_of_its_network(tmp_path, monkeypatch):
    """Newer versions remember what a model was made with, older ones have to be told."""
    timm = pytest.importorskip('timm')
    told = {}
    save_for_hf = timm.models.save_for_hf
    monkeypatch.setattr(
        timm.models,
        'save_for_hf',
        lambda *args, **options: told.update(options) or save_for_hf(*args, **options),
    )
    export_checkpoint(save(build(), tmp_path / 'own.pth'), tmp_path / 'out', 'timm', **OPTIONS)
    assert told['model_args']['depth'] == 2 and told['model_args']['use_abs_pos_emb']


@pytest.mark.parametrize('target', list(TARGETS))
def test_windows_of_attention_have_no_place_elsewhere(tmp_path, target):
    vit = build(window_size=2, global_blocks=(1,))
    description = vit.describe()
    plain = json.loads(json.dumps(description.to_dict()))
    assert EncoderDescription.from_dict(plain) == description
    rebuilt = build_encoder(description).eval()
    rebuilt.load_state_dict(vit.state_dict())
    assert torch.equal(rebuilt(IMAGES)[0], vit(IMAGES)[0])
    assert not torch.allclose(build()(IMAGES)[0], vit(IMAGES)[0])  # the same weights
    state = {f'backbone.{key}': value for key, value in vit.state_dict().items()}
    write_safetensors(tmp_path / 'own.safetensors', state, dict(encoder=description.to_dict()))
    with pytest.raises(ValueError, match=f'to {target}: its blocks attend within windows of 2'):
        export_checkpoint(tmp_path / 'own.safetensors', tmp_path / 'out', target)
