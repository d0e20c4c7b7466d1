import pytest
import torch
from builders import build_cae, make_batch
from mmengine.optim import build_optim_wrapper
from torch import nn

from cae_mm.engine import BF16OptimWrapper


def build(model, paramwise_cfg=None, **changes):
    return build_optim_wrapper(
        model,
        dict(
            type='cae_mm.BF16OptimWrapper',
            constructor='cae_mm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05),
            paramwise_cfg=paramwise_cfg,
        )
        | changes,
    )


class Toy(nn.Module):
    """Two blocks, a class token and a head, four tensors that decay and four that do not."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.backbone.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
        self.backbone.get_layer_depth = self.get_layer_depth
        self.head = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    @staticmethod
    def get_layer_depth(name, prefix):
        if not name.startswith(prefix):
            return 3, 4
        return (int(name.split('.')[2]) + 1 if 'blocks' in name else 0), 4


def test_groups_by_weight_decay():
    wrapper = build(Toy())
    assert isinstance(wrapper, BF16OptimWrapper)
    groups = [
        (g['lr'], g['weight_decay'], len(g['params'])) for g in wrapper.optimizer.param_groups
    ]
    assert groups == [(0.1, 0.05, 3), (0.1, 0.0, 4)]


def test_layer_decay():
    groups = build(Toy(), dict(layer_decay_rate=0.5)).optimizer.param_groups
    got = [(round(g['lr'], 6), g['weight_decay'], len(g['params'])) for g in groups]
    assert got == [
        (0.1, 0.05, 1),  # head
        (0.05, 0.05, 1),  # weight of block 1
        (0.05, 0.0, 1),  # its bias
        (0.025, 0.05, 1),
        (0.025, 0.0, 1),
        (0.0125, 0.0, 2),  # class token, relative positions
    ]


def test_pretraining_groups_are_the_official_ones():
    """No decay for 1-D parameters and the class token; each parameter once, none frozen."""
    model = build_cae()
    decay, no_decay = build(model).optimizer.param_groups
    names = {param: name for name, param in model.named_parameters()}
    assert all(param.ndim > 1 for param in decay['params'])
    assert {names[p] for p in no_decay['params'] if p.ndim > 1} == {'backbone.cls_token'}
    assert 'neck.mask_token' in {names[p] for p in decay['params']}
    everything = decay['params'] + no_decay['params']
    assert len(everything) == len(set(everything))
    assert set(everything) == {p for p in model.parameters() if p.requires_grad}


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"layer_decay_rate only, not \['norm_decay_mult'\]"):
        build(Toy(), dict(norm_decay_mult=0))


def test_bf16_autocast_on_the_cpu():
    model = build_cae()
    wrapper = build(model)
    with wrapper.optim_context(model):
        assert torch.is_autocast_enabled('cpu')
        assert model.backbone.blocks[0].mlp.fc1(torch.randn(1, 16)).dtype == torch.bfloat16
        losses = model(*make_batch(), mode='loss')
    assert not torch.is_autocast_enabled('cpu')
    before = {name: param.clone() for name, param in model.named_parameters()}
    wrapper.update_params(losses['loss_main'] + losses['loss_align'])
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32
        moved = not torch.equal(param, before[name])
        assert moved == param.requires_grad, name


def test_accumulation_equals_one_large_batch():
    """Two micro-batches of 2 give the step of one batch of 4 (SGD, float32)."""
    steps = []
    views, samples = make_batch(4)
    for parts in (1, 2):
        model = build_cae().train()
        wrapper = build(
            model,
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.1),
            accumulative_counts=parts,
        )
        for i in range(parts):
            part = slice(i * 4 // parts, (i + 1) * 4 // parts)
            with wrapper.optim_context(model):
                losses = model([view[part] for view in views], samples[part], mode='loss')
            wrapper.update_params(losses['loss_main'] + losses['loss_align'])
        steps.append(model.state_dict())
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value)
