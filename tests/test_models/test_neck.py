import math

import pytest
import torch
from builders import GRID, VOCAB, WIDTH, build_cae

from cae_mm.models import CAENeck
from cae_mm.models.neck import RegressorBlock


def layer_norm(x, norm):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    normed = [(v - mean) / math.sqrt(variance + 1e-6) for v in x]
    return [n * w + b for n, w, b in zip(normed, norm.weight.tolist(), norm.bias.tolist())]


def linear(x, layer):
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(layer.weight.tolist(), bias)]


def gelu(v):
    return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))


def add(x, y):
    return [a + b for a, b in zip(x, y)]


def naive_block(block, x_m, z_v, pos_m, pos_v):
    """The regressor block, one image, one token and one head at a time."""
    heads, D = block.attn.num_heads, len(x_m[0])
    d = D // heads
    everything, positions = z_v + x_m, pos_v + pos_m
    k = [
        linear(layer_norm(add(x, p), block.norm_k), block.attn.k)
        for x, p in zip(everything, positions)
    ]
    v = [linear(layer_norm(x, block.norm_v), block.attn.v) for x in everything]
    out = []
    for x, p in zip(x_m, pos_m):
        q = linear(layer_norm(add(x, p), block.norm_q), block.attn.q)
        attended = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = [sum(a * b for a, b in zip(q[part], key[part])) / math.sqrt(d) for key in k]
            weights = [math.exp(s - max(scores)) for s in scores]
            weights = [w / sum(weights) for w in weights]
            attended += [sum(w * val[part][i] for w, val in zip(weights, v)) for i in range(d)]
        attended = linear(attended, block.attn.proj)
        x = [a + g * b for a, g, b in zip(x, block.gamma_1.tolist(), attended)]
        x = layer_norm(x, block.norm2)
        hidden = [gelu(u) for u in linear(x, block.mlp.fc1)]
        x = [a + g * b for a, g, b in zip(x, block.gamma_2.tolist(), linear(hidden, block.mlp.fc2))]
        out.append(x)
    return out


def test_regressor_block_equals_a_loop_by_hand():
    torch.manual_seed(0)
    block = RegressorBlock(8, 2, layer_scale=0.5).double()
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.3)
    x_m, pos_m = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    z_v, pos_v = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    got = block(x_m, z_v, pos_m, torch.cat([pos_v, pos_m], 1))
    want = naive_block(block, *(x[0].tolist() for x in (x_m, z_v, pos_m, pos_v)))
    torch.testing.assert_close(got[0], torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)


def neck_and_latents():
    neck = build_cae().neck.eval()
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(16) for _ in range(2)])
    return neck, torch.randn(2, 9, WIDTH), ids[:, :9], ids[:, 9:]


def test_mask_token_is_the_query_of_each_masked_patch():
    """With a sentinel in its place and no blocks, M normalised sentinels come out."""
    neck = CAENeck(in_dims=16, embed_dims=16, num_heads=2, regressor_depth=0)
    with torch.no_grad():
        neck.mask_token.copy_(torch.arange(16.0))
    _, z_v, ids_v, ids_m = neck_and_latents()
    z_m = neck.regress(z_v, ids_v, ids_m, GRID)
    want = torch.nn.functional.layer_norm(torch.arange(16.0), (16,), eps=1e-6)
    torch.testing.assert_close(z_m, want.expand(2, 7, 16))


def test_order_of_visible_patches_does_not_matter():
    neck, z_v, ids_v, ids_m = neck_and_latents()
    order = torch.randperm(9)
    torch.testing.assert_close(
        neck.regress(z_v[:, order], ids_v[:, order], ids_m, GRID),
        neck.regress(z_v, ids_v, ids_m, GRID),
        rtol=1e-4,
        atol=1e-5,
    )


def test_masked_patches_differ_by_their_position_only():
    neck, z_v, ids_v, ids_m = neck_and_latents()
    order = torch.randperm(7)
    shuffled = neck.regress(z_v, ids_v, ids_m[:, order], GRID)
    torch.testing.assert_close(
        shuffled, neck.regress(z_v, ids_v, ids_m, GRID)[:, order], rtol=1e-4, atol=1e-5
    )
    assert (shuffled[:, 0] - shuffled[:, 1]).abs().max() > 1e-3


def test_drop_path_is_linear_in_either_part():
    neck = CAENeck(in_dims=16, embed_dims=16, num_heads=2, drop_path_rate=0.3)
    for part in (neck.regressor, neck.decoder):
        rates = [block.drop_path.drop_prob for block in part]
        assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_branches():
    block = RegressorBlock(8, 2, drop_path=0.999999, layer_scale=1.0).train()
    x_m, z_v, pos_m, pos = (torch.randn(4, n, 8) for n in (3, 5, 3, 8))
    torch.testing.assert_close(block(x_m, z_v, pos_m, pos), block.norm2(x_m))


def test_recipe_of_the_paper_by_default():
    neck = CAENeck()
    assert len(neck.regressor) == len(neck.decoder) == 4
    assert neck.output.out_features == 8192
    assert neck.decoder[0].gamma_1.unique().item() == pytest.approx(0.1)
    assert isinstance(neck.projection, torch.nn.Identity)


def test_initialisation_is_the_official_one():
    neck = build_cae().neck
    assert neck.mask_token.abs().max() <= 0.02
    assert neck.mask_token.std() > 0
    bound = math.sqrt(6 / (WIDTH + VOCAB))  # xavier uniform
    assert bound * 0.9 < neck.output.weight.abs().max() <= bound
    assert not neck.output.bias.any()
