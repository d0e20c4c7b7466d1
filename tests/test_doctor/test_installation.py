import os
import subprocess
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cae_mm import dependencies
from cae_mm.doctor import __main__ as doctor
from cae_mm.doctor import installation
from cae_mm.precision import choose_precision

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Pretends that a distribution is not installed."""
    version = metadata.version

    def hide(hidden: str) -> None:
        def version_unless_hidden(name: str) -> str:
            if name == hidden:
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(dependencies.metadata, 'version', version_unless_hidden)

    return hide


def test_healthy_environment(capsys, tmp_path):
    assert doctor.main(['--ckpt-dir', str(tmp_path)]) == 0
    report = capsys.readouterr().out
    assert f'torch        {metadata.version("torch")}' in report
    assert 'CAEMaskGenerator' in report
    assert f'model index                 {ROOT / "model-index.yml"}' in report


def test_missing_package(capsys, without):
    without('safetensors')
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    assert 'safetensors is missing\n' in report
    assert f'{dependencies.PIP} install "safetensors>=0.4"' in report
    assert 'Registry scope' not in report


def test_optional_problem_is_listed_but_no_failure(capsys, monkeypatch):
    problem = dependencies.Problem('too old', 'mim is too old', 'pip install mim', essential=False)
    packages = [('mim', 'too old')], [problem]
    monkeypatch.setattr(installation, 'check_packages', lambda: packages)
    assert doctor.main([]) == 0
    assert 'mim is too old (optional)\n    pip install mim' in capsys.readouterr().out


def test_broken_module_of_ours(monkeypatch):
    def import_module(name: str) -> None:
        raise SyntaxError('invalid syntax')

    monkeypatch.setattr(installation, 'import_module', import_module)
    _, [problem] = installation.check_registries()
    assert problem.text == 'the scope cae_mm is not registered: invalid syntax'
    assert problem.essential


def test_devices(monkeypatch):
    current = []
    gpus = [('H100', (9, 0), 80), ('V100', (7, 0), 16)]

    @contextmanager
    def device(index):
        current.append(gpus[index])
        yield

    cuda = torch.cuda
    monkeypatch.setattr(cuda, 'device_count', lambda: len(gpus))
    monkeypatch.setattr(cuda, 'device', device)
    monkeypatch.setattr(cuda, 'get_device_name', lambda: current[-1][0])
    monkeypatch.setattr(cuda, 'get_device_capability', lambda: current[-1][1])
    properties = [SimpleNamespace(total_memory=memory * 2**30) for *_, memory in gpus]
    monkeypatch.setattr(cuda, 'get_device_properties', properties.__getitem__)
    cpu, h100, v100 = installation.check_devices()
    assert cpu == ('CPU', f'{os.cpu_count()} cores', str(choose_precision('cpu')))
    assert h100[:2] == ('GPU 0', '80 GiB') and h100[2].startswith('bfloat16: H100')
    assert v100[:2] == ('GPU 1', '16 GiB') and v100[2].startswith('float16: V100')
    gpus.clear()
    assert installation.check_devices() == [cpu]


def test_weights(tmp_path):
    assert installation.check_weights(tmp_path / 'absent') == [('none',)]
    (tmp_path / 'README.md').write_text('what belongs here')
    (tmp_path / 'dalle_encoder.pth').write_bytes(bytes(3 * 2**19))
    assert installation.check_weights(tmp_path) == [('dalle_encoder.pth', '1.5 MiB')]


def test_config_is_checked(capsys):
    config = ROOT / 'configs/pretrain/cae-rgb_vit-base-p16_32xb64-amp-coslr-300e_in1k.py'
    options = [
        '--cfg-options',
        'model.backbone.img_size=256',
        f'settings.data_root={ROOT}',
    ]
    assert doctor.main([str(config), '--gpus', '32', *options]) == 1
    report = capsys.readouterr().out
    assert report.startswith(f'{config} on 32 GPUs\nerror    ')
    assert 'the images are 224x224 pixels, but backbone.img_size is 256x256' in report
    assert f'{ROOT}/train does not exist' in report
    assert ', 0 warnings, 0 notes' in report


def test_checkpoint_is_checked(capsys, tmp_path):
    config = ROOT / 'configs/linear/vit-base-p16_cae-pre_32xb512-linear-coslr-90e_in1k.py'
    path = tmp_path / 'notes.pth'
    path.write_text('no checkpoint')
    assert doctor.main([str(config), str(path), '--gpus', '1']) == 1
    report = capsys.readouterr().out
    assert 'error    CHECKPOINT = ' in report and f'{path} was refused' in report


def test_config_needs_the_environment(capsys, without):
    without('safetensors')
    assert doctor.main(['config.py']) == 1
    report = capsys.readouterr().out
    assert 'safetensors is missing\n' in report
    assert 'config.py' not in report


def test_runs_on_a_bare_python():
    command = [sys.executable, '-S', '-m', 'cae_mm.doctor']  # -S: no site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == ''
    assert 'unknown: torch cannot be imported' in result.stdout
    assert f'mmcv is missing\n    {sys.executable} -m pip install "onedl-mmcv' in result.stdout
    result = subprocess.run([*command, 'config.py'], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, '')
    assert 'mmcv is missing' in result.stdout
