import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_mm.models.functional import DropPath, attention, scaled_linear


def saved_bytes(function) -> int:
    """Bytes that the backward pass of ``function`` keeps, each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # must live on, as the addresses of freed tensors are used again
    del result
    return sum(storages.values())


def make_branch_end(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    return x, nn.Linear(12, 6).to(dtype), torch.randn(6, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize('gelu', [False, True])
def test_scaled_linear_is_what_its_name_says(gelu):
    x, linear, gamma = make_branch_end()
    inputs = [x, linear.weight, linear.bias, gamma]

    y = scaled_linear(x, linear, gamma, gelu)
    expected = gamma * linear(F.gelu(x) if gelu else x)
    grad = torch.randn_like(y)

    assert torch.equal(y, expected)
    for actual, wanted in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    ):
        assert torch.allclose(actual, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(scaled_linear(x, linear, gamma, gelu), expected)
    assert torch.equal(scaled_linear(x, linear, None, gelu), linear(F.gelu(x) if gelu else x))


def test_scaled_linear_gives_gradients_to_those_who_want_one():
    x, linear, gamma = make_branch_end()
    linear.requires_grad_(False)
    gamma = gamma.detach()

    scaled_linear(x, linear, gamma, gelu=True).sum().backward()
    assert x.grad is not None and linear.weight.grad is None and linear.bias.grad is None

    x, linear, gamma = make_branch_end()
    scaled_linear(x.detach(), linear, gamma).sum().backward()
    assert None not in (linear.weight.grad, linear.bias.grad, gamma.grad)


def test_scaled_linear_works_with_a_gamma_of_zero():
    x, linear, gamma = make_branch_end()
    with torch.no_grad():
        gamma.zero_()
    y = linear(F.gelu(x)).detach()

    scaled_linear(x, linear, gamma, gelu=True).sum().backward()

    assert torch.allclose(gamma.grad, y.sum((0, 1)))
    assert not linear.weight.grad.any() and not x.grad.any()


def test_scaled_linear_keeps_its_input_only():
    x, linear, gamma = make_branch_end()
    parameters = 8 * (linear.weight.numel() + linear.bias.numel() + gamma.numel())

    kept = saved_bytes(lambda: scaled_linear(x, linear, gamma, gelu=True))
    plainly = saved_bytes(lambda: gamma * linear(F.gelu(x)))

    assert kept == 8 * x.numel() + parameters
    assert plainly > kept


def test_scaled_linear_under_autocast():
    x, linear, gamma = make_branch_end(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        half = x.bfloat16()
        y = scaled_linear(half, linear, gamma, gelu=True)
    with torch.autocast('cpu', torch.bfloat16):  # torch 2.4 would take the weight cast above
        expected = gamma * linear(F.gelu(half))
    inputs = [x, linear.weight, linear.bias, gamma]

    assert y.dtype == torch.float32 and torch.equal(y, expected)
    for actual, wanted in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    ):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() < 0.02 * wanted.norm()


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def make_qkv(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(2, 7, 8), (2, 9, 8), (2, 9, 8)]
    return [(2 * torch.randn(size)).bfloat16().to(dtype).requires_grad_() for size in sizes]


def test_attention_and_its_gradients_in_float64():
    q, k, v = make_qkv(torch.float64)
    y, expected = attention(q, k, v, 2), attend_by_hand(q, k, v, 2)
    assert torch.allclose(y, expected, rtol=1e-12)
    for actual, wanted in zip(
        torch.autograd.grad(y.cos().sum(), (q, k, v)),
        torch.autograd.grad(expected.cos().sum(), (q, k, v)),
    ):
        assert torch.allclose(actual, wanted, rtol=1e-10, atol=1e-12)


def test_attention_in_bfloat16_on_a_cpu():
    """Its backward pass in float32 is no worse than that of torch in bfloat16."""
    halves, exact = make_qkv(torch.bfloat16), make_qkv(torch.float64)
    grad = torch.randn(2, 7, 8).bfloat16()

    y = attention(*halves, 2)
    expected = attend_by_hand(*exact, 2)
    heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in halves]
    plain = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    assert torch.equal(y, plain)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    errors, plain_errors = (
        [
            (a.double() - b).norm() / b.norm()
            for a, b in zip(torch.autograd.grad(x, halves, grad), wanted)
        ]
        for x in (y, plain)
    )
    assert max(errors) < 0.01
    assert sum(errors) <= 1.1 * sum(plain_errors)


def test_drop_path_scales_what_it_keeps():
    torch.manual_seed(0)
    drop_path = DropPath(0.25).double().train()
    x, branch = torch.randn(2, 64, 3, 4, dtype=torch.float64)

    scales = ((drop_path(x, branch) - x) / branch).flatten(1)  # [B, N*D]

    kept = scales[:, 0] > 0.5
    assert torch.allclose(scales[kept], torch.tensor(1 / 0.75, dtype=torch.float64))
    assert not scales[~kept].any() and 5 <= (~kept).sum() <= 28
    assert torch.equal(drop_path.eval()(x, branch), x + branch)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_attention_with_a_bias_that_is_trained(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for shape in [(2, 5, 12), (2, 7, 12), (2, 7, 12), (1, 3, 5, 7)]
    )
    heads = (x.double().unflatten(-1, (3, 4)).transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads, attn_mask=bias.double())
    expected = expected.transpose(1, 2).flatten(2)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual = attention(q, k, v, 3, bias)
    assert actual.dtype == dtype
    # as near as rounding the output can be: logits and probabilities are not rounded
    tolerance = 1e-12 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(actual.shape, dtype=torch.float64, generator=generator)
    inputs = (q, k, v, bias)
    wanted = torch.autograd.grad(expected, inputs, grad)
    for x, y in zip(torch.autograd.grad(actual, inputs, grad.to(dtype)), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2 * tolerance, atol=2 * tolerance)
