"""The number format of each kind of machine, and why it was chosen."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cae_mm.precision import choose_precision

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def cpu(monkeypatch):
    """Return a function that makes torch describe another CPU."""

    def pretend(capability='AVX512', onednn=True, bf16=False, amx=False, telling=True):
        monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: onednn is not None)
        operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: bool(onednn))
        monkeypatch.setattr(torch.ops, 'mkldnn', operators)
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
        answers = {'_is_avx512_bf16_supported': bf16, '_is_amx_tile_supported': amx}
        for name, answer in answers.items():
            if telling:
                monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
            else:
                monkeypatch.delattr(torch.cpu, name, raising=False)

    return pretend


@pytest.mark.parametrize(
    ('machine', 'dtype', 'reason'),
    [
        (dict(capability='AVX2', onednn=False), FP32, 'no bfloat16 instructions'),
        (dict(onednn=None), FP32, 'no bfloat16 instructions'),  # torch without oneDNN
        (dict(), FP32, 'no bfloat16 instructions'),  # AVX-512 alone: oneDNN says yes
        (dict(bf16=True), BF16, 'this CPU has AVX-512-BF16$'),
        (dict(amx=True), BF16, 'this CPU has AMX$'),
        (dict(bf16=True, amx=True), BF16, 'this CPU has AVX-512-BF16 and AMX$'),
        (dict(bf16=True, onednn=False), FP32, 'no bfloat16 instructions'),  # hidden by its limit
        (dict(telling=False), FP32, 'cannot tell whether this CPU has bfloat16'),
        (dict(capability='DEFAULT'), BF16, 'has bfloat16 instructions'),  # ARM
        (dict(capability='DEFAULT', onednn=False), FP32, 'no bfloat16 instructions'),
    ],
)
def test_cpus(cpu, machine, dtype, reason):
    cpu(**machine)
    precision = choose_precision('cpu')
    assert precision.dtype == dtype
    assert re.search(reason, precision.reason)


@pytest.mark.parametrize(
    ('capability', 'dtype', 'reason'),
    [
        ((7, 5), FP16, 'A GPU (compute capability 7.5) has no bfloat16; losses are scaled'),
        ((8, 0), BF16, 'A GPU (compute capability 8.0) has it'),
        ((9, 0), BF16, 'A GPU (compute capability 9.0) has it'),
    ],
)
def test_gpus(monkeypatch, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'A GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
    assert choose_precision('cuda') == (dtype, reason)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert choose_precision() == (dtype, reason)  # where it would train


def test_other_devices_and_wishes(cpu):
    cpu()
    assert choose_precision('npu') == (FP32, 'nothing is known of npu')
    for wish, dtype in (('bfloat16', BF16), ('float16', FP16), ('float32', FP32)):
        assert choose_precision('cpu', wish) == (dtype, 'as the configuration says')
    assert str(choose_precision('cpu', 'float16')) == 'float16: as the configuration says'
    with pytest.raises(ValueError, match="Unknown precision 'half': choose one of .*'float16'"):
        choose_precision('cpu', 'half')


@pytest.mark.parametrize('wish', ['bfloat16', 'float32'])
def test_autocast(wish):
    with torch.autocast('cpu', BF16), choose_precision('cpu', wish).autocast('cpu'):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, wish)  # float32 inside of another region, too


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == 'DEFAULT', reason='not x86-64')
def test_instructions_that_are_hidden():
    """As the environment variables hide them from torch, so from the choice."""
    code = "from cae_mm.precision import choose_precision; print(choose_precision('cpu'))"
    hiding = dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2')
    root = str(Path(__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        env=os.environ | hiding | dict(PYTHONPATH=root),
        capture_output=True,
        text=True,
    )
    assert 'float32: this CPU has no bfloat16 instructions' in result.stdout, result.stderr
