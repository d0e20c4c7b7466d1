"""The encoder: what it sees, what it returns, how it starts and what it refuses to load."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import equal, randomize
from mmengine.model import Sequential
from safetensors.torch import save_file
from torch import nn

from cae_mm.models import CAEViT
from cae_mm.models.archs import ARCHS
from cae_mm.models.positions import sincos_positions
from cae_mm.patches import gather_tokens, split_mask

TOY = dict(embed_dims=16, depth=3, num_heads=2, layer_scale=0.1)
DEVICES = [
    'cpu',
    pytest.param(
        'cuda',
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
        ],
    ),
]


def build(**options):
    """A toy encoder for 32 x 48 pixels, 4 x 6 patches, that is in no special state."""
    return randomize(CAEViT(**(dict(arch=TOY, img_size=(32, 48), patch_size=8) | options)))


def images_of(height=32, width=48, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator)


# what it sees


def test_masked_pixels_are_not_looked_at():
    vit = build()
    images = images_of()
    mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(2)).argsort(1) < 12
    visible, _ = split_mask(mask)
    hidden = mask.view(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(hidden, torch.full_like(images, 1e6), images)
    latents = vit.forward_features(images, visible)
    assert latents.shape == (2, 13, 16)
    equal(vit.forward_features(changed, visible), latents)

    shown = torch.where(hidden, images, images + 0.1)
    assert (vit.forward_features(shown, visible) != latents).any(-1).all()


def test_encode_of_all_patches_is_forward():
    vit = build(out_type='raw')
    images = images_of()
    [raw] = vit(images)
    equal(vit.forward_features(images), raw)
    torch.testing.assert_close(vit.forward_features(images, torch.arange(24).expand(2, -1)), raw)


def test_order_of_patches_does_not_matter():
    """Positions go with the ids: permuted patches give permuted latents."""
    vit = build().double()
    images = images_of().double()
    ids = torch.stack([torch.randperm(24), torch.randperm(24)])
    all_latents = vit.forward_features(images)
    latents = vit.forward_features(images, ids)
    torch.testing.assert_close(latents[:, 0], all_latents[:, 0])
    torch.testing.assert_close(latents[:, 1:], gather_tokens(all_latents[:, 1:], ids))
    assert (all_latents[:, 1:] - latents[:, 1:]).abs().max() > 0.1


def by_hand(vit, images, positions):
    """The forward pass with torch's convolution and given positions, up to the final norm."""
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + positions
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('height', 'width'), [(32, 48), (64, 64), (16, 80)])
def test_forward_at_any_size(device, height, width):
    """Positions are resized from those of ``img_size``; the class token has none."""
    vit = build(out_type='raw').to(device).double()
    images = images_of(height, width).to(device).double()
    grid = (height // 8, width // 8)
    base = vit.positions((4, 6), torch.device('cpu')).reshape(1, 4, 6, 16).permute(0, 3, 1, 2)
    positions = base
    if grid != (4, 6):
        positions = F.interpolate(base, size=grid, mode='bicubic', align_corners=False)
    positions = positions.flatten(2).transpose(1, 2).to(device)
    [raw] = vit(images)
    assert raw.device.type == device
    torch.testing.assert_close(raw, by_hand(vit, images, positions))
    torch.testing.assert_close(vit.forward_features(images), raw)


def test_positions_cached_without_autograd_serve_training():
    """A first call in inference mode must not spoil later backward passes."""
    vit = build()
    with torch.inference_mode():
        vit(images_of(48, 48))
    vit(images_of(48, 48))[0].sum().backward()
    assert all(param.grad is not None for param in vit.parameters())


def test_encode_needs_whole_patches():
    message = '30x48 pixels cannot be cut into patches of 8x8: .* to 32x48'
    with pytest.raises(ValueError, match=message):
        build().forward_features(images_of(30, 48))


def test_forward_pads_to_whole_patches_at_the_right_and_the_bottom():
    vit = build(out_type='featmap')
    images = images_of(30, 43)
    [padded] = vit(torch.nn.functional.pad(images, (0, 5, 0, 2)))
    [out] = vit(images)
    assert out.shape == (2, 16, 4, 6)
    equal(out, padded)


# what it returns


def test_out_types_are_views_of_the_same_tokens():
    images = images_of()
    outs = {}
    for out_type in ('raw', 'cls_token', 'featmap', 'avg_featmap'):
        [outs[out_type]] = build(out_type=out_type)(images)
    raw = outs['raw']
    assert raw.shape == (2, 1 + 24, 16)
    torch.testing.assert_close(outs['cls_token'], raw[:, 0])
    vit = build(out_type='raw', final_norm=False)
    with pytest.raises(ValueError, match="Unknown out_type 'tokens'"):
        vit(images, 'tokens')
    [tokens] = vit(images)  # before the final norm
    equal(outs['avg_featmap'], build().norm(tokens[:, 1:].mean(1)))
    assert outs['featmap'].shape == (2, 16, 4, 6)
    for row in range(4):
        for column in range(6):
            equal(outs['featmap'][:, :, row, column], raw[:, 1 + 6 * row + column])


def test_out_indices_select_blocks_and_only_the_last_is_normalised():
    images = images_of()
    vit = build(out_indices=(0, 1, 2))
    seen = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    outs = vit(images)
    assert len(outs) == 3
    equal(outs[0], seen[0])
    equal(outs[1], seen[1])
    equal(outs[2], vit.norm(seen[2]))
    for indices, chosen in {(-1,): [2], (-3, -1): [0, 2], 1: [1], (0, -2): [0, 1]}.items():
        got = build(out_indices=indices)(images)
        assert len(got) == len(chosen)
        for out, i in zip(got, chosen, strict=True):
            equal(out, outs[i])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(out_indices=3), 'out_indices has 3, but there are 3 blocks'),
        (dict(out_indices=(0, -4)), 'out_indices has -4, but there are 3 blocks'),
        (dict(out_indices=(2, 0)), r'out_indices must ascend, as blocks do: not \(2, 0\)'),
        (dict(out_indices=(1, -2)), r'out_indices must ascend, as blocks do: not \(1, 1\)'),
        (dict(out_type='tokens'), "Unknown out_type 'tokens': choose one of .*'avg_featmap'"),
        (dict(frozen_stages=4), r'frozen_stages must be in \[-1, 3\], not 4'),
        (dict(frozen_stages=-2), r'frozen_stages must be in \[-1, 3\], not -2'),
        (dict(arch='giant'), "Unknown arch 'giant': choose one of .*'huge'.* or give a dict"),
        (dict(arch=dict(embed_dims=8, depth=1)), 'arch needs exactly the keys .*layer_scale'),
        (dict(arch=TOY | dict(heads=2)), r"arch needs exactly the keys \['depth'.*'heads'"),
        (dict(img_size=100), '100x100 pixels cannot be cut into patches of 8x8'),
        (dict(pretrain_img_size=30), '30x30 pixels cannot be cut into patches of 8x8'),
        (
            dict(use_rel_pos_bias=True, window_size=2),
            'windows have no relative position bias: choose one of the two',
        ),
        (
            dict(use_rel_pos_bias=True, unpadded_positions=True),
            'use_rel_pos_bias resizes its tables to the padded batch: leave out unpadded_positions',
        ),
        (dict(window_size=2, global_blocks=(3,)), 'global_blocks has 3, but there are 3 blocks'),
        (dict(global_blocks=(1,)), 'global_blocks needs a window_size'),
        (dict(window_size=0), 'window_size must be at least 1, not 0'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# sizes


def parameters_by_formula(D, depth, p=16):
    block = 12 * D * D + 14 * D  # attention 4 D^2 + 3 D, MLP 8 D^2 + 5 D, norms 4 D, scales 2 D
    return (3 * p * p + 1) * D + D + depth * block + 2 * D


def count(module):
    return sum(param.numel() for param in module.parameters())


@pytest.mark.parametrize(
    ('options', 'limit'),
    [({}, 0.02), (dict(xavier_patch_embed=True), math.sqrt(6 / (3 * 8 * 8 + 16)))],
)
def test_start_of_the_patch_embedding(options, limit):
    """Official: normal, cut at one deviation, 0.02; MAE's: uniform, of flat patches."""
    torch.manual_seed(0)
    vit = CAEViT(arch=TOY, img_size=16, patch_size=8, **options)
    vit.init_weights()
    weight = vit.patch_embed.proj.weight.detach()
    assert 0.98 * limit < weight.abs().max() <= limit
    deviation = 1 / math.sqrt(3) if options else 0.54  # of the limit
    assert weight.std() == pytest.approx(deviation * limit, rel=0.02)
    assert not vit.patch_embed.proj.bias.any()


def test_base_has_the_parameters_of_vit_b():
    """Its counterpart vit_base_patch16_224 of timm has 85,798,656 without head.

    Ours has no learned positions (197 * 768), no key biases (12 * 768), but layer scales.
    """
    expected = 85_798_656 - 197 * 768 - 12 * 768 + 12 * 2 * 768
    assert parameters_by_formula(768, 12) == expected
    assert count(CAEViT()) == expected


@pytest.mark.parametrize(
    ('arch', 'D', 'depth', 'heads', 'millions'),
    [
        ('tiny', 192, 12, 3, 5.5),
        ('small', 384, 12, 6, 21.6),
        ('base', 768, 12, 12, 85.7),
        ('large', 1024, 24, 16, 303.1),
        ('huge', 1280, 32, 16, 630.7),
    ],
)
def test_sizes_of_the_standard_archs(arch, D, depth, heads, millions):
    """One block of each is built, the others are alike."""
    vit = CAEViT(arch=ARCHS[arch] | dict(depth=1))
    assert vit.blocks[0].attn.num_heads == heads
    assert vit.embed_dims == D
    assert count(vit) == parameters_by_formula(D, 1)
    assert ARCHS[arch]['depth'] == depth
    assert parameters_by_formula(D, depth) / 1e6 == pytest.approx(millions, abs=0.1)
    assert vit.blocks[0].gamma_1.unique().tolist() == pytest.approx(
        [1e-5 if arch in ('large', 'huge') else 0.1]
    )


# training


@pytest.mark.parametrize(
    ('frozen', 'prefixes'),
    [
        (-1, ()),
        (0, ('cls_token', 'patch_embed.')),
        (1, ('cls_token', 'patch_embed.', 'blocks.0.')),
        (3, ('cls_token', 'patch_embed.', 'blocks.', 'norm.')),
    ],
)
def test_frozen_stages(frozen, prefixes):
    vit = build(frozen_stages=frozen, drop_path_rate=0.5).eval().train()
    assert [block.training for block in vit.blocks] == [i >= frozen for i in range(3)]
    assert vit.patch_embed.training == (frozen < 0)
    assert vit.norm.training == (frozen < 3)
    out = vit.forward_features(images_of(batch=16)).sum()
    assert out.requires_grad == (frozen < 3)
    if frozen < 3:
        out.backward()
    for name, param in vit.named_parameters():
        assert param.requires_grad != name.startswith(prefixes), name
        assert (param.grad is None) == name.startswith(prefixes), name
    assert not any(module.training for module in vit.eval().modules())


def test_frozen_blocks_drop_nothing():
    images = images_of(batch=16)
    for frozen_stages in (3, 2):
        vit = build(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
        assert torch.equal(vit(images)[0], vit(images)[0]) == (frozen_stages == 3)


# torch 2.4's own checkpoint function
@pytest.mark.filterwarnings('ignore:.torch.cpu.amp.autocast:FutureWarning')
@pytest.mark.parametrize(
    'options', [{}, dict(use_rel_pos_bias=True), dict(window_size=4, global_blocks=(2,))]
)
def test_recomputing_gives_the_same_outputs_and_gradients(options):
    results = []
    for with_cp in (False, True):
        vit = build(with_cp=with_cp, drop_path_rate=0.5, out_indices=(0, 2), **options).train()
        calls = []
        vit.blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        outs = vit(images_of(40, 56, batch=8))
        sum(out.square().sum() for out in outs).backward()
        results.append((outs, [param.grad for param in vit.parameters()]))
        assert len(calls) == 1 + with_cp
    for plain, checkpointed in zip(*results, strict=True):
        for a, b in zip(plain, checkpointed, strict=True):
            equal(a, b)


def test_every_parameter_gets_a_gradient():
    vit = build()
    vit.forward_features(images_of(), torch.arange(12).expand(2, -1)).square().sum().backward()
    assert all(param.grad.abs().sum() > 0 for param in vit.parameters())


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_layer_depth(prefix):
    vit = build()
    depths = {
        'cls_token': 0,
        'patch_embed.proj.weight': 0,
        'blocks.0.attn.q_bias': 1,
        'blocks.2.gamma_1': 3,
        'norm.bias': 4,
    }
    for name, depth in depths.items():
        assert vit.get_layer_depth(prefix + name, prefix) == (depth, 5)
    assert vit.get_layer_depth('head.fc.weight', 'backbone.') == (4, 5)
    assert vit.get_layer_depth('neck.blocks.0.weight', 'backbone.') == (4, 5)
    assert vit.get_layer_depth('blocks.0.weight', 'backbone.') == (4, 5)  # not the backbone's
    known = {vit.get_layer_depth(name)[0] for name, _ in vit.named_parameters()}
    assert known == {0, 1, 2, 3, 4}


def test_drop_path_grows_linearly():
    vit = CAEViT(arch=TOY | dict(depth=5), img_size=32, drop_path_rate=0.2)
    rates = [block.drop_path.drop_prob for block in vit.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_bf16_autocast_keeps_the_residual_stream_in_float32():
    vit = build(out_type='raw')
    dtypes = []
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    products = []
    vit.blocks[0].mlp.fc1.register_forward_hook(lambda m, a, out: products.append(out.dtype))
    images = 100 * images_of()
    with torch.autocast('cpu', torch.bfloat16):
        [low] = vit(images)
        ids = torch.arange(12).expand(2, -1)
        assert vit.forward_features(images, ids).dtype == torch.float32
    assert dtypes == [torch.float32] * 14
    assert products == [torch.bfloat16] * 2
    assert low.dtype == torch.float32
    assert low.isfinite().all()
    [full] = vit(images)
    assert 0 < (low - full).abs().max() < 0.1 * full.abs().max()


# how it starts


def test_initialisation_is_the_official_one():
    vit = build(arch=TOY | dict(embed_dims=64))
    gamma = vit.blocks[0].gamma_1.clone()
    vit.init_weights()
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    for tensor in (vit.patch_embed.proj.weight, vit.cls_token):
        assert 0.015 < tensor.abs().max() <= 0.02
        assert tensor.std().item() == pytest.approx(0.0108, rel=0.2)
    assert not vit.patch_embed.proj.bias.any()
    equal(vit.blocks[0].gamma_1, gamma)  # the constructor's


def test_constructor_sets_biases_and_layer_scale():
    vit = CAEViT(arch=TOY | dict(layer_scale=1e-5), img_size=32)
    for block in vit.blocks:
        assert not block.attn.q_bias.any()
        assert not block.attn.v_bias.any()
        for gamma in (block.gamma_1, block.gamma_2):
            assert gamma.tolist() == pytest.approx([1e-5] * 16)


def test_state_dict_holds_parameters_only():
    vit = build()
    vit(images_of())
    assert vit.state_dict().keys() == dict(vit.named_parameters()).keys()


# loading


def save(state, path):
    """Write a checkpoint as mmengine's Runner does, or safetensors."""
    if path.suffix == '.safetensors':
        save_file(state, path)
    else:
        torch.save(dict(meta=dict(epoch=3), state_dict=state, message_hub={}), path)
    return path


def pretraining_state(vit=None):
    vit = vit or build()
    state = {f'backbone.{key}': value.clone() for key, value in vit.state_dict().items()}
    return state | {'neck.mask_token': torch.zeros(1, 1, 16)}


def build_for(path, prefix='backbone.', **options):
    """An encoder with other weights than ``build`` makes."""
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix=prefix)
    return randomize(build(**options, init_cfg=init_cfg), std=0.1)


def load_from(path, *args, **options):
    vit = build_for(path, *args, **options)
    vit.init_weights()
    return vit


def assert_same_weights(vit, state):
    for key, value in vit.state_dict().items():
        equal(value, state[key])


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_pretrained_weights_load_exactly(tmp_path, name):
    vit = build()
    loaded = load_from(save(pretraining_state(vit), tmp_path / name))
    assert_same_weights(loaded, vit.state_dict())
    equal(loaded(images_of())[0], vit(images_of())[0])


def test_encoder_alone_needs_no_prefix(tmp_path):
    state = build().state_dict()
    torch.save(state, tmp_path / 'encoder.pth')
    assert_same_weights(load_from(tmp_path / 'encoder.pth', '', img_size=64), state)


def test_a_parents_initialisation_does_not_overwrite(tmp_path):
    vit = build()
    child = build_for(save(pretraining_state(vit), tmp_path / 'a.pth'))
    parent = Sequential(child, init_cfg=dict(type='Constant', layer='Linear', val=9.0))
    parent.init_weights()
    assert_same_weights(child, vit.state_dict())


def test_frozen_stages_stay_frozen_after_loading(tmp_path):
    loaded = load_from(save(pretraining_state(), tmp_path / 'a.pth'), frozen_stages=3)
    assert not any(param.requires_grad for param in loaded.parameters())


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_missing_and_renamed_keys_are_named(tmp_path, name):
    state = pretraining_state()
    del state['backbone.norm.bias']
    with pytest.raises(ValueError, match='does not fit CAEViT: 1 keys missing: norm.bias$'):
        load_from(save(state, tmp_path / name))
    state['backbone.fc_norm.bias'] = torch.zeros(16)
    message = f'{name} does not fit .* 1 keys missing: norm.bias; 1 keys unexpected: fc_norm.bias$'
    with pytest.raises(ValueError, match=message):
        load_from(save(state, tmp_path / name))


def test_reshaped_keys_are_named(tmp_path):
    path = save(pretraining_state(), tmp_path / 'a.pth')
    message = (
        r'1 keys of another shape: patch_embed.proj.weight is \(16, 3, 8, 8\) in the file and '
        r'\(16, 3, 16, 16\) in the model'
    )
    with pytest.raises(ValueError, match=message):
        load_from(path, patch_size=16)
    with pytest.raises(ValueError, match=r'15 keys missing: blocks\.3\..*, \.\.\. \(10 more\)$'):
        load_from(path, arch=TOY | dict(depth=4))


@pytest.mark.parametrize(
    ('given', 'right'), [('', 'backbone.'), ('encoder.', 'backbone.'), ('backbone.', '')]
)
def test_wrong_prefix_is_hinted_at(tmp_path, given, right):
    state = build().state_dict() if right == '' else pretraining_state()
    path = save(state, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=f"The file has these keys under prefix='{right}'$"):
        load_from(path, prefix=given)


def test_nothing_is_loaded_when_something_does_not_fit(tmp_path):
    state = pretraining_state()
    del state['backbone.norm.bias']
    vit = build_for(save(state, tmp_path / 'a.pth'))
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(ValueError, match='1 keys missing'):
        vit.init_weights()
    assert_same_weights(vit, before)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match='no weights for CAEViT at /nowhere/a.pth. Give'):
        load_from('/nowhere/a.pth')


@pytest.mark.parametrize('content', [b'', b'<html>404 Not Found</html>'])
@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_broken_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        load_from(path)


class Touch:
    """Unpickled by Python, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path):
    marker = tmp_path / 'marker'
    torch.save(dict(state_dict=pretraining_state(), hook=Touch(marker)), tmp_path / 'evil.pth')
    message = (
        'evil.pth was refused, nothing in it was executed: it refers to .*pathlib.* not allowed'
    )
    with pytest.raises(ValueError, match=message):
        load_from(tmp_path / 'evil.pth')
    assert not marker.exists()
    torch.load(tmp_path / 'evil.pth', weights_only=False)
    assert marker.exists()  # so it was armed


def test_file_without_state_dict(tmp_path):
    torch.save(dict(epoch=3), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'a\.pth holds no state dict \(a dict of tensors\)'):
        load_from(tmp_path / 'a.pth')


@pytest.mark.parametrize(
    'init_cfg',
    [
        dict(type='Xavier', layer='Linear'),
        dict(checkpoint='a.pth'),
        dict(type='Pretrained', checkpoint='a.pth', map_location='cpu'),
    ],
)
def test_other_init_cfg_is_refused(init_cfg):
    vit = build(init_cfg=init_cfg)
    with pytest.raises(ValueError, match=r'CAEViT takes init_cfg=dict\(type="Pretrained"'):
        vit.init_weights()


# weights of another encoder


def test_adapted_weights_of_pretraining():
    """Relative position tables start from zero, all else is taken over, the input left alone."""
    pretrained = build().state_dict()
    vit = build(use_rel_pos_bias=True)
    state, remarks = vit.adapt_state_dict(pretrained)
    assert remarks == ['3 relative position tables start from zero']
    assert len(pretrained) == len(build().state_dict())
    vit.load_state_dict(state)
    images = images_of()
    torch.testing.assert_close(vit(images)[0], build()(images)[0])


def test_adapted_weights_without_final_norm():
    vit = build(final_norm=False)
    state, remarks = vit.adapt_state_dict(build().state_dict())
    assert remarks == ['the final norm is left out: final_norm=False']
    vit.load_state_dict(state)
    again, remarks = vit.adapt_state_dict(state)
    assert again.keys() == state.keys() and remarks == []


def test_adapted_tables_are_resized_bicubically():
    small, large = (build(img_size=size, use_rel_pos_bias=True) for size in (32, 48))
    state, remarks = large.adapt_state_dict(small.state_dict())
    assert remarks == ['3 relative position tables are resized bicubically']
    large.load_state_dict(state)
    for old, new in zip(small.blocks, large.blocks, strict=True):
        old, new = (b.attn.relative_position_bias_table.detach() for b in (old, new))
        equal(new[-3:], old[-3:])  # of the class token
        offsets = old[:-3].T.view(1, 2, 7, 7)
        offsets = F.interpolate(offsets, (11, 11), mode='bicubic', align_corners=False)
        equal(new[:-3], offsets.view(2, -1).T)


def test_tables_of_other_grids_cannot_be_guessed():
    wide = build(img_size=(32, 48), use_rel_pos_bias=True).state_dict()
    message = (
        r'blocks.0.attn.relative_position_bias_table has 80 entries, which is no relative '
        'position table of a square grid: set img_size'
    )
    with pytest.raises(ValueError, match=message):
        build(img_size=48, use_rel_pos_bias=True).adapt_state_dict(wide)


def test_positions_are_exact_for_the_size_of_pretraining_only():
    vit = build(img_size=(64, 64), pretrain_img_size=(32, 48))
    equal(vit.positions((4, 6), torch.device('cpu')), sincos_positions((4, 6), 16))
    table = sincos_positions((4, 6), 16).T.view(1, 16, 4, 6)
    resized = F.interpolate(table, (8, 8), mode='bicubic', align_corners=False)
    equal(vit.positions((8, 8), torch.device('cpu')), resized.view(16, -1).T)


@pytest.mark.parametrize('options', [dict(use_rel_pos_bias=True), dict(window_size=2)])
def test_pretraining_has_no_relative_positions_and_no_windows(options):
    with pytest.raises(ValueError, match='leave out use_rel_pos_bias and window_size'):
        build(**options).forward_features(images_of(), torch.zeros(2, 3, dtype=torch.long))
