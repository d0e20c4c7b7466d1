"""Operations and bytes of a step against counts by hand, and against a step that is computed."""

from pathlib import Path

import pytest
import torch
from builders import GRID, PATCH, VOCAB, WIDTH, build_cae, cae_config, make_batch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS

from cae_mm.patches import grid_of
from cae_mm.plan.cost import REST, TARGET, Cost, count_step, make_fake

CONFIGS = Path(__file__).parents[2] / 'configs'
MASKED = 7
PATCHES = GRID[0] * GRID[1]
PIXELS = 3 * PATCH**2


def count(cfg: dict | None = None, batch_size: int = 1, gathered=False, **changes) -> Cost:
    """Count a step with AdamW on fake tensors."""
    with torch.device('meta'):
        model = MODELS.build(cfg or cae_config(**changes))
    grid = grid_of((224, 224), 16) if cfg else GRID
    views, samples = make_batch(batch_size, grid, masked=98 if cfg else MASKED)
    if cfg:
        views[0] = torch.zeros(batch_size, 3, 224, 224)
    model, data = make_fake(model.to('meta'), dict(inputs=views, data_samples=samples))
    return count_step(model, optimize(model), data, batch_size, gathered)


def optimize(model) -> OptimWrapper:
    params = [param for param in model.parameters() if param.requires_grad]
    return OptimWrapper(torch.optim.AdamW(params))


def flops(cost: Cost) -> dict[str, tuple[int, int]]:
    """Multiply-accumulates of the forward and of the backward pass, by part."""
    return {part.name: (part.forward // 2, part.backward // 2) for part in cost.parts}


def linear(tokens: int, *widths: int) -> int:
    return sum(tokens * a * b for a, b in zip(widths, widths[1:]))


def block(tokens: int) -> tuple[int, int]:
    """Linear layers, and attention, of a transformer block."""
    return linear(tokens, WIDTH, 3 * WIDTH) + linear(tokens, WIDTH, WIDTH) + linear(
        tokens, WIDTH, 4 * WIDTH, WIDTH
    ), 2 * tokens**2 * WIDTH  # fmt: skip


def encoder(patches: int) -> tuple[int, int, int]:
    """Patch embedding, linear layers, and attention."""
    layers, attention = block(1 + patches)
    return linear(patches, PIXELS, WIDTH), 2 * layers, 2 * attention


def backward(layers: int, attention: int) -> object:
    """Weights' and inputs' gradients; the attention's kernel computes its logits once more.

    Besides, each layer scale's gradient takes a product over a weight, once a step.
    """
    return pytest.approx(2 * layers + 5 * attention // 2, rel=0.04)


def test_operations_by_hand():
    macs = flops(count())
    embedding, layers, attention = encoder(PATCHES - MASKED)
    assert macs['encoder'][0] == embedding + layers + attention
    assert macs['encoder'][1] - embedding == backward(layers, attention)  # images have none
    assert macs[TARGET] == (sum(encoder(MASKED)), 0)

    queries = linear(MASKED, WIDTH, WIDTH) * 2 + linear(MASKED, WIDTH, 4 * WIDTH, WIDTH)
    layers = 2 * (queries + linear(PATCHES, WIDTH, WIDTH) * 2)  # two blocks
    attention = 2 * 2 * MASKED * PATCHES * WIDTH
    assert macs['regressor'] == (layers + attention, backward(layers, attention))
    layers, attention = block(MASKED)
    assert macs['decoder'] == (layers + attention, backward(layers, attention))
    layers = linear(MASKED, WIDTH, VOCAB)
    assert macs['output layer'] == (layers, 2 * layers)

    D, cells = 8, (16**2, 8**2, 4**2)  # of the d-VAE's maps, its strides are 2
    convolutions = sum(n * 4**2 * c * D for n, c in zip(cells, (3, D, D)))
    residual = cells[-1] * (2 * 3**2 + 1) * D**2
    assert macs['tokenizer'] == (convolutions + residual + linear(MASKED, D, VOCAB), 0)
    assert macs['losses'] == macs[REST] == (0, 0)


def test_operations_of_the_paper():
    """An image of CAE-B, in 10^9 multiply-accumulates: shares that were counted on paper."""
    cfg = Config.fromfile(CONFIGS / 'pretrain/cae_vit-base-p16_32xb64-amp-coslr-300e_in1k.py').model
    cfg.target_generator.pop('init_cfg')
    cost = count(cfg)
    known = {'encoder': 8.4, TARGET: 8.4, 'regressor': 3.2, 'decoder': 2.8, 'output layer': 0.6}
    macs = flops(cost)
    for name, value in known.items():
        assert macs[name][0] / 1e9 == pytest.approx(value, rel=0.06), name
        assert macs[name][1] / 1e9 == pytest.approx(0 if name == TARGET else 2 * value, rel=0.07)
    tokenizer = 26 - 3.3 / 2  # half of the patches need no logits
    assert macs['tokenizer'][0] / 1e9 == pytest.approx(tokenizer, rel=0.01)
    assert cost.flops / 2e9 == pytest.approx(79, rel=0.01)
    trained = sum(part.trained for part in cost.parts)
    assert cost.gradients == pytest.approx(4 * trained, rel=1e-3)
    # with one image the peak lies in the update, beside what the largest weight needs there
    assert 8 * trained <= cost.optimizer <= 8 * (trained + 1.001 * 768 * 8192)


def test_fake_and_real_steps_cost_the_same():
    views, samples = make_batch(2)
    model = build_cae()
    real = count_step(model, optimize(model), dict(inputs=views, data_samples=samples), 2)
    fake = count(batch_size=2)
    assert flops(real) == flops(fake)
    for name in ('weights', 'optimizer', 'checkpoint'):
        assert getattr(real, name) == getattr(fake, name)
    assert real.peak == pytest.approx(fake.peak, rel=0.02)


def test_bytes_of_weights_gradients_and_states():
    cost = count(gathered=True)
    trained = sum(part.trained for part in cost.parts)
    with torch.device('meta'):
        model = MODELS.build(cae_config())
    tensors = [*model.parameters(), *model.buffers()]
    assert cost.weights == sum(tensor.nbytes for tensor in tensors)
    assert sum(part.parameters for part in cost.parts) == sum(p.numel() for p in model.parameters())
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.gradients == 4 * trained  # of the step before, which are gathered
    tensors = sum(param.requires_grad for param in model.parameters())
    assert cost.optimizer == 2 * 4 * trained + 4 * tensors  # two moments, a count
    assert cost.checkpoint == 3 * 4 * trained + 4 * tensors  # no tokenizer
    assert cost.peak == cost.weights + cost.gradients + cost.optimizer + cost.activations


def test_activations_grow_with_the_batch():
    small, middle, large = (count(batch_size=n).activations for n in (8, 16, 32))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.02)
    assert small == pytest.approx(middle - small, rel=0.1)  # little is there without images
    assert count(batch_size=16).flops == pytest.approx(2 * count(batch_size=8).flops, rel=0.01)


def test_checkpointing_computes_again_and_holds_less():
    plain, again = count(batch_size=8), count(batch_size=8, backbone=dict(with_cp=True))
    held = [{part.name: part.held for part in cost.parts} for cost in (plain, again)]
    assert held[1]['encoder'] < 0.5 * held[0]['encoder']
    blocks = 2 * sum(encoder(PATCHES - MASKED)[1:]) * 8
    assert again.flops - plain.flops == blocks


def test_shares_of_processes():
    cost = count()
    fixed = cost.weights + cost.gradients + cost.optimizer
    assert cost.sharded(1) > cost.sharded(2) > cost.sharded(10**6)
    assert cost.sharded(1) - cost.sharded(2) == fixed / 2
    assert cost.activations < cost.sharded(10**6) < cost.activations + cost.weights


def test_model_that_is_no_cae_is_split_by_its_children():
    backbone = dict(cae_config()['backbone'], out_type='avg_featmap', frozen_stages=2)
    head = dict(type='cae_mm.LinearProbeHead', num_classes=3, in_channels=WIDTH)
    cfg = dict(type='mmpretrain.ImageClassifier', backbone=backbone, head=head)
    with torch.device('meta'):
        model = MODELS.build(cfg).to('meta')
    samples = make_batch(4)[1]
    for sample in samples:
        sample.set_gt_label(1)
    data = dict(inputs=torch.zeros(4, 3, 16, 16), data_samples=samples)
    model, data = make_fake(model, data)
    macs = flops(count_step(model, optimize(model), data, 4))
    assert macs['backbone'] == (4 * sum(encoder(PATCHES)), 0)  # frozen
    assert macs['head'] == (4 * linear(1, WIDTH, 3), 4 * linear(1, WIDTH, 3))
