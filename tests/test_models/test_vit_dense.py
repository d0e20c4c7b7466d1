"""The encoder as a backbone of dense prediction: any size, relative positions, windows.

The reference for the maps is the official downstream backbone:
https://github.com/Atten4Vis/CAE/blob/master/downstream_tasks/semantic_segmentation/backbone/cae.py
"""

import math

import official_reference as official
import pytest
import torch
import torch.nn.functional as F
from builders import equal, randomize
from torch import nn

from cae_mm.models import CAEViT, ViTFeaturePyramid
from cae_mm.models.blocks import Attention, WindowAttention
from cae_mm.models.positions import (
    MAX_CACHED_GRIDS,
    SinCosPositions,
    num_relative_positions,
    relative_position_index,
    resize_bias_table,
)

TOY = dict(embed_dims=16, depth=3, num_heads=2, layer_scale=0.1)


def build(**options):
    """A toy backbone with maps of all blocks, 4 x 4 patches in pretraining, in no special state."""
    sizes = dict(arch=TOY, img_size=48, pretrain_img_size=32, patch_size=8)
    maps = dict(out_indices=(0, 1, 2), out_type='featmap', final_norm=False)
    return randomize(CAEViT(**(sizes | maps | options)).double())


def images_of(height=48, width=48, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def gradients(vit, images):
    vit.zero_grad()
    sum(out.square().sum() for out in vit(images)).backward()
    return {name: param.grad.clone() for name, param in vit.named_parameters()}


# what pretraining sees


def test_maps_are_those_of_pretraining_at_its_size():
    """A 224 px image through a backbone for 512 px, and through the encoder without a mask."""
    encoder = randomize(CAEViT(arch=TOY, img_size=224).double())
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    images = images_of(224, 224, batch=1)
    latents = encoder.forward_features(images)

    vit = build(img_size=512, pretrain_img_size=224, patch_size=16, use_rel_pos_bias=True)
    state, remarks = vit.adapt_state_dict(encoder.state_dict())
    vit.load_state_dict(state)
    assert remarks == [
        'the final norm is left out: final_norm=False',
        '3 relative position tables start from zero',
    ]
    maps = vit(images)
    for out, tokens in zip(maps, seen, strict=True):
        torch.testing.assert_close(out, tokens[:, 1:].mT.unflatten(-1, (14, 14)))
    normalised = encoder.norm(maps[-1].flatten(2).mT)
    torch.testing.assert_close(normalised, latents[:, 1:])


# the official backbone


def official_maps(vit, images, pretrain_grid):
    """Maps of all blocks; positions are resized as the loader of checkpoints does."""
    D, grid = vit.embed_dims, tuple(side // vit.patch_size for side in images.shape[-2:])
    table = official.positions(pretrain_grid, D)[:, 1:].mT.unflatten(-1, pretrain_grid)
    if grid != pretrain_grid:
        table = F.interpolate(table, size=grid, mode='bicubic', align_corners=False)
    state = vit.state_dict() | {'pos_embed': F.pad(table.flatten(2).mT, (0, 0, 1, 0))}
    maps = []
    for i in reversed(range(vit.depth)):
        index = official.relative_index(grid)
        state |= {f'blocks.{k}.attn.relative_position_index': index for k in range(i + 1)}
        maps.insert(0, official.tokens(images, state, heads=2)[:, 1:].mT.unflatten(-1, grid))
        state = {key: value for key, value in state.items() if not key.startswith(f'blocks.{i}.')}
    return maps


@pytest.mark.parametrize('rel_pos_bias', [True, False])
@pytest.mark.parametrize(
    'size', [(48, 48), (32, 32), (24, 56), (8, 48), (40, 8), (8, 8)], ids=lambda size: f'{size}'
)
def test_maps_are_those_of_the_official_backbone(size, rel_pos_bias):
    """In float64 but for the table of positions, which is float32; also one patch narrow."""
    vit = build(img_size=size, use_rel_pos_bias=rel_pos_bias)
    images = images_of(*size)
    for out, reference in zip(vit(images), official_maps(vit, images, (4, 4)), strict=True):
        assert out.shape == (2, 16, size[0] // 8, size[1] // 8)
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-6)


def test_final_norm_changes_the_last_map_only():
    images = images_of()
    vit, normalised = build(), build(final_norm=True)
    maps = vit(images)
    normalised.load_state_dict(vit.state_dict(), strict=False)
    outs = normalised(images)
    equal(outs[0], maps[0])
    equal(outs[1], maps[1])
    reference = official.layer_norm(maps[2].movedim(1, -1), normalised.state_dict(), 'norm')
    torch.testing.assert_close(outs[2], reference.movedim(-1, 1))


# any size


@pytest.mark.parametrize('size', [(50, 37), (3, 41), (48, 49), (7, 5), (1, 1)])
@pytest.mark.parametrize('options', [dict(use_rel_pos_bias=True), dict(window_size=2), {}])
def test_odd_sizes_are_filled_up_at_right_and_bottom(size, options):
    vit = build(**options)
    images = images_of(*size)
    h, w = (math.ceil(side / 8) for side in size)
    whole = images.new_zeros(2, 3, 8 * h, 8 * w)
    whole[:, :, : size[0], : size[1]] = images
    neck = ViTFeaturePyramid(in_channels=16, patch_size=8, strides=(2, 8, 16)).double().eval()
    for out, padded in zip(vit(images), vit(whole), strict=True):
        assert out.shape == (2, 16, h, w)
        equal(out, padded)
    shapes = [tuple(out.shape[-2:]) for out in neck(vit(images))]
    assert shapes == [(4 * h, 4 * w), (h, w), (math.ceil(h / 2), math.ceil(w / 2))]


@pytest.mark.parametrize(
    'options', [dict(use_rel_pos_bias=True), dict(window_size=4, global_blocks=(1,))]
)
def test_an_image_does_not_depend_on_the_others_of_its_batch(options):
    vit = build(**options)
    images = images_of(48, 40, batch=3)
    outs = vit(images)
    changed = vit(torch.cat([images[:1] + 5, images[1:2], -images[2:]]))
    for out, other in zip(outs, changed, strict=True):
        torch.testing.assert_close(other[1], out[1])
        assert (other[0] - out[0]).abs().max() > 0.1
    for i in range(3):
        for out, alone in zip(outs, vit(images[i : i + 1]), strict=True):
            torch.testing.assert_close(alone[0], out[i])


def test_maps_are_contiguous():
    """As mmcv's RoIAlign takes them; with one image alone any order of memory counts as that."""
    neck = ViTFeaturePyramid(in_channels=16, patch_size=8, strides=(2, 4, 16)).double().eval()
    maps = build(final_norm=True)(images_of())
    assert all(out.is_contiguous() for out in (*maps, *neck(maps)))


def test_few_tables_of_positions_are_kept():
    """Detection sees hundreds of sizes, whose tables would fill a GPU."""
    positions = SinCosPositions(8, base_grid=(2, 2))
    first = positions((1, 1), torch.device('cpu'))
    for side in range(2, 3 * MAX_CACHED_GRIDS):
        positions((side, 1), torch.device('cpu'))
    assert len(positions._tables) == MAX_CACHED_GRIDS
    equal(positions((1, 1), torch.device('cpu')), first)


# positions that do not depend on padding


@pytest.mark.parametrize('options', [{}, dict(window_size=4, global_blocks=(1,))])
@pytest.mark.parametrize('size', [(48, 40), (32, 32), (43, 21), (8, 64)])
def test_without_padding_positions_are_the_same(size, options):
    images = images_of(*size)
    vits = [build(unpadded_positions=on, **options) for on in (False, True)]
    for out, other in zip(vits[0](images), vits[1](images), strict=True):
        torch.testing.assert_close(other, out, rtol=0, atol=1e-4)
    grads = [gradients(vit, images) for vit in vits]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('options', [{}, dict(window_size=4, global_blocks=(1,))])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_positions_do_not_depend_on_padding(options, dtype):
    """Seen in tokens that do not attend to others: images alone, and padded to a batch's size."""
    sizes = [(48, 40), (24, 56), (11, 64)]
    images = [images_of(*size, batch=1).to(dtype) for size in sizes]
    batch = torch.cat([F.pad(x, (0, 72 - x.shape[3], 0, 64 - x.shape[2])) for x in images])
    for on in (True, False):
        vit = build(unpadded_positions=on, **options).to(dtype)
        for block in vit.blocks:
            nn.init.zeros_(block.gamma_1)
        differences = []
        for i, image in enumerate(images):
            [_, _, alone], [_, _, padded] = vit(image), vit(batch)
            h, w = alone.shape[-2:]
            differences.append((padded[i, :, :h, :w] - alone[0]).abs().max() / alone.abs().max())
        assert all((d < (1e-5 if dtype == torch.float64 else 0.03)) == on for d in differences)


# relative positions


@pytest.mark.parametrize('grid', [(1, 4), (3, 2), (4, 4)])
def test_relative_position_index_is_the_official_one(grid):
    equal(relative_position_index(grid, torch.device('cpu')), official.relative_index(grid))


def test_tables_are_resized_to_the_image():
    """At another size than ``img_size``: as a model that was made for it, from resized tables."""
    vit = build(use_rel_pos_bias=True)
    images = images_of(24, 56)
    other = build(img_size=(24, 56), use_rel_pos_bias=True)
    state, remarks = other.adapt_state_dict(vit.state_dict())
    assert remarks == ['3 relative position tables are resized bicubically']
    other.load_state_dict(state)
    for out, expected in zip(vit(images), other(images), strict=True):
        torch.testing.assert_close(out, expected)


def test_offset_0_stays_in_the_middle_of_a_resized_table():
    table = torch.zeros(num_relative_positions((3, 3)), 2)
    table[5 * 5 // 2] = 1  # of a patch to itself
    resized = resize_bias_table(table, (3, 3), (4, 6))[:-3, 0].reshape(7, 11)
    assert resized.argmax() == 3 * 11 + 5


@pytest.mark.parametrize('size', [(48, 48), (24, 56)])
def test_relative_positions_are_trained(size):
    grads = gradients(build(use_rel_pos_bias=True), images_of(*size))
    assert len([name for name in grads if name.endswith('bias_table')]) == 3
    assert all(grad.abs().sum() > 0 for grad in grads.values())


def test_an_index_made_in_inference_mode_serves_training():
    relative_position_index.cache_clear()
    vit = build(use_rel_pos_bias=True)
    with torch.inference_mode():
        vit(images_of())
    assert all(grad.isfinite().all() for grad in gradients(vit, images_of()).values())


# windows


def window_by_loops(attention, tokens, grid, size):
    """Each window attends by itself, with a copy of the class token; copies are averaged."""
    cls_token, patches = tokens[:, :1], tokens[:, 1:].unflatten(1, grid)
    out, copies = torch.zeros_like(patches), []
    for top in range(0, grid[0], size):
        for left in range(0, grid[1], size):
            window = patches[:, top : top + size, left : left + size]
            y = attention.attend(torch.cat([cls_token, window.flatten(1, 2)], dim=1))
            out[:, top : top + size, left : left + size] = y[:, 1:].reshape(window.shape)
            copies.append(y[:, :1])
    mean = torch.stack(copies).mean(0)
    return torch.cat([mean, out.flatten(1, 2)], dim=1)


@pytest.mark.parametrize(
    ('grid', 'size'), [((4, 6), 2), ((5, 7), 3), ((1, 5), 2), ((5, 1), 4), ((3, 3), 7), ((1, 1), 2)]
)
def test_windows_against_loops(grid, size):
    """What fills up the windows at the border is not attended to."""
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, size).double()
    tokens = torch.randn(2, 1 + grid[0] * grid[1], 8, dtype=torch.float64)
    expected = window_by_loops(attention, tokens, grid, size)
    torch.testing.assert_close(attention(tokens, grid), expected)


@pytest.mark.parametrize('size', [6, 9])
def test_one_window_over_all_is_global_attention(size):
    torch.manual_seed(0)
    windows, attention = WindowAttention(8, 2, size).double(), Attention(8, 2).double()
    attention.load_state_dict(windows.state_dict())
    tokens = torch.randn(2, 1 + 6 * 5, 8, dtype=torch.float64)
    torch.testing.assert_close(windows(tokens, (6, 5)), attention(tokens))


def test_global_blocks_look_beyond_their_window():
    """A patch changes the maps of its own window until a global block has run."""
    options = dict(img_size=64, window_size=4, global_blocks=(-2,))
    vit = build(**options)
    kinds = [type(block.attn) for block in vit.blocks]
    assert kinds == [WindowAttention, Attention, WindowAttention]
    images = images_of(64, 64)
    changed = images.clone()
    changed[:, :, :8, :8] += 1
    moved = [(a - b).abs().amax((0, 1)) > 1e-9 for a, b in zip(vit(images), vit(changed))]
    first = torch.zeros(8, 8, dtype=torch.bool)
    first[:4, :4] = True
    equal(moved[0], first)
    assert moved[1].all()


@pytest.mark.parametrize('window', [1, 4])
def test_windows_without_global_blocks_meet_in_the_class_token(window):
    vit = build(img_size=64, window_size=window)
    images = images_of(64, 64)
    changed = images.clone()
    changed[:, :, :8, :8] += 1
    [_, second, _] = [(a - b).abs().amax((0, 1)) > 1e-9 for a, b in zip(vit(images), vit(changed))]
    assert second.all()


@pytest.mark.parametrize('size', [(48, 48), (40, 56)])
def test_windows_are_trained(size):
    grads = gradients(build(window_size=4, global_blocks=(2,)), images_of(*size))
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads.values())
