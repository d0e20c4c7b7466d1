import math

import pytest
import torch

from cae_mm.models import CAEPretrainHead
from cae_mm.models.head import latent_std

B, M, K, D = 2, 3, 5, 4
CELLS = torch.tensor([[0, 2, 5], [2, 3, 5]]), 6


def loss(*args, weight=2.0):
    return CAEPretrainHead(weight).loss(*args)


@pytest.fixture
def latents():
    torch.manual_seed(0)
    return torch.randn(B, M, D), torch.randn(B, M, D)


def test_uniform_logits_cost_log_k_and_equal_latents_nothing(latents):
    tokens = torch.randint(K, (B, M))
    losses = loss(torch.zeros(B, M, K), tokens, latents[0], latents[0])
    assert losses['loss_main'].item() == pytest.approx(math.log(K))
    assert losses['loss_align'].item() == 0
    assert losses['align_cos'].item() == pytest.approx(1)


@pytest.mark.parametrize('weight', [1.0, 1.5, 2.0])
def test_alignment_is_lambda_times_the_mean_over_all_elements(latents, weight):
    z, target = latents
    losses = loss(
        torch.zeros(B, M, K), torch.zeros(B, M, dtype=torch.long), z, target, weight=weight
    )
    squares = [(a - b) ** 2 for a, b in zip(z.flatten().tolist(), target.flatten().tolist())]
    assert losses['loss_align'].item() == pytest.approx(weight * sum(squares) / (B * M * D))


def test_lambda_is_the_papers_by_default():
    assert CAEPretrainHead().align_weight == 2.0


def test_metrics(latents):
    tokens = torch.tensor([[0, 0, 1], [4, 4, 4]])
    logits = torch.zeros(B, M, K)
    logits[..., 4] = 1  # always guess 4: right 3 times of 6
    metrics = loss(logits, tokens, *latents)
    assert metrics['token_acc'].item() == pytest.approx(0.5)
    assert metrics['target_codes'].item() == 3
    cos = torch.nn.functional.cosine_similarity(*latents, dim=-1).mean()
    torch.testing.assert_close(metrics['align_cos'], cos)


def test_pixels_are_compared_by_mean_squared_error(latents):
    y, target = torch.randn(B, M, K), torch.randn(B, M, K)
    losses = loss(y, target, *latents)
    torch.testing.assert_close(losses['loss_main'], ((y - target) ** 2).mean())
    assert 'token_acc' not in losses and 'target_codes' not in losses


def test_half_precision_is_computed_in_float32(latents):
    logits = torch.randn(B, M, K).bfloat16()
    tokens = torch.randint(K, (B, M))
    half = loss(logits, tokens, *(z.bfloat16() for z in latents))
    full = loss(logits.float(), tokens, *(z.bfloat16().float() for z in latents))
    for name in ('loss_main', 'loss_align'):
        assert half[name].dtype == torch.float32
        assert torch.equal(half[name], full[name])


def test_target_latents_and_metrics_get_no_gradient(latents):
    z, target = (z.requires_grad_() for z in latents)
    losses = loss(torch.zeros(B, M, K), torch.zeros(B, M, dtype=torch.long), z, target)
    losses['loss_align'].backward()
    assert z.grad is not None and target.grad is None
    assert not any(losses[k].requires_grad for k in losses if 'loss' not in k)


def test_wrong_size_of_pixel_targets_is_named(latents):
    with pytest.raises(ValueError, match='predicts 5 values per patch, the targets have 7: set'):
        loss(torch.zeros(B, M, 5), torch.zeros(B, M, 7), *latents)


def test_latent_std_compares_equal_places():
    """Patches 2 and 5 are masked in both images: the deviation of those two, by numpy's formula."""
    z = torch.randn(B, M, D)
    pairs = torch.stack([z[0, [1, 2]], z[1, [0, 2]]])  # [image, patch 2 or 5, D]
    torch.testing.assert_close(latent_std(z, *CELLS), pairs.std(0, correction=0).mean())


def test_latent_std_is_0_where_latents_tell_positions_only():
    table = torch.randn(6, D)
    assert latent_std(table[CELLS[0]], *CELLS) < 1e-6
    assert latent_std(torch.randn(B, M, D), torch.tensor([[0, 1, 2], [3, 4, 5]]), 6) == 0
