"""A compiled training step: the numbers of the eager one, compiled once for a size of batch."""

import pytest
import torch
import torch._dynamo
from builders import SHALLOW, VOCAB, assert_same_steps, build_cae, cae_config, make_batch
from torch._dynamo.utils import counters
from two_processes import train

KMEANS = dict(type='cae_mm.KMeansTokenizer', backbone=cae_config()['backbone'], vocab_size=VOCAB)
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of torch by torch


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    """Start without anything compiled."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ('changes', 'dtype'),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        (dict(complementary_masks=True, teacher_momentum=None), torch.float32),
        (dict(target_generator=KMEANS), torch.float32),
    ],
    ids=['float32', 'bfloat16', 'complementary', 'kmeans'],
)
def test_steps_are_compiled_once_and_whole(changes, dtype):
    """Other masks and ramps change nothing; a last, smaller batch is compiled when it comes."""
    compiled, eager = (build_cae(**SHALLOW, **changes).train() for _ in range(2))
    names = list(compiled.state_dict())
    compiled.compile(backend='aot_eager')
    views, samples = make_batch()
    masks = torch.stack([sample.mask for sample in samples])
    for shift in range(3):
        for model in (compiled, eager):
            model.head.align_ramp.fill_(1 - shift / 4)  # as AlignmentRampHook does
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
