"""Weights of others, brought in, compute what the others' networks compute."""

import os
import pickle
import re

import numpy as np
import official_reference as official
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from pickles import Call

from cae_mm.checkpoints import read_checkpoint
from cae_mm.checkpoints.pretrained import guess_source, load_pretrained
from cae_mm.conversion import convert_checkpoint
from cae_mm.models import CAENeck, CAEViT, build_encoder
from cae_mm.patches import split_mask

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
HEADS = dict(num_heads=3, decoder_heads=3)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def double(state):
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


def save(state, path, **more):
    torch.save({'model': state} | more, path)
    return path


def load(result, **options):
    """Our encoder with converted weights, in float64, without the exact positions' rounding."""
    encoder = build_encoder(result.description, **options)
    load_pretrained(encoder, result.path, prefix='backbone.')
    return encoder.double().eval()


def convert(state, tmp_path, **options):
    return convert_checkpoint(save(state, tmp_path / 'a.pth'), tmp_path / 'out', **options)


@pytest.mark.parametrize('neck_width', [24, 12])
def test_official_pretraining_network_computes_the_same(tmp_path, neck_width):
    state = official.pretraining_state(24, neck_width)
    result = convert(state, tmp_path, **HEADS)
    assert result.path == tmp_path / 'out_full.safetensors'
    encoder, neck = load(result), CAENeck(**result.neck)
    load_pretrained(neck, result.path, prefix='neck.')
    neck.double()
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0, 0, 0, 1]]).bool()
    # our positions are float32 tables, made by another order of operations
    state = double(state)
    for name, width in (('encoder.', 24), ('alignment_encoder.', 24), ('rd_', neck_width)):
        table = encoder.positions if width == 24 else neck.positions
        table = table((3, 3), torch.device('cpu')).double()
        close(state[f'{name}pos_embed'][0, 1:], table, 1e-6)
        state[f'{name}pos_embed'] = F.pad(table, (0, 0, 1, 0))[None]
    logits, latents, targets = official.pretraining(IMAGES, mask, state, 3, 3)

    ids_v, ids_m = split_mask(mask)
    z_v = neck.project(encoder.forward_features(IMAGES, ids_v)[:, 1:])
    z_m = neck.regress(z_v, ids_v, ids_m, (3, 3))
    close(z_m, latents)
    close(neck.decode(z_m, ids_m, (3, 3)), logits)
    close(neck.project(encoder.forward_features(IMAGES, ids_m)[:, 1:]), targets)


def test_official_fine_tuned_network_computes_the_same(tmp_path):
    state = official.finetuned_state()
    result = convert(state, tmp_path)
    encoder = load(result, out_type='avg_featmap')
    assert result.description.num_heads == 3  # from the tables' width
    state = double(state)
    table = encoder.positions((3, 3), torch.device('cpu')).double()
    state['pos_embed'] = F.pad(table, (0, 0, 1, 0))[None]
    pooled = official.layer_norm(official.tokens(IMAGES, state, 3)[:, 1:].mean(1), state, 'fc_norm')
    (features,) = encoder(IMAGES)
    close(features, pooled)
    head = double({k: v for k, v in result.state.items() if k.startswith('head.')})
    logits = F.linear(features, head['head.fc.weight'], head['head.fc.bias'])
    close(logits, F.linear(pooled, state['head.weight'], state['head.bias']))


def dense_state(grid=(16, 16)):
    """A segmentation checkpoint: positions of 14x14 patches, resized; no final norm; a pyramid."""
    state = official.finetuned_state(grid=grid, patch=2, prefix='backbone.')
    table = official.positions((14, 14), 24)[:, 1:].transpose(1, 2).reshape(1, 24, 14, 14)
    table = F.interpolate(table, size=grid, mode='bicubic', align_corners=False)
    state['backbone.pos_embed'] = F.pad(table.flatten(2).transpose(1, 2), (0, 0, 1, 0))
    for name in ('fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'):
        del state[name]
    return state | {'backbone.fpn1.0.weight': torch.zeros(2), 'decode_head.a.b': torch.zeros(1)}


def test_official_dense_network_computes_the_same(tmp_path):
    state = dense_state()
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'a.pth')
    result = convert_checkpoint(tmp_path / 'a.pth', tmp_path / 'out')
    sizes = result.description
    assert sizes.img_size == (32, 32) and sizes.pretrain_img_size == (28, 28)
    assert not sizes.final_norm
    assert result.path.name == 'out_encoder.safetensors'
    left = {rule.foreign: rule.note for rule in result.counts if rule.ours == '(left out)'}
    assert set(left) == {'backbone.fpn{rest}', 'decode_head.{rest}'} and all(left.values())
    encoder, images = load(result), torch.randn(1, 3, 32, 32).double()
    state = double(state)
    table = encoder.positions((16, 16), torch.device('cpu')).double()
    state['backbone.pos_embed'] = F.pad(table, (0, 0, 1, 0))[None]
    close(encoder(images)[0], official.tokens(images, state, 3, 'backbone.'))


def build_mmpretrain_cae():
    model = MODELS.build(
        dict(
            type='mmpretrain.CAE',
            backbone=dict(
                type='mmpretrain.CAEPretrainViT',
                arch=dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=96),
                img_size=12,
                patch_size=4,
                layer_scale_init_value=0.1,
            ),
            neck=dict(
                type='mmpretrain.CAENeck',
                num_classes=8,
                embed_dims=24,
                num_heads=3,
                regressor_depth=2,
                decoder_depth=1,
                layer_scale_init_value=0.1,
                mask_tokens_num=4,
            ),
            head=dict(type='mmpretrain.CAEHead', loss=dict(type='mmpretrain.CAELoss', lambd=2)),
            target_generator=dict(type='mmpretrain.DALL-E', n_hid=8, vocab_size=8),
        )
    )
    model.init_weights()
    return randomize(model)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        if 'pos' not in name.split('.')[-1] or 'bias_table' in name:
            noise = torch.randn(param.shape, generator=generator)
            param.data.copy_(0.3 * noise + (param.ndim == 1 and 'weight' in name))
    model.eval()  # mmpretrain's returns None
    return model


def test_mmpretrains_cae(tmp_path):
    import mmpretrain.models  # noqa: F401  registers it

    model = build_mmpretrain_cae()
    path = tmp_path / 'cae.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    result = convert_checkpoint(path, tmp_path, **HEADS)
    assert result.path == tmp_path / 'cae_full.safetensors'
    ours = load(result)
    mask = torch.zeros(2, 9).bool()
    close(ours(IMAGES)[0], model.backbone.double()(IMAGES, mask))
    state = result.state
    neck = model.neck.state_dict()
    for ours, theirs in (
        ('regressor.1.attn.q.bias', 'regressors.1.cross_attn.q_bias'),
        ('decoder.0.mlp.fc1.weight', 'decoders.0.ffn.layers.0.0.weight'),
    ):
        assert torch.equal(state[f'neck.{ours}'], neck[theirs])
    notes = {rule.foreign: rule.note for rule in result.counts if rule.ours == '(left out)'}
    assert 'convert_dalle' in notes['target_generator.{rest}'] and 'teacher.{rest}' in notes


@pytest.mark.parametrize('alone', [True, False])
@pytest.mark.parametrize('pooled', [True, False])
def test_mmpretrains_beit(tmp_path, pooled, alone):
    import mmpretrain.models  # noqa: F401  registers it

    model = MODELS.build(
        dict(
            type='mmpretrain.BEiTViT',
            arch=dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48),
            img_size=12,
            patch_size=4,
            use_abs_pos_emb=True,
            use_rel_pos_bias=True,
            final_norm=not pooled,
            out_type='avg_featmap' if pooled else 'raw',
        )
    )
    randomize(model).pos_embed.data.copy_(official.positions((3, 3), 24))
    state = model.state_dict()
    if not alone:
        state = {f'backbone.{key}': value for key, value in state.items()}
        state |= {'head.fc.weight': torch.ones(5, 24), 'head.fc.bias': torch.ones(5)}
    result = convert(state, tmp_path)
    assert result.source == 'mmpretrain'
    assert (result.description.pooled_norm, result.description.mlp_ratio) == (pooled, 2.0)
    assert alone or torch.equal(result.state['head.fc.weight'], torch.ones(5, 24))
    ours = load(result, out_type='avg_featmap' if pooled else 'raw')
    close(ours(IMAGES)[0], model.double()(IMAGES)[0], 1e-6)  # their positions are other float32


@pytest.mark.parametrize(
    'options',
    [
        dict(use_rel_pos_bias=True, init_values=0.1, global_pool='avg'),
        dict(use_shared_rel_pos_bias=True, init_values=None, global_pool='token'),
        dict(init_values=0.1, qkv_bias=False, global_pool='token', num_classes=0),
    ],
    ids=['fine-tuned', 'shared', 'plain'],
)
def test_timms_beit(tmp_path, options):
    beit = pytest.importorskip('timm.models.beit')
    options = dict(num_classes=5) | options
    sizes = dict(img_size=12, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    model = beit.Beit(use_abs_pos_emb=True, **sizes, **options)
    randomize(model).pos_embed.data.copy_(official.positions((3, 3), 24))
    result = convert(model.state_dict(), tmp_path, source='timm', num_heads=3)
    pooled = options['global_pool'] == 'avg'
    ours = load(result, out_type='avg_featmap' if pooled else 'raw')
    features = model.double().forward_features(IMAGES)
    close(
        ours(IMAGES)[0], model.forward_head(features, pre_logits=True) if pooled else features, 1e-6
    )
    remark = 'no gamma_1 in the file: 1 in all blocks, which is the same'
    assert (remark in result.remarks) == (not options['init_values'])


def beit_config(**options):
    transformers = pytest.importorskip('transformers')
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    return transformers.BeitConfig(image_size=12, patch_size=4, **sizes, **options)


@pytest.mark.parametrize('shared', [True, False])
def test_hugging_faces_beit(tmp_path, shared):
    transformers = pytest.importorskip('transformers')
    config = beit_config(
        layer_norm_eps=1e-6,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=not shared,
        use_shared_relative_position_bias=shared,
        num_labels=5,
    )
    model = randomize(transformers.BeitForImageClassification(config))
    table = model.beit.embeddings.position_embeddings
    table.data.copy_(official.positions((3, 3), 24))
    model.save_pretrained(tmp_path / 'hf')
    result = convert_checkpoint(tmp_path / 'hf', tmp_path / 'out')
    assert result.source == 'huggingface' and not result.remarks
    ours = load(result, out_type='avg_featmap')
    close(ours(IMAGES)[0], model.double().beit(IMAGES).pooler_output, 1e-6)
    assert torch.equal(result.state['head.fc.weight'], model.classifier.weight.float())


@pytest.mark.parametrize('neck_width', [24, 12])
def test_the_authors_first_code_has_other_names(tmp_path, neck_width):
    state = official.pretraining_state(24, neck_width)
    renames = {
        'regresser.regressor_blocks.': 'pretext_neck.regressor_blocks.',
        'regresser.norm.': 'pretext_neck.norm.',
        'decoder.decoder_blocks.': 'pretext_neck.decoder_blocks.',
        'decoder.norm.': 'pretext_neck.norm2.',
        'decoder.head.': 'pretext_neck.head.',
        'encoder_to_regresser': 'encoder_to_decoder',
    }
    first = {'teacher.norm.weight': torch.zeros(24)}
    for key, tensor in state.items():
        if not key.startswith(('alignment_encoder.', 'rd_pos_embed')):
            old = next(filter(key.startswith, renames), '')
            first[renames.get(old, '') + key.removeprefix(old)] = tensor
    result, expected = convert(first, tmp_path, **HEADS), convert(state, tmp_path, **HEADS)
    assert result.source == 'official' and result.neck == expected.neck
    assert result.state.keys() == expected.state.keys()
    assert all(torch.equal(result.state[key], expected.state[key]) for key in expected.state)
    notes = {rule.foreign: rule.note for rule in result.counts if rule.ours == '(left out)'}
    assert 'a copy of the encoder' in notes['teacher.{rest}']


def passl_state(state):
    """The names of PASSL for official weights."""
    renames = [
        ('regresser.regressor_blocks.', 'regressor_and_decoder.blocks.'),
        ('regresser.norm.', 'regressor_and_decoder.norm.'),
        ('decoder.decoder_blocks.', 'regressor_and_decoder.self_att_blocks.'),
        ('decoder.norm.', 'regressor_and_decoder.norm2.'),
        ('decoder.head.', 'regressor_and_decoder.head.'),
        ('encoder_to_regresser', 'encoder_to_decoder'),
        ('norm1_q.', 'norm1_q_cross.'),
        ('norm1_k.', 'norm1_k_cross.'),
        ('norm1_v.', 'norm1_v_cross.'),
    ]
    result = {}
    for key, value in state.items():
        if key.startswith(('alignment_encoder.', 'rd_pos_embed')):
            continue
        for old, new in renames:
            key = key.replace(old, new) if key.startswith(old) or old.startswith('norm1') else key
        array = value.numpy()
        result[key] = array.T.copy() if key.endswith('weight') and array.ndim == 2 else array
    return result


@pytest.mark.parametrize(('nested', 'protocol'), [(True, 2), *((False, p) for p in range(6))])
def test_passls_pickles_of_transposed_arrays(tmp_path, nested, protocol):
    state = official.pretraining_state(24, 12)
    arrays = passl_state(state)
    if nested:  # as paddle.save writes tensors that are not at the top
        arrays = {'model': {k: (k, v) for k, v in arrays.items()}, 'epoch': 3}
    else:
        arrays['StructuredToParameterName@@'] = {'cls_token': 'param_0'}
    path = tmp_path / 'ep800.pd'
    path.write_bytes(pickle.dumps(arrays, protocol=protocol))
    result = convert_checkpoint(path, tmp_path, **HEADS)
    assert result.source == 'passl'
    expected = convert(state, tmp_path, **HEADS).state
    assert result.state.keys() == expected.keys()
    assert all(torch.equal(result.state[key], expected[key]) for key in expected)


@pytest.mark.parametrize('name', ['a.pth', 'a.pd'])
def test_pickles_that_execute_are_refused(tmp_path, name):
    content = {'model': {'encoder.cls_token': Call(os.mkdir, str(tmp_path / 'executed'))}}
    if name == 'a.pth':
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    message = f'{name} was refused, nothing in it was executed: .*mkdir'
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / name, tmp_path / 'out')
    assert not (tmp_path / 'executed').exists()


def test_what_a_file_without_arrays_says(tmp_path):
    path = tmp_path / 'a.pdparams'
    path.write_bytes(pickle.dumps({'encoder.cls_token': np.array(['text'])}))
    with pytest.raises(ValueError, match='encoder.cls_token is no array of numbers but <U4'):
        convert_checkpoint(path, tmp_path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match='holds no state dict'):
        convert_checkpoint(path, tmp_path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda s: s.update(
                {'encoder.blocks.0.norm1.offset': s.pop('encoder.blocks.0.norm1.bias')}
            ),
            'a.pth cannot be converted: no rule knows encoder.blocks.0.norm1.offset$',
        ),
        (
            lambda s: s.pop('encoder.blocks.1.mlp.fc2.bias'),
            'does not fit CAEViT: 1 keys missing: blocks.1.mlp.fc2.bias '
            r'\(in the file: encoder.blocks.1.mlp.fc2.bias\)',
        ),
        (
            lambda s: s.update({'encoder.norm.weight': torch.ones(23)}),
            r'does not fit CAEViT: 1 keys of another shape: norm.weight is \(23,\) in the file',
        ),
        (
            lambda s: s.update({'decoder.norm.weight': torch.ones(23)}),
            r'does not fit CAENeck: 1 keys of another shape: decoder_norm.weight is \(23,\)',
        ),
        (
            lambda s: s.pop('regresser.norm.bias'),
            'does not fit CAENeck: 1 keys missing: regressor_norm.bias '
            r'\(in the file: regresser.norm.bias\)',
        ),
        (
            lambda s: s['alignment_encoder.norm.bias'].add_(1.0),
            'alignment_encoder.norm.bias must be the same as backbone.norm.bias, but differs by 1',
        ),
        (
            lambda s: s['rd_pos_embed'].add_(1e-3),
            'rd_pos_embed is not the neck_positions that we compute for 3x3 patches',
        ),
        (
            lambda s: s['alignment_encoder.pos_embed'].add_(1e-3),
            'alignment_encoder.pos_embed is not the positions that we compute',
        ),
        (
            lambda s: s['encoder.pos_embed'].normal_(),
            'positions that are not the sin-cos table of CAE .the nearest is off by .*learned',
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if 'encoder.pos' in k],
            'has no absolute positions, as BEiT',
        ),
        (
            lambda s: s.update({'encoder.blocks.0.attn.relative_position_index': torch.ones(10)}),
            'relative_position_index without the relative position tables it belongs to',
        ),
        (lambda s: s.pop('encoder.cls_token'), 'these are no official weights'),
    ],
)
def test_what_does_not_map_is_named(tmp_path, change, message):
    state = official.pretraining_state()
    change(state)
    with pytest.raises(ValueError, match=message):
        convert(state, tmp_path, source='official', **HEADS)
    assert not list(tmp_path.glob('*.safetensors'))


def test_another_order_of_relative_positions_is_named(tmp_path):
    state = official.finetuned_state()
    index = state['blocks.1.attn.relative_position_index']
    index[1:, 1:] = index[1:, 1:].T.clone()
    message = 'blocks.1.attn.relative_position_index is not the relative_position_index that we'
    with pytest.raises(ValueError, match=message):
        convert(state, tmp_path)


def test_two_final_norms_are_refused(tmp_path):
    state = official.finetuned_state()
    state |= {'norm.weight': torch.ones(24), 'norm.bias': torch.zeros(24)}
    with pytest.raises(ValueError, match='would both be backbone.norm.weight: a network with both'):
        convert(state, tmp_path)


def test_incomplete_query_key_value_is_named(tmp_path):
    transformers = pytest.importorskip('transformers')
    state = transformers.BeitModel(beit_config()).state_dict()
    key = 'encoder.layer.0.attention.attention.key.weight'
    del state[key]
    with pytest.raises(ValueError, match=f'{re.escape(key)} is missing'):
        convert(state, tmp_path)


def test_folder_of_another_layer_norm_is_refused(tmp_path):
    transformers = pytest.importorskip('transformers')
    transformers.BeitModel(beit_config()).save_pretrained(tmp_path / 'hf')
    with pytest.raises(ValueError, match="{'layer_norm_eps': 1e-12}, a CAEViT has"):
        convert_checkpoint(tmp_path / 'hf', tmp_path / 'out')


def test_heads_are_read_or_assumed_or_asked_for(tmp_path):
    with pytest.raises(ValueError, match='width 24 is none that was published: give --num-heads'):
        convert(official.pretraining_state(), tmp_path)
    with pytest.raises(ValueError, match='relative position tables of 3 heads, not 4'):
        convert(official.finetuned_state(), tmp_path, num_heads=4)
    state = official.pretraining_state(192, 24, depth=1)
    result = convert(state, tmp_path)
    assert result.description.num_heads == 12  # of the official tiny model
    assert result.neck['num_heads'] == 12
    assert 'published for width 192' in result.remarks[0] and '--num-heads' in result.remarks[0]
    assert '--decoder-heads' in result.remarks[1]
    with pytest.raises(ValueError, match='5 heads do not divide width 24: --decoder-heads'):
        convert(state, tmp_path, decoder_heads=5)
    state = {k.removeprefix('encoder.'): v for k, v in state.items() if k.startswith('encoder.')}
    with pytest.raises(ValueError, match='width 192 is none that was published: give --num-heads'):
        convert(state, tmp_path)  # timm has 3 and the official code 12


def test_sizes_and_part_are_written_beside_the_weights(tmp_path):
    result = convert(official.pretraining_state(24, 12), tmp_path, part='encoder', num_heads=3)
    assert result.path.name == 'out_encoder.safetensors'
    file = read_checkpoint(result.path)
    assert file.metadata.keys() == {'source', 'part', 'encoder'}
    arch = dict(embed_dims=24, depth=2, num_heads=3, layer_scale=0.1)
    expected = CAEViT(arch=arch, img_size=12, patch_size=4).describe()
    assert file.description == result.description == expected
    assert all(key.startswith('backbone.') for key in file.state)
    left = {rule.foreign for rule in result.counts if rule.note == 'part=encoder'}
    assert {'mask_token', 'decoder.head.{p}', 'encoder_to_regresser.{p}'} <= left
    counted = sum(result.counts.values())
    assert counted == len(official.pretraining_state(24, 12))  # each key is in the report


def test_positions_of_a_grid_that_is_not_square_are_found(tmp_path):
    state = official.pretraining_state(24, 24, grid=(2, 4))
    result = convert(state, tmp_path, **HEADS)
    assert result.description.img_size == (8, 16)


@pytest.mark.parametrize(
    ('keys', 'source'),
    [
        (official.pretraining_state(), 'official'),
        (official.finetuned_state(), 'official'),
        (dense_state(), 'official'),
        (passl_state(official.pretraining_state()), 'passl'),
        (['cls_token', 'pos_embed', 'blocks.0.norm1.weight'], 'timm'),
        (['backbone.patch_embed.projection.weight'], 'mmpretrain'),
        (['pos_embed', 'patch_embed.projection.weight'], 'mmpretrain'),
        (['beit.embeddings.cls_token'], 'huggingface'),
        (['backbone.cls_token', 'backbone.blocks.0.norm1.weight', 'neck.mask_token'], None),
        (['cls_token', 'blocks.0.norm1.weight', 'norm.weight'], None),
    ],
)
def test_guesses(keys, source):
    assert guess_source(keys) == source


def test_arguments_that_make_no_sense(tmp_path):
    path = save(official.pretraining_state(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="Unknown part 'decoder': choose one of"):
        convert_checkpoint(path, tmp_path, part='decoder', **HEADS)
    with pytest.raises(ValueError, match="Unknown source 'jax': choose one of"):
        convert_checkpoint(path, tmp_path, source='jax', **HEADS)
    with pytest.raises(ValueError, match='weights are written as .safetensors'):
        convert_checkpoint(path, tmp_path / 'b.pth', **HEADS)
    message = 'these are no huggingface weights.*they look like official ones'
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, tmp_path, source='huggingface', **HEADS)
    with pytest.raises(FileNotFoundError, match='give a file, or a folder with config.json'):
        convert_checkpoint(tmp_path / 'none', tmp_path)
    torch.save({'backbone.cls_token': torch.zeros(1, 1, 4)}, path)
    with pytest.raises(ValueError, match='no known source .* this project need no conversion'):
        convert_checkpoint(path, tmp_path)
    path = save(official.finetuned_state() | {'head.weight': torch.ones(7, 9)}, path)
    with pytest.raises(ValueError, match=r'does not fit Linear: .* weight is \(7, 9\)'):
        convert_checkpoint(path, tmp_path)
