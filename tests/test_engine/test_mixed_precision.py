"""Number formats of training, resuming in another one, and gathering of gradients."""

import pytest
import torch
from builders import build_cae, make_batch
from mmengine.optim import build_optim_wrapper
from torch import nn

from cae_mm.precision import Precision


def build(model, **changes):
    cfg = dict(type='cae_mm.MixedPrecisionOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    return build_optim_wrapper(model, cfg | changes)


class Maps(nn.Linear):
    """Return a tuple, as backbones do."""

    def forward(self, x):
        return (super().forward(x),)


class Parts(nn.Module):
    """A backbone and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = Maps(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        (y,) = self.backbone(x)
        return y, self.head(y)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_what_the_machine_has(dtype, monkeypatch):
    asked = []

    def choose(device_type, wish):
        asked.append((device_type, wish))
        return Precision(dtype, 'so')

    monkeypatch.setattr('cae_mm.engine.mixed_precision.choose_precision', choose)
    model = Parts()
    wrapper = build(model)
    assert wrapper.loss_scaler.is_enabled() == (dtype == torch.float16)
    with wrapper.optim_context(model):
        assert torch.is_autocast_enabled('cpu') == (dtype != torch.float32)
        assert model.head(torch.ones(1, 2)).dtype == dtype
    assert not torch.is_autocast_enabled('cpu')
    build(model, dtype='float32')
    assert asked == [(wrapper.device_type, 'auto'), (wrapper.device_type, 'float32')]


def test_parameters_of_a_model_stay_float32():
    model = build_cae()
    wrapper = build(model, dtype='bfloat16', clip_grad=dict(max_norm=3.0))
    with wrapper.optim_context(model):
        assert model.backbone.blocks[0].mlp.fc1(torch.randn(1, 16)).dtype == torch.bfloat16
        losses = model(*make_batch(), mode='loss')
    before = {name: param.clone() for name, param in model.named_parameters()}
    wrapper.update_params(losses['loss_main'] + losses['loss_align'])
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32
        moved = not torch.equal(param, before[name])
        assert moved == param.requires_grad, name


def test_one_part_of_a_model():
    model, x = Parts(), torch.tensor([[1.0, 0.3]])
    wrapper = build(model, dtype='bfloat16', modules=['backbone'])
    with wrapper.optim_context(model):
        inner, outer = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        (expected,) = model.backbone(x)
    assert inner.dtype == outer.dtype == torch.float32
    assert torch.equal(inner, expected.float())
    assert torch.equal(outer, model.head(inner))
    inner.sum().backward()
    assert model.backbone.weight.grad.dtype == torch.float32
    assert not torch.equal(model(x)[0], inner)  # nothing stays behind


def test_one_part_of_a_wrapped_model(tmp_path):
    """The parts are those of the model inside the wrapper; its gradients are reduced."""
    rendezvous = f'file://{tmp_path}/rendezvous'
    torch.distributed.init_process_group('gloo', init_method=rendezvous, rank=0, world_size=1)
    try:
        model, x = Parts(), torch.tensor([[1.0, 0.3]])
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        wrapper = build(wrapped, dtype='bfloat16', modules=['backbone'])
        with wrapper.optim_context(wrapped):
            inner, outer = wrapped(x)
        outer.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        (expected,) = model.backbone(x)
    assert inner.dtype == outer.dtype == torch.float32
    assert torch.equal(inner, expected.float()) and torch.equal(outer, model.head(inner))
    assert model.backbone.weight.grad.any()


def test_one_part_that_fails():
    model = Parts()
    wrapper = build(model, dtype='bfloat16', modules=['backbone'])
    with pytest.raises(RuntimeError, match='shapes'), wrapper.optim_context(model):
        model(torch.zeros(1, 3))
    assert not torch.is_autocast_enabled('cpu')
    assert model(torch.zeros(1, 2))[0].dtype == torch.float32


@pytest.mark.parametrize('clip', [None, dict(max_norm=0.01)])
def test_scaled_losses_make_the_same_step(clip):
    """Scaling by 2 ** 16 leaves no trace in the step; an overflow is no step and a lower scale."""
    weights = []
    for dtype in ('float32', 'float16'):
        torch.manual_seed(0)
        model = Parts()
        wrapper = build(model, dtype=dtype, clip_grad=clip)
        wrapper.update_params(model(torch.ones(1, 2))[1].square().sum())
        weights.append(model.head.weight.detach().clone())
    torch.testing.assert_close(*weights)
    scale = wrapper.loss_scaler.get_scale()
    wrapper.update_params(model(torch.ones(1, 2))[1].sum() * torch.inf)
    assert torch.equal(model.head.weight, weights[1])
    assert wrapper.loss_scaler.get_scale() == scale / 2 > 1


@pytest.mark.parametrize('to', ['float16', 'bfloat16'])
@pytest.mark.parametrize('origin', ['float16', 'float32'])
def test_a_checkpoint_resumes_in_another_format(origin, to):
    def make(dtype):
        return build(model, dtype=dtype, optimizer=dict(type='SGD', lr=0.1, momentum=0.9))

    model = Parts()
    saved = make(origin)
    saved.update_params(model(torch.ones(1, 2))[1].sum())
    saved.loss_scaler.update(2.0**10)
    state = saved.state_dict()
    assert ('loss_scaler' in state) == (origin == 'float16')
    loaded = make(to)
    initial = loaded.loss_scaler.get_scale()
    loaded.load_state_dict(state)
    expected = 2.0**10 if origin == to else initial
    assert loaded.loss_scaler.get_scale() == expected
    momenta = [wrapper.optimizer.state_dict()['state'] for wrapper in (saved, loaded)]
    assert len(momenta[0]) == 4
    for i, values in momenta[0].items():
        assert torch.equal(values['momentum_buffer'], momenta[1][i]['momentum_buffer'])


def test_gathering_equals_one_large_batch():
    """Two steps with 2 images are the update of one with 4 (float32)."""
    results = []
    views, samples = make_batch(4)
    for parts in (1, 2):
        model = build_cae().train()
        wrapper = build(model, dtype='float32', accumulative_counts=parts)
        for i in range(parts):
            part = slice(i * 4 // parts, (i + 1) * 4 // parts)
            with wrapper.optim_context(model):
                losses = model([view[part] for view in views], samples[part], mode='loss')
            wrapper.update_params(losses['loss_main'] + losses['loss_align'])
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


@pytest.mark.parametrize(('length', 'gathered'), [(6, 3), (7, 3), (5, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize('start', [0, 1])
def test_gathering_ends_with_the_epoch(length, gathered, start):
    """Each update is by the mean gradient of its steps, of few at an epoch's end."""
    inputs = torch.randn(3, length, 1, 2, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(2, 1, bias=False)
    expected = model.weight.detach().clone()
    wrapper = build(model, dtype='float32', accumulative_counts=gathered)
    wrapper.epoch_length = length
    wrapper.initialize_count_status(model, start * length, 3 * length)  # resumed
    for epoch in range(start, 3):
        for first in range(0, length, gathered):
            window = inputs[epoch, first : first + gathered]
            for i, x in enumerate(window, start=1):
                assert wrapper.should_sync() == (i == len(window))
                with wrapper.optim_context(model):
                    loss = model(x).sum()
                wrapper.update_params(loss)
                assert wrapper.should_update() == (i == len(window))
            expected -= 0.1 * window.mean(0)
            torch.testing.assert_close(model.weight.detach(), expected)
        assert model.weight.grad is None or not model.weight.grad.any()  # nothing is pending


@pytest.mark.parametrize(('length', 'warned'), [(3, False), (None, True)])
def test_only_a_run_by_iterations_can_lose_what_was_gathered(length, warned, monkeypatch):
    """An epoch of three steps ends with an update; the third step of a long run is none."""
    texts = []
    module = 'mmengine.optim.optimizer.optimizer_wrapper.print_log'
    monkeypatch.setattr(module, lambda text, *_, **__: texts.append(text))
    wrapper = build(model := nn.Linear(2, 1), dtype='float32', accumulative_counts=2)
    wrapper.epoch_length = length
    wrapper.initialize_count_status(model, 3, 6)
    assert any('gradient of some iterations is lost' in text for text in texts) == warned
    assert wrapper.inner_count == 3


OPTIMIZERS = {
    'fused': dict(type='AdamW', lr=0.1, fused=True),
    'foreach': dict(type='AdamW', lr=0.1),
    'SGD': dict(type='SGD', lr=0.1, momentum=0.9),
    'fused SGD': dict(type='SGD', lr=0.1, momentum=0.9, fused=True),
    'LARS': dict(type='cae_mm.LARS', lr=0.1, weight_decay=0.1),
}


class Normed(nn.Module):
    """A linear layer between two ends, one of them normalised over the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x))


def square(y):
    return y.pow(3).sum()


BREAKS = {
    'loss': lambda y: square(y) * torch.nan,
    'infinite loss': lambda y: square(y) + torch.inf,  # whose gradients are finite
    'gradient': lambda y: square(y) + (y - y.detach()).abs().sqrt().sum(),  # 0 * inf
}


def finite_steps(optimizer, losses, **changes):
    """Train a step by each loss; return the model and what its optimizer keeps."""
    model, generator = Normed(), torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, generator=generator)
    wrapper = build(model, dtype='float32', optimizer=dict(optimizer), **changes)
    for loss in losses:
        with wrapper.optim_context(model):
            value = loss(model(x))
        wrapper.update_params(value)
    return model, wrapper


@pytest.mark.parametrize('clip', [None, dict(max_norm=0.1), dict(type='value', clip_value=0.01)])
@pytest.mark.parametrize('broken', BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_broken_step_is_none(optimizer, broken, clip):
    """The first one, or a later one: weights, states and step counts are those without it."""
    expected, other = finite_steps(optimizer, [square] * 2, clip_grad=clip)
    for losses in ([broken, square, square], [square, broken, square]):
        model, wrapper = finite_steps(optimizer, losses, clip_grad=clip)
        for name, param in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), param), name
        states = [x.optimizer.state_dict()['state'] for x in (other, wrapper)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_all_that_is_gathered_is_skipped():
    options = dict(accumulative_counts=2)
    expected, _ = finite_steps(OPTIMIZERS['fused'], [square] * 2, **options)
    losses = [square, BREAKS['infinite loss'], square, square]
    model, wrapper = finite_steps(OPTIMIZERS['fused'], losses, **options)
    assert torch.equal(model.linear.weight, expected.linear.weight)
    assert wrapper.grad_norm.isfinite()


def test_statistics_forget_a_broken_batch():
    model = Normed()
    wrapper = build(model, dtype='float32')
    for x in (torch.randn(4, 2), torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]), torch.randn(4, 2)):
        before = model.norm.running_mean.clone()
        with wrapper.optim_context(model):
            model(x)
        kept = torch.equal(model.norm.running_mean, before)
        assert kept == (not x.isfinite().all())
        assert model.norm.running_mean.isfinite().all() and model.norm.running_var.isfinite().all()


def test_the_norm_is_logged_without_clipping():
    model, wrapper = finite_steps(OPTIMIZERS['SGD'], [square])
    logged = wrapper.message_hub.get_scalar('train/grad_norm').current()
    moved = [
        (a - b).flatten() for a, b in zip(Normed().parameters(), model.parameters(), strict=True)
    ]
    assert logged == pytest.approx(torch.cat(moved).norm().item() / 0.1, rel=1e-5)
