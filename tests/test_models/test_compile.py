"""A compiled training step: the numbers of the eager one, compiled once for a size of batch."""

import pytest
import torch
import torch._dynamo
from builders import WIDTH, build_cae, make_batch
from mmpretrain.structures import DataSample
from torch._dynamo.utils import counters
from two_processes import train

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of torch by torch
SMALL = dict(
    backbone=dict(arch=dict(embed_dims=WIDTH, depth=1, num_heads=2, layer_scale=0.1)),
    neck=dict(regressor_depth=1),
)


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    """Start without anything compiled."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model, views, masks, dtype=torch.float32):
    """Losses and gradients."""
    model.zero_grad()
    samples = [DataSample(mask=mask) for mask in masks]
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model(views, samples, mode='loss')
    (losses['loss_main'] + losses['loss_align']).backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    return losses, {name: grad for name, grad in gradients.items() if grad is not None}


def assert_same_steps(compiled, eager, views, masks, dtype=torch.float32):
    """Losses and gradients to 1e-5 of the largest value of each; bfloat16 rounds elsewhere."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    results = [step(model, views, masks, dtype) for model in (compiled, eager)]
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            scale = value.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(one[name] / scale, value / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ('changes', 'dtype'),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        (dict(complementary_masks=True, teacher_momentum=None), torch.float32),
    ],
    ids=['float32', 'bfloat16', 'complementary'],
)
def test_steps_are_compiled_once_and_whole(changes, dtype):
    """Other masks change nothing; a last, smaller batch is compiled when it comes."""
    compiled, eager = (build_cae(**SMALL, **changes).train() for _ in range(2))
    names = list(compiled.state_dict())
    compiled.compile(backend='aot_eager')
    views, samples = make_batch()
    masks = torch.stack([sample.mask for sample in samples])
    for shift in range(3):
        assert_same_steps(compiled, eager, views, masks.roll(shift, 1), dtype)
    assert counters['stats']['unique_graphs'] == 1
    assert_same_steps(compiled, eager, [view[:2] for view in views], masks[:2], dtype)
    assert counters['stats']['unique_graphs'] == 2
    assert not counters['graph_break']
    assert list(compiled.state_dict()) == names


def test_a_config_compiles_the_step_of_its_run(tmp_path):
    eager = train('cae', tmp_path / 'eager')
    compiled = train('cae', tmp_path / 'compiled', compile=dict(backend='aot_eager'))
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-9)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()
