from types import SimpleNamespace

import pytest
import torch
from builders import build_cae, make_batch

from cae_mm.hooks import AlignmentRampHook, GumbelTemperatureHook


class FakeRunner:
    """What the hooks read of a Runner."""

    def __init__(self, **values):
        self.optim_wrapper = SimpleNamespace()
        self.__dict__.update(dict(seed=3, epoch=0, iter=0, max_iters=100) | values)


def test_temperature_goes_from_start_to_end():
    runner = FakeRunner(model=torch.nn.Module())
    hook = GumbelTemperatureHook(start=1.0, end=0.2, share=0.5)
    temperatures = []
    for runner.iter in range(100):
        hook.before_train_iter(runner, 0)
        temperatures.append(runner.model.temperature)
    assert temperatures[0] == 1.0
    assert temperatures[25] == pytest.approx(0.6)  # half of the cosine
    assert temperatures[50:] == pytest.approx([0.2] * 50)
    assert sorted(temperatures, reverse=True) == temperatures


def test_alignment_ramp_goes_from_0_to_lambda():
    """The loss that is logged and its gradient follow; files do not know of it."""
    model = build_cae().eval()
    runner, hook = FakeRunner(model=model), AlignmentRampHook(share=0.2)
    hook.before_train(runner)
    full = model(*make_batch(), mode='loss')
    shares, names = [], list(model.state_dict())
    for runner.iter in (0, 5, 10, 20, 99):
        hook.before_train_iter(runner, 0)
        losses = model(*make_batch(), mode='loss')
        assert torch.equal(losses['loss_main'], full['loss_main'])
        assert torch.equal(losses['align_cos'], full['align_cos'])
        shares.append((losses['loss_align'] / full['loss_align']).item())
    assert shares == pytest.approx([0, 0.25, 0.5, 1, 1])
    assert not any('ramp' in name for name in names)
    runner.iter = 0
    hook.before_train_iter(runner, 0)
    model(*make_batch(), mode='loss')['loss_align'].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    'build', [lambda: build_cae(head=dict(align_weight=0.0)), torch.nn.Module], ids=['0', 'other']
)
def test_alignment_ramp_needs_an_alignment(build):
    with pytest.raises(ValueError, match='AlignmentRampHook found no alignment loss: .* leave it'):
        AlignmentRampHook().before_train(FakeRunner(model=build()))
