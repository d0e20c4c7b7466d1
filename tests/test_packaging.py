import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from mmpretrain.apis import ModelHub
from modelindex.load_model_index import load
from packaging.requirements import Requirement

import cae_mm.models  # noqa: F401
from cae_mm import __version__
from cae_mm.dependencies import EXTRAS_REQUIRE, INSTALL_REQUIRES
from cae_mm.model_index import find_model_index

ROOT = Path(__file__).parents[1]


def test_each_version_of_the_default_stack_has_hashes():
    """`make lock` renews them."""
    versions = (ROOT / 'constraints/onedl.txt').read_text()
    pins = re.findall(r'^([\w-]+==\S+)$', versions, re.MULTILINE)
    text = (ROOT / 'constraints/onedl-hashes.txt').read_text().replace(' \\\n', ' ')
    hashed = dict(line.split(' ', 1) for line in text.splitlines())
    assert set(pins) <= hashed.keys(), sorted(set(pins) - hashed.keys())
    names = [pin.partition('==')[0] for pin in hashed]
    assert len(names) == len(set(names))  # no other version of a package
    of_torch = ('cuda-', 'nvidia-', 'triton')  # which torch fixes
    assert all(name.startswith(of_torch) for name in set(names) - {p.split('==')[0] for p in pins})
    form = re.compile(r' +--hash=sha256:[0-9a-f]{64}( +--hash=sha256:[0-9a-f]{64})*')
    assert all(form.fullmatch(f' {hashes}') for hashes in hashed.values())


@pytest.mark.parametrize(('stack', 'suffix'), [('onedl', ''), ('openmmlab', '-openmmlab')])
def test_constraints_lie_within_the_bounds(stack, suffix):
    names = [f'{name}{suffix}' for name in ('pretrain', 'segmentation', 'detection')]
    lines = [line for name in [*names, 'demo', 'export', 'dev'] for line in EXTRAS_REQUIRE[name]]
    constraints = (ROOT / 'constraints' / f'{stack}.txt').read_text()
    pins = dict(re.findall(r'^([\w-]+)==(\S+)$', constraints, re.MULTILINE))
    for requirement in map(Requirement, INSTALL_REQUIRES + lines):
        if requirement.name != 'cae-mm':
            assert pins[requirement.name] in requirement.specifier, requirement


def test_pre_commit_uses_the_versions_of_the_dev_extra():
    text = (ROOT / '.pre-commit-config.yaml').read_text()
    [ruff] = re.findall(r'ruff-pre-commit\n\s+rev: v(\S+)', text)
    assert f'ruff=={ruff}' in EXTRAS_REQUIRE['dev']


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what goes into a build, so that no build leaves files in the checkout."""
    copy = tmp_path_factory.mktemp('project')
    for name in ('cae_mm', 'configs', 'tools'):
        shutil.copytree(ROOT / name, copy / name)
    for name in 'setup.py setup.cfg pyproject.toml model-index.yml README.md LICENSE'.split():
        shutil.copy(ROOT / name, copy)
    return copy


def build(project: Path, hook: str, target: Path) -> zipfile.ZipFile:
    """Calls a build hook of setuptools the way pip does, without network."""
    code = f'from setuptools import build_meta; build_meta.{hook}({str(target)!r})'
    subprocess.run([sys.executable, '-c', code], cwd=project, check=True, capture_output=True)
    [wheel] = target.glob(f'cae_mm-{__version__}-*.whl')
    return zipfile.ZipFile(wheel)


def test_wheel_has_requirements_and_what_mim_looks_for(project, tmp_path):
    site = tmp_path / 'site'
    with build(project, 'build_wheel', tmp_path) as wheel:
        wheel.extractall(site)
        first_folder = min(wheel.namelist()).partition('/')[0]
    [metadata] = site.glob('*.dist-info/METADATA')
    required = set(
        map(Requirement, Parser().parsestr(metadata.read_text()).get_all('Requires-Dist'))
    )
    extras = {
        f'{line}; extra == "{name}"' for name in EXTRAS_REQUIRE for line in EXTRAS_REQUIRE[name]
    }
    assert required == set(map(Requirement, {*INSTALL_REQUIRES, *extras}))

    assert (site / 'cae_mm/report/page.html').is_file()

    configs = {path.relative_to(ROOT) for path in (ROOT / 'configs').rglob('*.py')}
    # onedl-mim takes the folder of the first file by name, openmim the one named as the package.
    for mim in (site / first_folder, site / 'cae_mm' / '.mim'):
        assert (mim / 'tools' / 'train.py').is_file()
        assert {path.relative_to(mim) for path in (mim / 'configs').rglob('*.py')} == configs

    code = 'import cae_mm.model_index as m; print(m.find_model_index())'
    command = [sys.executable, '-W', 'ignore', '-c', code]
    printed = subprocess.run(command, cwd=site, check=True, capture_output=True, text=True).stdout
    # other packages may print on import, so only the last line counts
    assert printed.splitlines()[-1] == str(mim / 'model-index.yml')


def test_editable_install_copies_nothing(project, tmp_path):
    with build(project, 'build_editable', tmp_path) as wheel:
        assert not any('tools' in name for name in wheel.namelist())
    assert not (project / 'cae_mm' / '.mim').exists()


def test_models_are_known_to_mmpretrain():
    index = load(str(find_model_index()))
    index.build_models_with_collections()
    assert index.models and not index.check_errors
    for model in index.models:
        assert Path(ModelHub.get(model.name).config.filename).is_relative_to(ROOT)
