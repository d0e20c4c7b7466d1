import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from cae_mm import dependencies
from cae_mm.dependencies import PIP, Requirement, check_dependencies

ROOT = Path(__file__).parents[1]
TORCH = {'torch': '2.11.0', 'torchvision': '0.26.0'}
COMMON = TORCH | {'safetensors': '0.8.0'}
ONEDL = COMMON | {'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmpretrain': '1.3.6'}
UPSTREAM = COMMON | {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmpretrain': '1.2.0'}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that exactly these versions are installed and that mmpretrain fails as told."""

    def pretend(versions: dict[str, str | None], error: Exception | None = None) -> None:
        def version(name: str) -> str:
            if versions.get(name) is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        def import_module(name: str) -> None:
            if error and name == 'mmpretrain.models':
                raise error

        monkeypatch.setattr(dependencies.metadata, 'version', version)
        monkeypatch.setattr(dependencies, 'import_module', import_module)

    return pretend


@pytest.mark.parametrize(
    'versions',
    [ONEDL, UPSTREAM, ONEDL | {'onedl-mmdetection': '3.0'}],
    ids=['onedl', 'upstream', 'wrong optional package'],
)
def test_usable_environments_pass(environment, versions):
    environment(versions)
    check_dependencies()


@pytest.mark.parametrize(
    ('state', 'versions'),
    [
        ('too old', ['1.10', '2.2.9']),
        ('ok', ['2.3', '2.3.0rc1', '2.3.dev1', '2.3.6+cpu', '2.3.10']),
        ('too new', ['2.4', '2.4.0', '10.0']),
    ],
)
def test_bounds(state, versions):
    assert {Requirement('mmcv>=2.3,<2.4').judge(version) for version in versions} == {state}
    assert Requirement('torch>=2.4').judge('11.0') == 'ok'  # no limit


@pytest.mark.parametrize(
    ('versions', 'text', 'command'),
    [
        (TORCH, 'safetensors is missing', 'install "safetensors>=0.4"'),
        (TORCH, 'mmcv is missing', 'install "onedl-mmcv>=2.3,<2.4"'),
        (UPSTREAM | {'mmcv': None}, 'mmcv is missing', 'install "mmcv>=2.1,<2.2"'),
        (
            ONEDL | {'onedl-mmpretrain': '1.4.0'},
            'onedl-mmpretrain 1.4.0 is too new, onedl-mmpretrain>=1.3,<1.4 is needed',
            'install "onedl-mmpretrain>=1.3,<1.4"',
        ),
        (
            ONEDL | {'mmcv': '2.1.0'},
            'onedl-mmcv and mmcv are both installed and overwrite each other',
            f'uninstall -y onedl-mmcv mmcv && {PIP} install "onedl-mmcv>=2.3,<2.4"',
        ),
    ],
)
def test_problems_come_with_a_command(environment, versions, text, command):
    environment(versions)
    with pytest.raises(ImportError) as caught:
        check_dependencies(imports=False)
    message = str(caught.value)
    assert f'  {text}\n    {PIP} {command}\n' in message
    assert 'make setup' in message and 'mmdet' not in message


TORCHVISION = f'uninstall -y torchvision && {PIP} install torch==2.11.0'
CPU = '--index-url https://download.pytorch.org/whl/cpu'


@pytest.mark.parametrize(
    ('build', 'error', 'command'),
    [
        ('', 'torchvision::nms does not exist', f'{TORCHVISION} torchvision\n'),
        ('+cpu', 'torchvision::nms does not exist', f'{TORCHVISION}+cpu torchvision {CPU}\n'),
        ('', "No module named 'mmcv._ext'", 'install "setuptools>=80,<81" wheel ninja packaging'),
        ('', "No module named 'mmcv._ext'", '--no-deps onedl-mmcv==2.3.6 --no-build-isolation'),
        ('', "No module named 'pkg_resources'", 'install "setuptools<81"'),
        ('', 'libc is broken', 'install --force-reinstall --no-deps onedl-mmpretrain==1.3.6\n'),
    ],
)
def test_import_errors_come_with_a_command(environment, build, error, command):
    broken = ImportError(error)
    environment(ONEDL | {'torch': f'2.11.0{build}'}, broken)
    check_dependencies(imports=False)
    with pytest.raises(ImportError) as caught:
        check_dependencies()
    assert f'mmpretrain.models cannot be imported: {error}\n    {PIP}' in str(caught.value)
    assert command in str(caught.value)
    assert caught.value.__cause__ is broken


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_import_without_packages_warns_and_the_registry_raises():
    result = run('-S', '-c', 'import cae_mm; import cae_mm.registry')  # -S: no site-packages
    warning, error = result.stderr.split('Traceback')
    assert 'UserWarning: cae_mm cannot be used:\n  torch is missing' in warning
    assert 'ImportError: cae_mm cannot be used:\n  torch is missing' in error


def test_import_is_light():
    result = run('-c', 'import cae_mm, sys; print(*sys.modules)')
    assert result.stderr == ''
    assert not {'mmengine', 'mmpretrain', 'torch'} & set(result.stdout.split())
