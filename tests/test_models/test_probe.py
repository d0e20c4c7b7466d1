"""Probe heads: what they compute, what learns, and that evaluation looks at one image at a time."""

import math

import official_reference as official
import pytest
import torch
from builders import close, randomize
from mmengine.registry import MODELS
from mmpretrain.evaluation import Accuracy
from mmpretrain.structures import DataSample

from cae_mm.models import AttentiveProbeHead, LinearProbeHead

WIDTH, HEADS, CLASSES = 16, 2, 5
LINEAR = dict(type='cae_mm.LinearProbeHead', num_classes=CLASSES, in_channels=WIDTH)
ATTENTIVE = LINEAR | dict(type='cae_mm.AttentiveProbeHead', num_heads=HEADS)
PROBES = [pytest.param('cls_token', LINEAR, id='linear'), pytest.param('raw', ATTENTIVE, id='attn')]


def build(out_type, head):
    """A probe on a frozen toy encoder that is in no special state."""
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor', num_classes=CLASSES),
            backbone=dict(
                type='cae_mm.CAEViT',
                arch=dict(embed_dims=WIDTH, depth=2, num_heads=HEADS, layer_scale=0.1),
                img_size=16,
                patch_size=4,
                drop_path_rate=0.5,
                out_type=out_type,
                frozen_stages=2,
            ),
            head=head,
        )
    )
    model.init_weights()
    return randomize(model)


def batch(size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    return images, [DataSample().set_gt_label(i % CLASSES) for i in range(size)]


def test_linear_probe_is_batch_norm_without_affine_and_a_linear_layer():
    head = LinearProbeHead(num_classes=CLASSES, in_channels=WIDTH).double().train()
    x = torch.randn(8, WIDTH, dtype=torch.float64) * 3 + 1
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    expected = normed @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(head((x,)), expected, rtol=1e-12, atol=1e-12)
    assert [name for name, _ in head.named_parameters()] == ['fc.weight', 'fc.bias']


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    head = LinearProbeHead(num_classes=CLASSES, in_channels=WIDTH).double().train()
    x = torch.randn(8, WIDTH, dtype=torch.float64) * 3 + 1
    head((x,))
    mean, var = 0.1 * x.mean(0), 0.9 + 0.1 * x.var(0)  # momentum 0.1 from 0 and 1
    head.eval()
    other = torch.randn(3, WIDTH, dtype=torch.float64)
    normed = (other - mean) / (var + 1e-6).sqrt()
    expected = normed @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(head((other,)), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head.norm.running_mean.double(), mean, rtol=1e-6, atol=1e-6)


def test_attentive_probe_head_by_head():
    head = AttentiveProbeHead(num_classes=CLASSES, in_channels=WIDTH, num_heads=HEADS)
    head = randomize(head.double(), std=0.5).eval()
    tokens = torch.randn(2, 1 + 6, WIDTH, dtype=torch.float64)
    q, k, v = (
        official.layer_norm(x, head.state_dict(), name)
        for name, x in (
            ('norm_q', head.query_token),
            ('norm_k', tokens[:, 1:]),
            ('norm_v', tokens[:, 1:]),
        )
    )
    pooled = official.attend(head.attn.q(q), head.attn.k(k), head.attn.v(v), HEADS)[:, 0]
    expected = head.fc(head.attn.proj(pooled) / math.sqrt(1 + 1e-6))  # statistics 0 and 1
    close(head((tokens,)), expected)


def test_attentive_probe_does_not_see_the_class_token():
    model = build('raw', ATTENTIVE).eval()
    tokens = torch.randn(2, 17, WIDTH)
    changed = tokens.clone()
    changed[:, 0] += 1
    assert torch.equal(model.head((tokens,)), model.head((changed,)))
    changed[:, 1] += 1
    assert not torch.equal(model.head((tokens,)), model.head((changed,)))


@pytest.mark.parametrize(('out_type', 'head'), PROBES)
def test_only_the_head_learns_and_the_encoder_stays_in_eval_mode(out_type, head):
    model = build(out_type, head).train()
    assert not any(m.training for block in model.backbone.blocks for m in block.modules())
    images, samples = batch()
    first = model.backbone(images)[-1]
    assert torch.equal(first, model.backbone(images)[-1])  # no drop path
    model(images, samples, mode='loss')['loss'].backward()
    for name, param in model.named_parameters():
        if name.startswith('backbone.'):
            assert param.grad is None and not param.requires_grad, name
        elif name not in ('head.norm_k.bias', 'head.attn.proj.bias'):  # shifts that cancel out
            assert param.grad.abs().sum() > 0, name


@pytest.mark.parametrize(('out_type', 'head'), PROBES)
def test_evaluation_does_not_depend_on_batch_size_or_order(out_type, head):
    model = build(out_type, head).train()
    images, samples = batch()
    for seed in range(3):
        model(batch(seed=seed)[0], samples, mode='loss')  # statistics that are not 0 and 1
    model.eval()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def evaluate(order, size):
        accuracy, scores = Accuracy(), torch.zeros(len(order), CLASSES)
        for ids in torch.tensor(order).split(size):
            found = model(images[ids], [samples[i] for i in ids], mode='predict')
            accuracy.process({}, [sample.to_dict() for sample in found])
            scores[ids] = torch.stack([sample.pred_score for sample in found])
        return accuracy.evaluate(len(order)), scores

    metrics, scores = evaluate(list(range(12)), 4)
    shuffled = [7, 1, 9, 3, 0, 11, 2, 10, 4, 8, 5, 6]
    for order, size in ((shuffled, 4), (shuffled, 12), (shuffled, 5), (shuffled, 1)):
        other_metrics, other = evaluate(order, size)
        assert other_metrics == metrics
        # the same to the last bit, but where BLAS takes another kernel for so few rows
        tolerance = 0.0 if size == 4 else 1e-6
        torch.testing.assert_close(other, scores, rtol=tolerance, atol=0)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_heads_under_autocast_and_in_half_precision():
    for out_type, head in (('cls_token', LINEAR), ('raw', ATTENTIVE)):
        model = build(out_type, head).train()
        images, samples = batch()
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(images, samples, mode='loss')['loss']
        assert loss.isfinite()
        assert model.head.norm.running_mean.dtype == torch.float32


def test_initialisation():
    torch.manual_seed(0)
    head = MODELS.build(ATTENTIVE | dict(num_classes=100, in_channels=64, num_heads=2))
    head.init_weights()
    assert head.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not head.fc.bias.any() and not head.query_token.any()
    for name, param in head.attn.named_parameters():
        std = 0.0 if name.endswith('bias') else 0.02  # official, of any width
        assert param.std().item() == pytest.approx(std, rel=0.1), name


def test_head_count_must_divide_the_width():
    with pytest.raises(ValueError, match='width of 16 cannot be split into 3 heads'):
        AttentiveProbeHead(num_classes=2, in_channels=16, num_heads=3)
