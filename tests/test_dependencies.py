import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from cae_mm import dependencies
from cae_mm.dependencies import PIP, Requirement, check_dependencies

ROOT = Path(__file__).parents[1]
COMMON = {'torch': '2.11.0', 'torchvision': '0.26.0', 'safetensors': '0.8.0'}
ONEDL = COMMON | {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmpretrain': '1.3.6',
}
UPSTREAM = COMMON | {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmpretrain': '1.2.0'}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that exactly these versions are installed and that modules fail as told."""

    def pretend(versions: dict[str, str], errors: dict[str, Exception] | None = None) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        def import_module(name: str) -> None:
            if errors and name in errors:
                raise errors[name]

        monkeypatch.setattr(dependencies.metadata, 'version', version)
        monkeypatch.setattr(dependencies, 'import_module', import_module)

    return pretend


def message_of_check() -> str:
    with pytest.raises(ImportError) as caught:
        check_dependencies()
    return str(caught.value)


@pytest.mark.parametrize('versions', [ONEDL, UPSTREAM])
def test_either_stack_passes(environment, versions):
    environment(versions)
    check_dependencies()


@pytest.mark.parametrize(
    ('version', 'state'),
    [
        ('2.2.9', 'too old'),
        ('2.3', 'ok'),
        ('2.3.0rc1', 'ok'),
        ('2.3.6+cpu', 'ok'),
        ('2.4.0', 'too new'),
        ('10.0', 'too new'),
    ],
)
def test_bounds(version, state):
    assert Requirement('onedl-mmcv', '2.3', '2.4').judge(version) == state


def test_no_limit():
    requirement = Requirement('torch', '2.4')
    assert str(requirement) == 'torch>=2.4'
    assert requirement.judge('11.0') == 'ok'


def test_all_missing_packages_are_named_at_once(environment):
    environment({'torch': '2.11.0', 'torchvision': '0.26.0'})
    message = message_of_check()
    assert f'safetensors is missing\n    {PIP} install "safetensors>=0.4"' in message
    assert f'mmcv is missing\n    {PIP} install "onedl-mmcv>=2.3,<2.4"' in message
    assert 'make setup' in message
    assert 'mmdet' not in message


def test_upstream_environment_gets_upstream_names(environment):
    environment({name: version for name, version in UPSTREAM.items() if name != 'mmcv'})
    assert f'{PIP} install "mmcv>=2.1,<2.2"' in message_of_check()


def test_version_out_of_bounds(environment):
    environment(ONEDL | {'onedl-mmpretrain': '1.4.0'})
    message = message_of_check()
    assert 'onedl-mmpretrain 1.4.0 is too new, onedl-mmpretrain>=1.3,<1.4 is needed' in message
    assert f'{PIP} install "onedl-mmpretrain>=1.3,<1.4"' in message


def test_both_stacks_in_one_environment(environment):
    environment(ONEDL | {'mmcv': '2.1.0'})
    message = message_of_check()
    assert 'onedl-mmcv and mmcv are both installed' in message
    assert f'{PIP} uninstall -y onedl-mmcv mmcv && {PIP} install "onedl-mmcv>=2.3,<2.4"' in message


def test_wrong_optional_package_does_not_stop_the_import(environment):
    environment(ONEDL | {'onedl-mmdetection': '3.0'})
    check_dependencies()


@pytest.mark.parametrize(
    ('torch', 'remedy'),
    [
        ('2.11.0', 'torch==2.11.0 torchvision'),
        (
            '2.11.0+cpu',
            'torch==2.11.0+cpu torchvision --index-url https://download.pytorch.org/whl/cpu',
        ),
    ],
)
def test_torchvision_of_another_torch(environment, torch, remedy):
    error = RuntimeError('operator torchvision::nms does not exist')
    environment(ONEDL | {'torch': torch}, {'torchvision': error})
    with pytest.raises(ImportError, match='torchvision cannot be imported') as caught:
        check_dependencies()
    assert f'{PIP} uninstall -y torchvision && {PIP} install {remedy}\n' in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ('error', 'remedy'),
    [
        ("No module named 'mmcv._ext'", '--no-cache-dir --force-reinstall onedl-mmcv==2.3.6'),
        ("No module named 'pkg_resources'", f'{PIP} install "setuptools<81"'),
        ('libc is broken', f'{PIP} install --force-reinstall --no-deps onedl-mmpretrain==1.3.6'),
    ],
)
def test_import_errors_come_with_a_command(environment, error, remedy):
    environment(ONEDL, {'mmpretrain.models': ImportError(error)})
    message = message_of_check()
    assert f'mmpretrain.models cannot be imported: {error}' in message
    assert remedy in message


def test_import_on_a_bare_python():
    command = [sys.executable, '-S', '-c', 'import cae_mm']  # -S: no site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'ImportError: cae_mm cannot be used:\n  torch is missing' in result.stderr
