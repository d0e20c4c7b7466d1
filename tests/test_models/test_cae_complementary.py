"""Complementary masks against separate passes of a mask and of its complement."""

import pytest
import torch
from builders import build_cae, close, make_batch, randomize
from mmpretrain.structures import DataSample

RGB = dict(neck=dict(out_dims=48), target_generator=dict(type='cae_mm.RGBTarget'))
TARGETS = [pytest.param({}, id='tokens'), pytest.param(RGB, id='pixels')]


def build(**changes):
    """A model in float64 with drop path 0, none of whose parameters is 0 or 1."""
    return randomize(build_cae(**changes)).double().train()


def inputs(masked):
    """Two views in float64, samples with masks, and samples with their complements."""
    views, samples = make_batch(masked=masked)
    complements = [DataSample(mask=~sample.mask) for sample in samples]
    return [view.double() for view in views], samples, complements


def losses_and_gradients(model, views, samples):
    model.zero_grad()
    losses = model(views, samples, mode='loss')
    (losses['loss_main'] + losses['loss_align']).backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    return {k: v.detach() for k, v in losses.items() if 'loss' in k}, gradients


@pytest.mark.parametrize('masked', [8, 5])
@pytest.mark.parametrize('changes', TARGETS)
def test_is_the_mean_of_two_separate_passes(changes, masked):
    """Losses and every gradient: also that targets get none, and are the right ones."""
    views, samples, complements = inputs(masked)
    separate = build(**changes)
    one = losses_and_gradients(separate, views, samples)
    other = losses_and_gradients(separate, views, complements)
    both = losses_and_gradients(build(**changes, complementary_masks=True), views, samples)
    for got, a, b in zip(both, one, other, strict=True):
        close(got, {name: (a[name] + b[name]) / 2 for name in a})
    assert abs(one[0]['loss_main'] - other[0]['loss_main']) > 1e-3  # nor are they alike


@pytest.mark.parametrize('changes', TARGETS)
def test_half_masked_is_a_batch_of_twice_the_samples(changes):
    """Metrics too, which count over the whole batch."""
    views, samples, complements = inputs(masked=8)
    twice = [torch.cat([view, view]) for view in views]
    large = build(**changes)(twice, samples + complements, mode='loss')
    close(build(**changes, complementary_masks=True)(views, samples, mode='loss'), large)


@pytest.mark.parametrize(('masked', 'passes'), [(8, [6]), (5, [3, 3])])
def test_each_patch_is_tokenized_once_and_encoded_once(monkeypatch, masked, passes):
    model, tokenized, classified, encoded = build(complementary_masks=True), [], [], []
    for module, method, sizes in [
        (model.target_generator, 'encode_features', tokenized),
        (model.target_generator, 'classify', classified),
        (model.backbone, 'forward_features', encoded),
    ]:
        original = getattr(module, method)

        def count(*args, sizes=sizes, original=original):
            sizes.append(len(args[0]))
            return original(*args)

        monkeypatch.setattr(module, method, count)
    views, samples, _ = inputs(masked)
    model(views, samples, mode='loss')
    assert (tokenized, classified, encoded) == ([3], [3], passes)


def test_every_parameter_gets_a_gradient_under_autocast():
    """Whose cache must not hold weights that were cast without gradient."""
    model = build_cae(complementary_masks=True).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(*make_batch(), mode='loss')
    (losses['loss_main'] + losses['loss_align']).backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name


def test_a_teacher_is_refused():
    with pytest.raises(ValueError, match='complementary_masks .* teacher_momentum .* choose one'):
        build_cae(complementary_masks=True, teacher_momentum=0.99)
