"""Loading says what fits; a new head may be missing, a wrong file may not pass."""

import re
from pathlib import Path

import official_reference as official
import pytest
import torch
from builders import GRID, build_cae
from mmengine.registry import MODELS

import cae_mm.registry  # noqa: F401
from cae_mm.checkpoints.description import KEY
from cae_mm.checkpoints.files import Checkpoint
from cae_mm.checkpoints.pretrained import compare_keys, load_pretrained, match_weights
from cae_mm.conversion import convert_checkpoint
from cae_mm.models import CAEViT
from cae_mm.models.positions import SinCosPositions

ARCH = dict(embed_dims=24, depth=2, num_heads=3, layer_scale=0.1)


def build(**options):
    options = dict(arch=ARCH, img_size=12, patch_size=4) | options
    model = CAEViT(**options)
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param)
    return model


def classifier(num_classes=5, **options):
    backbone = dict(type='cae_mm.CAEViT', arch=ARCH, img_size=12, patch_size=4) | options
    head = dict(type='mmpretrain.LinearClsHead', num_classes=num_classes, in_channels=24)
    return MODELS.build(dict(type='mmpretrain.ImageClassifier', backbone=backbone, head=head))


def save(state, path, prefix=''):
    torch.save({f'{prefix}{k}': v for k, v in state.items()}, path)
    return path


@pytest.fixture
def log(monkeypatch):
    """The lines that loading logs."""
    lines = []
    monkeypatch.setattr(
        'cae_mm.checkpoints.pretrained.print_log', lambda line, *_, **__: lines.append(line)
    )
    return lines


def test_keys_are_sorted_by_what_becomes_of_them():
    target = {'a': torch.zeros(1), 'b': torch.zeros(2), 'c': torch.zeros(3)}
    match = compare_keys(target, {'a': torch.ones(1), 'b': torch.ones(3), 'd': torch.ones(1)})
    assert match.matched == {'a': torch.ones(1)}
    assert (match.missing, match.unexpected) == (['c'], ['d'])
    assert match.problems == [
        '1 keys missing: c',
        '1 keys unexpected: d',
        '1 keys of another shape: b is (3,) in the file and (2,) in the model',
    ]
    assert compare_keys(target, target).problems == []


def test_a_new_head_may_be_missing_or_of_another_size(tmp_path, log):
    trained, model = classifier(num_classes=7), classifier()
    before = model.head.fc.weight.clone()
    match = load_pretrained(model, save(trained.state_dict(), tmp_path / 'a.pth'), min_matched=0.9)
    assert list(match.reshaped) == ['head.fc.weight', 'head.fc.bias']
    assert torch.equal(model.backbone.norm.weight, trained.backbone.norm.weight)
    assert torch.equal(model.head.fc.weight, before)
    total = len(model.state_dict())
    assert any(f'{total - 2} of {total} tensors loaded' in line for line in log)
    assert any('2 keys of another shape: head.fc.weight is (7, 24)' in line for line in log)

    path = save(build().state_dict(), tmp_path / 'b.pth', 'backbone.')
    match = load_pretrained(model, path, min_matched=0.9)
    assert match.missing == ['head.fc.weight', 'head.fc.bias']
    with pytest.raises(ValueError, match='does not fit ImageClassifier: 2 keys missing: head.fc'):
        load_pretrained(model, path)


def test_relative_tables_are_added_and_resized_and_the_norm_left_out(tmp_path, log):
    path = save(build().state_dict(), tmp_path / 'a.pth', 'backbone.')
    model = classifier(use_rel_pos_bias=True, final_norm=False)
    load_pretrained(model, path, min_matched=0.9)
    assert any('2 relative position tables start from zero' in line for line in log)
    assert any('the final norm is left out' in line for line in log)
    load_pretrained(build(use_rel_pos_bias=True), path, 'backbone.')  # strict, too
    save(build(use_rel_pos_bias=True).state_dict(), path)
    load_pretrained(build(use_rel_pos_bias=True, img_size=20), path)
    assert any('2 relative position tables are resized bicubically' in line for line in log)


@pytest.mark.parametrize(
    ('state', 'hint'),
    [
        (lambda: build().state_dict(), 'The file holds a bare encoder: load it with the backbone'),
        (
            lambda: {f'student.{k}': v for k, v in classifier().state_dict().items()},
            "The file has these keys under prefix='student.'",
        ),
        (
            lambda: official.pretraining_state(),
            'The file has the names of official weights: convert it with tools/convert_checkpoint',
        ),
        (
            lambda: classifier(arch=ARCH | dict(embed_dims=48)).state_dict(),
            'The file has width 48, the model 24: it is of another arch',
        ),
        (lambda: {'resnet.conv1': torch.zeros(3)}, 'only 0 of 35 tensors .0.0% of the elements'),
    ],
)
def test_a_wrong_file_is_refused_with_the_likely_cause(tmp_path, state, hint):
    path = save(state(), tmp_path / 'a.pth')
    model = classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='does not fit ImageClassifier.backbone') as error:
        load_pretrained(model, path, min_matched=0.9)
    assert re.search(hint, str(error.value))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_share_counts_tensors_and_elements(tmp_path):
    state = classifier().state_dict()
    small = [k for k in state if k.startswith('backbone.') and state[k].ndim == 1][:4]
    few = {k: v for k, v in state.items() if k not in small}
    path = save(few, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'only 31 of 35 tensors .* at least 90% must'):
        load_pretrained(classifier(), path, min_matched=0.9)
    load_pretrained(classifier(), path, min_matched=0.85)
    big = {k: v for k, v in state.items() if k != 'backbone.blocks.0.mlp.fc1.weight'}
    with pytest.raises(ValueError, match=r'only 34 of 35 tensors \(8\d.\d% of the elements'):
        load_pretrained(classifier(), save(big, path), min_matched=0.9)


def test_heads_of_a_converted_file_must_be_those_of_the_model(tmp_path, log):
    torch.save({'model': official.pretraining_state(24, 12)}, tmp_path / 'a.pth')
    result = convert_checkpoint(tmp_path / 'a.pth', tmp_path, num_heads=3, decoder_heads=3)
    load_pretrained(build(), result.path, 'backbone.')
    message = r'made with 3 heads, but the model has 4: .* Set num_heads in arch'
    with pytest.raises(ValueError, match=message):
        load_pretrained(build(arch=ARCH | dict(num_heads=4)), result.path, 'backbone.')


@pytest.mark.parametrize(
    'options', [dict(), dict(pretrain_img_size=12), dict(pretrain_img_size=16)]
)
def test_positions_are_resized_from_the_size_that_the_file_says(tmp_path, log, options):
    torch.save({'model': official.pretraining_state(24, 12)}, tmp_path / 'a.pth')
    result = convert_checkpoint(tmp_path / 'a.pth', tmp_path, num_heads=3, decoder_heads=3)
    vit, images = build(img_size=16, **options), torch.randn(2, 3, 16, 16)
    vit(images)  # with positions that must not be kept
    load_pretrained(vit, result.path, 'backbone.')
    assert vit.describe().pretrain_img_size == (12, 12)
    remark = 'positions are resized from those for 12x12 pixels, as the file says'
    assert any(remark in line for line in log) == (options != dict(pretrain_img_size=12))
    expected = build(img_size=16, pretrain_img_size=12)
    expected.load_state_dict(vit.state_dict())
    assert torch.equal(vit(images)[0], expected(images)[0])


def test_regressor_and_decoder_have_the_positions_of_the_encoder():
    """At another size too: their weights know both in one system of coordinates."""
    own, large = build_cae(), build_cae(backbone=dict(img_size=(16 * GRID[0], 16 * GRID[1])))
    meta = {KEY: {'encoder': own.backbone.describe().to_dict()}}
    content = {'state_dict': own.state_dict(), 'meta': meta}
    for model in (large, own):
        match_weights(model, Checkpoint(Path('a.pth'), content))
        grid, exact = model.backbone.grid, SinCosPositions(16)
        for positions in (model.backbone.positions, model.neck.positions):
            table = positions(grid, torch.device('cpu'))
            assert torch.equal(table, exact(grid, torch.device('cpu'))) == (model is own)
            assert torch.equal(table, model.backbone.positions(grid, torch.device('cpu')))


def test_urls_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match='CAEViT loads files only: download https://a/b.pth first'):
        load_pretrained(build(), 'https://a/b.pth')
    with pytest.raises(FileNotFoundError, match='no weights for CAEViT at .*none.pth'):
        load_pretrained(build(), tmp_path / 'none.pth')


def test_an_official_command_line_beside_the_weights_is_harmless(tmp_path):
    from argparse import Namespace

    torch.save({'model': build().state_dict(), 'args': Namespace(lr=1.0)}, tmp_path / 'a.pth')
    load_pretrained(build(), tmp_path / 'a.pth')
