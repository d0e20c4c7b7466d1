import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cae_mm.evaluation import attentive
from cae_mm.evaluation.attentive import attentive_sweep, pool, train_heads
from cae_mm.models.probe import AttentiveProbeHead

CPU = torch.device('cpu')
N, D = 5, 128  # patches, width: two heads


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(attentive, 'BATCH_SIZE', 32)


def make_split(seed, num=120):
    """Three classes that one patch of each image tells, always another one."""
    rng = np.random.default_rng(seed)
    signs = np.random.default_rng(9).normal(size=(3, D))
    labels = rng.integers(3, size=num)
    tokens = rng.normal(size=(num, N, D))
    tokens[np.arange(num), rng.integers(N, size=num)] += 2 * signs[labels]
    return tokens.astype(np.float32), labels


def make_head(seed):
    torch.manual_seed(seed)
    head = AttentiveProbeHead(num_classes=3, in_channels=D, num_heads=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def test_pooling_is_that_of_the_head():
    heads, tokens = [make_head(1), make_head(2)], torch.randn(7, N, D)
    for head, pooled in zip(heads, pool(heads, tokens)):
        with_class_token = torch.cat([torch.zeros(7, 1, D), tokens], dim=1)
        head.norm.eval()  # statistics of no batch: mean 0, variance 1
        expected = head.pre_logits((with_class_token,))
        torch.testing.assert_close(head.norm(pooled), expected, rtol=1e-4, atol=1e-5)


def test_a_sweep_is_one_training_of_the_head_for_each_rate():
    tokens, labels = make_split(0)
    rows, lrs = np.arange(96), (0.01, 0.1)
    trained = train_heads(tokens, labels, rows, lrs, seed=3, epochs=2, device=CPU)
    for head, lr in zip(trained, lrs):
        torch.manual_seed(3)
        alone = AttentiveProbeHead(num_classes=3, in_channels=D, num_heads=2)
        alone.init_weights()
        generator = torch.Generator().manual_seed(3)
        optimizer = torch.optim.SGD(alone.parameters(), lr=lr, momentum=0.9)
        for epoch in range(2):
            for i, part in enumerate(torch.randperm(96, generator=generator).split(32)):
                step = 3 * epoch + i
                optimizer.param_groups[0]['lr'] = lr * (1 + np.cos(np.pi * step / 6)) / 2
                x = F.pad(torch.from_numpy(tokens)[part], (0, 0, 1, 0))
                optimizer.zero_grad()
                scores = alone.fc(alone.pre_logits((x,)))
                F.cross_entropy(scores, torch.from_numpy(labels)[part]).backward()
                optimizer.step()
        trained_weights = head.state_dict()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(trained_weights[name], value, rtol=1e-3, atol=1e-4)


def test_it_finds_the_patch_that_tells_the_class():
    train, val = make_split(1, 400), make_split(2)
    report = attentive_sweep(train, val, seed=0, device=CPU, epochs=15, lrs=(1e-6, 0.03))
    assert report['lr'] == 0.03 and report['accuracy'] > 0.85
    assert report['held_out'][1e-6] < 0.6 < report['held_out'][0.03]


def test_validation_has_no_say_and_random_numbers_are_its_own():
    train, val = make_split(1), make_split(2)
    state = torch.get_rng_state()
    options = dict(seed=0, device=CPU, epochs=2, lrs=(0.01, 0.1))
    first = attentive_sweep(train, val, **options)
    assert torch.equal(torch.get_rng_state(), state)
    other = attentive_sweep(train, (val[0], 2 - val[1]), **options)
    assert (first['lr'], first['held_out']) == (other['lr'], other['held_out'])
    assert attentive_sweep(train, val, **options) == first


def test_a_picked_rate_that_falls_over_with_all_images_is_not_taken(monkeypatch):
    train, val, lrs = make_split(1, 400), make_split(2), (1e-6, 0.003, 0.03)
    options = dict(seed=0, device=CPU, epochs=15, lrs=lrs)
    usual = attentive_sweep(train, val, **options)
    assert usual['lr'] == 0.003 and usual['accuracy'] > 0.85
    fitted = []

    def fall_over(tokens, labels, rows, lrs, **options):
        heads = train_heads(tokens, labels, rows, lrs, **options)
        if [usual['lr']] == lrs:
            torch.nn.init.zeros_(heads[0].fc.weight)
        fitted.append([*lrs])
        return heads

    monkeypatch.setattr(attentive, 'train_heads', fall_over)
    report = attentive_sweep(train, val, **options)
    assert fitted == [[1e-6, 0.003, 0.03], [0.003], [1e-6]]
    assert report['lr'] == 1e-6 and report['held_out'] == usual['held_out']


def test_a_rate_that_diverges_leaves_the_others_alone():
    tokens, labels = make_split(0)
    options = dict(seed=0, epochs=2, device=CPU)
    alone = train_heads(tokens, labels, np.arange(96), [0.03], **options)[0]
    beside = train_heads(tokens, labels, np.arange(96), [0.03, 1e30], **options)
    assert not torch.isfinite(beside[1].fc.weight).all()
    torch.testing.assert_close(beside[0].fc.weight, alone.fc.weight)


def test_a_batch_of_one_is_no_batch():
    tokens, labels = make_split(0)
    [head] = train_heads(tokens, labels, np.arange(65), [0.03], seed=0, epochs=1, device=CPU)
    assert head.norm.num_batches_tracked == 2
