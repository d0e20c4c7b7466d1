"""Weights are compared with those of a forward pass by hand, in loops over heads."""

import math

import pytest
import torch
from builders import GRID, build_cae, make_batch, randomize

from cae_mm.models import AttentiveProbeHead, CAEViT, LinearProbeHead
from cae_mm.models.blocks import Attention, CrossAttention, WindowAttention
from cae_mm.visualization.attention import (
    attended_share,
    class_attention,
    cross_attention_weights,
    nearest_masked,
    overlay,
    paint_attention,
    probe_attention,
    record_attention,
    regressor_attention,
    self_attention_weights,
    with_mean,
)

HEADS, WIDTH, N = 2, 16, GRID[0] * GRID[1]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def by_hand(q, k, v, proj, bias=None):
    """Weights (B, heads, M, L) and output (B, M, D) of attention, head by head."""
    weights, outputs = [], []
    for i, part in enumerate(torch.arange(q.shape[-1]).chunk(HEADS)):
        logits = torch.einsum('bmd,bld->bml', q[..., part], k[..., part]) / math.sqrt(len(part))
        if bias is not None:
            logits = logits + bias[i]
        weights.append(logits.softmax(-1))
        outputs.append(weights[-1] @ v[..., part])
    return torch.stack(weights, dim=1), proj(torch.cat(outputs, dim=-1))


def split_by_hand(attn, x):
    wq, wk, wv = attn.qkv.weight.chunk(3)
    return x @ wq.T + attn.q_bias, x @ wk.T, x @ wv.T + attn.v_bias


@pytest.mark.parametrize('bias_grid', [None, GRID])
@torch.no_grad()
def test_self_attention(bias_grid):
    attn = randomize(Attention(WIDTH, HEADS, bias_grid))
    x, bias = torch.randn(3, 1 + N, WIDTH), None
    if bias_grid:
        bias = attn.position_bias(GRID)[0]
        assert bias.shape == (HEADS, 1 + N, 1 + N) and bias.abs().max() > 0.1
    want, output = by_hand(*split_by_hand(attn, x), attn.proj, bias)
    close(attn(x, GRID), output)  # so the weights by hand are those that are used
    close(self_attention_weights(attn, x, GRID), want)
    close(self_attention_weights(attn, x, GRID, queries=1), want[:, :, :1])
    close(want.sum(-1), torch.ones(3, HEADS, 1 + N))


@torch.no_grad()
def test_cross_attention():
    attn = randomize(CrossAttention(WIDTH, HEADS))
    q, k, v = torch.randn(2, 3, WIDTH), torch.randn(2, 7, WIDTH), torch.randn(2, 7, WIDTH)
    want, output = by_hand(attn.q(q), attn.k(k), attn.v(v), attn.proj)
    close(attn(q, k, v), output)
    close(cross_attention_weights(attn, q, k), want)


def test_windows_are_refused():
    attn = WindowAttention(WIDTH, HEADS, window_size=2)
    with pytest.raises(ValueError, match='windows have no attention over the whole image'):
        self_attention_weights(attn, torch.randn(1, 1 + N, WIDTH), GRID)


def build_encoder(**options):
    arch = dict(embed_dims=WIDTH, depth=3, num_heads=HEADS, layer_scale=0.1)
    return randomize(CAEViT(arch=arch, img_size=16, patch_size=4, **options)).eval()


@pytest.mark.parametrize('layer', [0, 1, -1])
@pytest.mark.parametrize('use_rel_pos_bias', [False, True])
@torch.no_grad()
def test_class_token_in_any_layer(layer, use_rel_pos_bias):
    encoder = build_encoder(use_rel_pos_bias=use_rel_pos_bias)
    [images, _], _ = make_batch()
    x = encoder._embed(images, GRID)
    for block in encoder.blocks[: layer % 3]:
        x = block(x, GRID)
    block = encoder.blocks[layer]
    bias = block.attn.position_bias(GRID)
    tokens = split_by_hand(block.attn, block.norm1(x))
    want, _ = by_hand(*tokens, block.attn.proj, None if bias is None else bias[0])
    found = class_attention(encoder, images, layer)
    close(found, want[:, :, 0, 1:])
    close(found.sum(-1), 1 - want[:, :, 0, 0])
    assert not any(block.attn._forward_pre_hooks for block in encoder.blocks)


@torch.no_grad()
def test_recording_changes_nothing_and_ends():
    encoder, [images, _] = build_encoder(), make_batch()[0]
    attn = encoder.blocks[1].attn
    before = encoder(images)[0]
    with pytest.raises(KeyError), record_attention(attn) as recorded:  # an error ends it too
        assert torch.equal(encoder(images)[0], before)
        raise KeyError
    assert recorded[0].shape == (3, HEADS, 1 + N, 1 + N)
    encoder(images)
    assert len(recorded) == 1


@torch.no_grad()
def test_query_of_a_probe():
    encoder, [images, _] = build_encoder(), make_batch()[0]
    head = AttentiveProbeHead(num_classes=3, in_channels=WIDTH, num_heads=HEADS)
    head = randomize(head).eval()
    patches = encoder(images)[0][:, 1:]
    q = head.attn.q(head.norm_q(head.query_token)).expand(3, -1, -1)
    k, v = head.attn.k(head.norm_k(patches)), head.attn.v(head.norm_v(patches))
    want, pooled = by_hand(q, k, v, head.attn.proj)
    close(head.norm(pooled[:, 0]), head.pre_logits(encoder(images)))
    close(probe_attention(encoder, head, images), want[:, :, 0])


def test_a_linear_probe_has_no_query():
    head = LinearProbeHead(num_classes=3, in_channels=WIDTH)
    with pytest.raises(ValueError, match='LinearProbeHead has no learned query'):
        probe_attention(build_encoder(), head, torch.randn(1, 3, 16, 16))


@pytest.fixture
def cae():
    model = build_cae()
    randomize(model.neck)
    return model.eval()


@pytest.mark.parametrize('layer', [0, 1])
@torch.no_grad()
def test_regressor(cae, layer):
    [images, _], samples = make_batch()
    masks = torch.stack([sample.mask for sample in samples])
    patches = torch.tensor([mask.nonzero()[i].item() for i, mask in zip((0, 3, 6), masks)])
    found = regressor_attention(cae, images, masks, patches, layer)
    close(found.sum(-1), torch.ones(3, HEADS))
    table = cae.neck.positions(GRID, images.device)
    for image, mask, patch, weights in zip(images, masks, patches, found, strict=True):
        ids_v, ids_m = (mask == want for want in (False, True))
        visible = cae.neck.project(
            cae.backbone.forward_features(image[None], ids_v.nonzero().T)[:, 1:]
        )
        x = cae.neck.mask_token.expand(1, int(mask.sum()), -1)
        positions = torch.cat([table[ids_v], table[ids_m]])[None]
        for block in cae.neck.regressor[: layer + 1]:
            keys = block.norm_k(torch.cat([visible, x], dim=1) + positions)
            queries = block.norm_q(x + table[ids_m])
            last, *_ = by_hand(block.attn.q(queries), block.attn.k(keys), keys, block.attn.proj)
            x = block(x, visible, table[ids_m][None], positions)
        row = (ids_m.nonzero() == patch).nonzero()[0, 0]
        want = torch.zeros(HEADS, N)
        want[:, torch.cat([ids_v.nonzero(), ids_m.nonzero()])[:, 0]] = last[0, :, row]
        close(weights, want)


def test_regressor_errors(cae):
    [images, _], samples = make_batch()
    masks = torch.stack([sample.mask for sample in samples])
    visible = (~masks).int().argmax(1)
    with pytest.raises(ValueError, match='masked patches only'):
        regressor_attention(cae, images, masks, visible)
    with pytest.raises(ValueError, match='no block 2 among 2'):
        regressor_attention(cae, images, masks, masks.int().argmax(1), layer=2)
    without = build_cae(neck=dict(regressor_depth=0))
    with pytest.raises(ValueError, match='no regressor: model.neck.regressor_depth .* is 0'):
        regressor_attention(without, images, masks, masks.int().argmax(1))


def test_nearest_masked():
    masks = torch.zeros(3, 12, dtype=torch.bool)  # 3x4
    masks[0, [0, 6]] = masks[1, [0, 11]] = masks[2, 5] = True
    assert nearest_masked(masks, (3, 4), (1, 1)).tolist() == [6, 0, 5]
    assert nearest_masked(masks, (3, 4), (2, 2)).tolist() == [6, 11, 5]


def test_mean_and_share():
    weights = torch.zeros(1, 2, 4)
    weights[0, 0], weights[0, 1, 2] = 0.25, 0.5
    close(with_mean(weights)[0, 0], torch.tensor([0.125, 0.125, 0.375, 0.125]))
    assert torch.equal(with_mean(weights)[:, 1:], weights)
    close(attended_share(weights), torch.tensor([[1.0, 0.25]]))


def test_overlay_is_bright_where_weights_are():
    weights = torch.zeros(16)
    weights[5], weights[6] = 1.0, 0.5
    picture = overlay(torch.rand(3, 16, 16), weights, GRID, top=0.5)
    brightness = picture.sum(0).unflatten(0, (4, 4)).unflatten(2, (4, 4)).mean((1, 3)).flatten()
    assert brightness[[5, 6]].min() > 2 * brightness[[0, 3, 8 + 4, 15]].max()
    assert 0 <= picture.min() and picture.max() <= 1
    pictures = torch.rand(2, 3, 16, 16)
    rows = paint_attention(pictures, weights.expand(2, 3, 16), GRID, 0.5)
    assert [len(row) for row in rows] == [4, 4]
    assert torch.equal(rows[1][0], pictures[1])
    assert torch.equal(rows[1][3], overlay(pictures[1], weights, GRID, 0.5))
