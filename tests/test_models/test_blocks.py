"""Layers against loops, formulas and torch's own modules."""

import math

import official_reference as official
import pytest
import torch
from builders import close, equal, randomize
from torch import nn

from cae_mm.models.blocks import (
    Attention,
    Block,
    CrossAttention,
    Mlp,
    init_linear_and_norm,
    linear_drop_path,
    trunc_normal_,
)
from cae_mm.models.functional import DropPath


def tokens(*counts):
    return [torch.randn(2, count, 12, dtype=torch.float64) for count in counts]


def test_attention_head_by_head():
    attention = randomize(Attention(12, 3).double())
    [x] = tokens(5)
    q, k, v = (x @ w.T for w in attention.qkv.weight.chunk(3))
    y = official.attend(q + attention.q_bias, k, v + attention.v_bias, heads=3)
    close(attention(x), attention.proj(y))


@pytest.mark.parametrize(('autocast', 'tolerance'), [(False, 1e-6), (True, 0.02)])
def test_relative_position_bias_is_the_same_with_and_without_gradient(autocast, tolerance):
    attention = randomize(Attention(12, 3, bias_grid=(2, 3)))
    x = torch.randn(2, 7, 12)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        trained = attention(x)
        with torch.no_grad():
            torch.testing.assert_close(trained, attention(x), rtol=0, atol=tolerance)
    trained.sum().backward()
    assert attention.relative_position_bias_table.grad.count_nonzero() > 0


def test_cross_attention_head_by_head():
    attention = randomize(CrossAttention(12, 3).double())
    q, k, v = tokens(4, 6, 6)
    y = official.attend(attention.q(q), attention.k(k), attention.v(v), heads=3)
    close(attention(q, k, v), attention.proj(y))


@pytest.mark.parametrize(
    ('kind', 'names'),
    [
        (Attention, ['q_bias', 'v_bias', 'qkv.weight', 'proj.weight', 'proj.bias']),
        (
            CrossAttention,
            ['q.weight', 'q.bias', 'k.weight', 'v.weight', 'v.bias', 'proj.weight', 'proj.bias'],
        ),
    ],
)
def test_keys_have_no_bias(kind, names):
    assert [name for name, _ in kind(8, 2).named_parameters()] == names


def test_mlp_by_hand():
    mlp = randomize(Mlp(12, mlp_ratio=1.5).double())
    assert mlp.fc1.out_features == 18
    [x] = tokens(3)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU, not approximated
    close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_block_is_the_official_one():
    block = randomize(Block(12, 2, mlp_ratio=2.0, drop_path=0.5).double())
    [x] = tokens(5)
    block.eval()  # nothing is dropped
    close(block(x), official.block(x, block.state_dict(), '', heads=2))


@pytest.mark.parametrize('options', [{}, {'bias_grid': (2, 3)}, {'window_size': 2}], ids=str)
def test_block_of_the_first_tokens_only(options):
    block = randomize(Block(12, 3, **options).double())
    [x] = tokens(7)
    close(block(x, (2, 3), 2), block(x, (2, 3))[:, :2])


class Shifted(nn.Linear):
    """As adapters such as LoRA's, a layer that is more than its weight and bias."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize('queries', [None, 2])
@pytest.mark.parametrize('name', ['attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'])
def test_layers_that_are_more_than_a_weight_count_in_training_too(name, queries):
    block = randomize(Block(12, 3).double())
    [x] = tokens(7)
    parent, _, attribute = name.partition('.')
    linear = block.get_submodule(name)
    before = block(x, None, queries)
    adapted = Shifted(linear.in_features, linear.out_features, linear.bias is not None).double()
    adapted.load_state_dict(linear.state_dict())
    setattr(block.get_submodule(parent), attribute, adapted)
    with torch.no_grad():
        wanted = block(x, None, queries)
        if linear.bias is not None:  # the same by other means
            linear.bias += 1
            setattr(block.get_submodule(parent), attribute, linear)
            close(block(x, None, queries), wanted)
            setattr(block.get_submodule(parent), attribute, adapted)
    close(block(x, None, queries), wanted)
    assert (wanted - before).abs().max() > 1e-3


def test_hooks_change_no_number():
    block, x = randomize(Block(12, 3)), torch.randn(2, 5, 12)
    with torch.autocast('cpu', torch.bfloat16):
        before = block(x)
        for module in block.modules():
            module.register_forward_hook(lambda *_: None)
        equal(block(x), before)


def test_layer_scale_is_per_channel():
    block = Block(8, 2, layer_scale=0.3)
    equal(block.gamma_1.data, torch.full((8,), 0.3))
    equal(block.gamma_2.data, torch.full((8,), 0.3))


def test_drop_path_skips_branches_of_whole_images():
    """A kept branch is scaled by 1 / (1 - rate); so each image has one of four outputs."""
    block = randomize(Block(8, 2, drop_path=0.25).double(), std=0.5)
    x = torch.randn(1, 3, 8, dtype=torch.float64).expand(200, 3, 8)
    torch.manual_seed(0)
    out = block(x)
    attention = block.gamma_1 * block.attn(block.norm1(x[0:1])) / 0.75
    outcomes = []
    for y in (x[0:1], x[0:1] + attention):
        outcomes += [y, y + block.gamma_2 * block.mlp(block.norm2(y)) / 0.75]
    same = torch.stack([torch.isclose(out, y).flatten(1).all(1) for y in outcomes])
    assert (same.sum(0) == 1).all()
    expected = torch.tensor([0.25 * 0.25, 0.25 * 0.75, 0.75 * 0.25, 0.75 * 0.75])
    assert (same.float().mean(1) - expected).abs().max() < 0.1


def test_drop_path_keeps_the_number_format():
    x = torch.ones(4, 3, 8, dtype=torch.bfloat16)
    assert DropPath(0.5).train()(x, x).dtype == torch.bfloat16


def test_linear_drop_path():
    assert linear_drop_path(0.1, 5) == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert linear_drop_path(0.1, 1) == [0]


def test_trunc_normal_is_cut_at_one_deviation():
    """Then the deviation is 0.02 * sqrt(1 - 2 phi(1) / (2 Phi(1) - 1)) = 0.02 * 0.5396."""
    torch.manual_seed(0)
    tensor = torch.zeros(100_000)
    trunc_normal_(tensor)
    assert tensor.abs().max() <= 0.02
    assert tensor.abs().max() > 0.0199
    assert tensor.std().item() == pytest.approx(0.02 * 0.5396, rel=0.01)
    assert abs(tensor.mean().item()) < 2e-4


def test_init_linear_and_norm():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(30, 50), nn.LayerNorm(50), nn.Linear(50, 8, bias=False))
    for param in module.parameters():
        nn.init.constant_(param, 7)
    module.apply(init_linear_and_norm)
    for linear in (module[0], module[2]):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    equal(module[0].bias.data, torch.zeros(50))
    equal(module[1].weight.data, torch.ones(50))
    equal(module[1].bias.data, torch.zeros(50))


@pytest.mark.parametrize('attention', [Attention, CrossAttention])
def test_heads_that_do_not_divide_the_width_are_refused(attention):
    with pytest.raises(ValueError, match='a width of 10 cannot be split into 4 heads'):
        attention(10, 4)
