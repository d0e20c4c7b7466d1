"""Which number format a device computes in: decided here for training, tokenizers and features."""

from typing import Any, NamedTuple

import torch

PRECISIONS = ('auto', 'bfloat16', 'float16', 'float32')
BF16_CAPABILITY = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16


class Precision(NamedTuple):
    """A number format for matrix products and convolutions, and why it was chosen."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f'{str(self.dtype).removeprefix("torch.")}: {self.reason}'

    def autocast(self, device_type: str) -> torch.autocast:
        """Return the context that computes in this format; float32 switches autocast off."""
        return torch.autocast(device_type, self.dtype, enabled=self.dtype != torch.float32)


def choose_precision(device_type: str | None = None, wish: str = 'auto') -> Precision:
    """Choose bfloat16 where a device has it natively, since torch emulates it everywhere else.

    Emulated it is up to a hundred times slower than float32 (measured on a CPU with AVX2 only).

    Args:
        device_type: 'cpu', 'cuda', ...; by default what torch would train on here.
        wish: 'auto', or one of the other ``PRECISIONS`` to override the choice.

    Raises:
        ValueError: If ``wish`` is unknown.
    """
    if wish not in PRECISIONS:
        raise ValueError(f"Unknown precision '{wish}': choose one of {PRECISIONS}")
    if wish != 'auto':
        return Precision(getattr(torch, wish), 'as the configuration says')
    device_type = device_type or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device_type == 'cuda':
        return _for_cuda()
    if device_type == 'cpu':
        return _for_cpu()
    return Precision(torch.float32, f'nothing is known of {device_type}')


def _for_cuda() -> Precision:
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    number = '.'.join(map(str, capability))
    if capability >= BF16_CAPABILITY:
        return Precision(torch.bfloat16, f'{name} (compute capability {number}) has it')
    reason = f'{name} (compute capability {number}) has no bfloat16; losses are scaled'
    return Precision(torch.float16, reason)


def _for_cpu() -> Precision:
    without = Precision(torch.float32, 'this CPU has no bfloat16 instructions')
    # oneDNN's answer respects ONEDNN_MAX_CPU_ISA, but is yes for any AVX-512
    onednn = torch.backends.mkldnn.is_available()
    if not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return without
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        return Precision(torch.bfloat16, 'this CPU has bfloat16 instructions')
    native: dict[str, Any] = {
        'AVX-512-BF16': getattr(torch.cpu, '_is_avx512_bf16_supported', None),
        'AMX': getattr(torch.cpu, '_is_amx_tile_supported', None),
    }
    if not all(native.values()):
        reason = f'torch {torch.__version__} cannot tell whether this CPU has bfloat16'
        return Precision(torch.float32, reason)
    names = [name for name, is_supported in native.items() if is_supported()]
    return Precision(torch.bfloat16, f'this CPU has {" and ".join(names)}') if names else without
