import pytest
import torch
from builders import build_cae
from mmengine.optim import build_optim_wrapper
from torch import nn

from cae_mm.engine import LARS, MixedPrecisionOptimWrapper


def build(model, paramwise_cfg=None, **changes):
    return build_optim_wrapper(
        model,
        dict(
            type='cae_mm.MixedPrecisionOptimWrapper',
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
    assert isinstance(wrapper, MixedPrecisionOptimWrapper)
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


def test_layer_decay_needs_a_backbone_that_tells_its_layers():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r'get_layer_depth.*: Module with Linear has none'):
        build(model, dict(layer_decay_rate=0.5))


def test_lars_against_loops():
    """The update of MAE's linear probe: momentum gathers gradients, 1-D tensors are left alone."""
    torch.manual_seed(0)
    weight, bias, zero = torch.randn(3, 4), torch.randn(4), torch.zeros(2, 2)
    params = [nn.Parameter(x.clone()) for x in (weight, bias, zero)]
    optimizer = LARS(params, lr=0.5, weight_decay=0.1, momentum=0.9)
    expected, momenta = [weight, bias, zero], [0.0, 0.0, 0.0]
    for step in range(3):
        optimizer.param_groups[0]['lr'] = lr = 0.5 / (step + 1)  # a schedule
        for i, param in enumerate(params):
            param.grad = torch.randn_like(param)
            p, direction = expected[i], param.grad.clone()
            if i != 1:
                direction += 0.1 * p
            if i == 0 or (i == 2 and step > 0):  # no scaling while the tensor is zero
                direction *= 0.001 * p.norm() / direction.norm()
            momenta[i] = 0.9 * momenta[i] + direction
            expected[i] = p - lr * momenta[i]
        optimizer.step()
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value)


def test_lars_skips_frozen_parameters_and_resumes_exactly():
    def run(steps, state=None, start=0):
        torch.manual_seed(0)
        layer, frozen = nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False)
        optimizer = LARS([*layer.parameters(), *frozen.parameters()], lr=0.1)
        if state:
            layer.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in range(start, steps):
            layer.zero_grad()
            layer(torch.full((1, 3), step + 1.0)).square().sum().backward()
            optimizer.step()
        return layer.state_dict(), optimizer.state_dict()

    whole, _ = run(4)
    resumed, state = run(4, run(2), start=2)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert len(state['state']) == 2  # weight and bias, nothing of the frozen layer


def test_lars_under_loss_scaling(monkeypatch):
    """The update is that of unscaled gradients, none where they overflowed; nothing is read."""

    def run(scaler, broken=False):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = LARS(layer.parameters(), lr=0.1, weight_decay=0.1)
        for step in range(2):
            optimizer.zero_grad()
            loss = layer(torch.full((1, 3), step + 1.0)).square().sum()
            loss = loss * torch.inf if broken and step else loss
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                with monkeypatch.context() as patch:
                    patch.setattr(torch.Tensor, 'item', None)
                    scaler.step(optimizer)
                scaler.update()
            if broken and not step:
                before = layer.weight.detach().clone()
        return layer.weight.detach(), before if broken else None

    plain, _ = run(None)
    scaled, _ = run(torch.amp.GradScaler('cpu', init_scale=2.0**10))
    torch.testing.assert_close(scaled, plain)
    after, before = run(torch.amp.GradScaler('cpu', init_scale=2.0**10), broken=True)
    assert torch.equal(after, before)
