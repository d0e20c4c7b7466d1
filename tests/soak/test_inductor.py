"""Steps compiled to machine code, which takes a minute."""

import pytest
import torch
import torch._dynamo
from builders import PATCH, SHALLOW, assert_same_steps, build_cae, make_batch


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of torch by torch
def test_inductor_computes_what_eager_steps_do():
    changes = dict(SHALLOW, target_generator=dict(type='cae_mm.RGBTarget'))
    changes['neck'] = SHALLOW['neck'] | dict(out_dims=3 * PATCH**2)
    torch._dynamo.reset()
    compiled, eager = (build_cae(**changes).train() for _ in range(2))
    compiled.compile()
    views, samples = make_batch()
    assert_same_steps(compiled, eager, views, [sample.mask for sample in samples])
