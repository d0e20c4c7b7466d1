"""Operations of transformer blocks that keep less for the backward pass, or run it faster.

Each gives the same numbers as the plain operations that it stands for; what was measured is in
benchmarks/README.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """Multi-head scaled dot-product attention by torch's fused kernels.

    Args:
        q: Queries, shape (B, M, D).
        k: Keys, shape (B, N, D).
        v: Values, like ``k``.
        num_heads: Number of heads, a divisor of D.
        bias: Added to the logits, or bool with False for keys to leave out; broadcast to
            (B, heads, M, N).

    Returns:
        Tensor with shape (B, M, D).
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    on_cpu, needs_grad = q.device.type == 'cpu', torch.is_grad_enabled() and q.requires_grad
    if on_cpu and bias is not None and bias.requires_grad:
        x = _attention_with_learned_bias(q, k, v, bias)
    elif on_cpu and q.dtype == torch.bfloat16 and bias is None and needs_grad:
        x = _BFloat16AttentionOnCPU.apply(q, k, v)
    else:
        if bias is not None and bias.is_floating_point():
            bias = bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, heads, M, D/heads]
    return x.transpose(1, 2).flatten(2)


class _BFloat16AttentionOnCPU(torch.autograd.Function):
    """Fused attention whose backward pass runs in float32.

    On CPUs torch's backward kernel is three times slower in bfloat16 than in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        tensors = (x.float() for x in (grad, q, k, v, out))
        return tuple(g.to(q.dtype) for g in backward(*tensors, lse, 0.0, False))


def _attention_with_learned_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention by plain products, with ``bias`` of shape (1, heads, M, N).

    Where a bias needs a gradient torch has no fused kernel on CPUs. What it has instead does the
    same in more operations: it scales both factors and looks for rows without any key.
    """
    B = len(q)
    dtype = torch.promote_types(q.dtype, torch.float32)  # in bfloat16 logits would be rounded
    bias = bias.to(dtype).expand(B, -1, -1, -1).flatten(0, 1)  # [B*heads, M, N]
    q_, k_, v_ = (x.to(dtype).flatten(0, 1) for x in (q, k, v))  # [B*heads, M or N, D/heads]
    with torch.autocast('cpu', enabled=False):
        logits = torch.baddbmm(bias, q_, k_.mT, alpha=q.shape[-1] ** -0.5)
        return (logits.softmax(-1) @ v_).unflatten(0, (B, -1)).to(q.dtype)


def scaled_linear(x: Tensor, linear: nn.Linear, gamma: Tensor | None, gelu: bool = False) -> Tensor:
    """``gamma * linear(x)``, or ``gamma * linear(gelu(x))``: the end of a residual branch.

    For the backward pass only ``x`` is kept, not the output of GELU, which is computed again, nor
    that of ``linear``: the gradient of ``gamma`` follows from that of the weight.

    Args:
        x: Shape (..., K), in the format that ``linear`` is to compute in.
        linear: From width K to D, with bias.
        gamma: Layer scale, shape (D,), or None for none.
        gelu: Whether GELU comes before ``linear``.
    """
    if gamma is not None and torch.is_grad_enabled() and is_plain(linear):
        return _ScaledLinear.apply(x, linear.weight, linear.bias, gamma, gelu)
    y = linear(F.gelu(x) if gelu else x)
    return y if gamma is None else gamma * y


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is its weight and bias and no more, as adapters such as LoRA's are not.

    Hooks make no difference: a step that is looked into has to give the same numbers.
    """
    return type(linear) is nn.Linear


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, gelu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gamma)
        ctx.gelu = gelu
        return gamma * F.linear(F.gelu(x) if gelu else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gamma = ctx.saved_tensors
        for_x, *for_parameters = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = grad_gamma = None
        if for_x:
            grad_x = (grad * gamma).to(x.dtype) @ weight.to(x.dtype)
            grad_x = torch.ops.aten.gelu_backward(grad_x, x) if ctx.gelu else grad_x
        if any(for_parameters):
            y = (F.gelu(x) if ctx.gelu else x).flatten(0, -2)  # [L, K]
            grad = grad.flatten(0, -2)  # [L, D]
            scaled_weight = (grad.to(x.dtype).T @ y).to(gamma.dtype)  # of gamma * weight, [D, K]
            scaled_bias = grad.sum(0)
            grad_gamma = torch.linalg.vecdot(scaled_weight, weight) + scaled_bias * bias
            grad_weight = scaled_weight.mul_(gamma[:, None])
            grad_bias = scaled_bias * gamma
        return grad_x, grad_weight, grad_bias, grad_gamma, None


class DropPath(nn.Module):
    """Residual connection that leaves out the branch of an image at random while training.

    Args:
        drop_prob: Probability to leave it out; other branches grow in proportion.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add ``branch`` to ``x``, both of shape (B, N, D)."""
        if not (self.training and self.drop_prob):
            return x + branch
        keep = 1 - self.drop_prob
        scale = torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device)
        return torch.addcmul(x, branch, (scale + keep).floor_().div_(keep))
