from types import SimpleNamespace

import pytest
import torch

from cae_mm.hooks import GumbelTemperatureHook


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
