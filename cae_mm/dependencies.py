"""The packages that cae_mm needs, what can be wrong with them and the command that fixes it.

The OpenMMLab packages are published under two sets of names, by OneDL and by OpenMMLab itself
(upstream), with the same modules inside, so extras choose between them. setup.py reads the
requirements from this file, which therefore uses the standard library only.
"""

import re
import sys
import warnings
from importlib import import_module, metadata
from typing import NamedTuple

PIP = f'{sys.executable} -m pip'

_REQUIREMENTS = {
    '': """jinja2>=3.1 joblib>=1.2 matplotlib>=3.7 numpy>=1.24 pillow>=9.5 rich>=13.4
        safetensors>=0.4 scikit-learn>=1.3 torch>=2.4 torchvision>=0.19 tqdm>=4.65
        webdataset>=1.0""",
    'pretrain': """onedl-mim>=0.5,<1 onedl-mmcv>=2.3,<2.4 onedl-mmengine>=0.10.8,<1
        onedl-mmpretrain>=1.3,<1.4""",
    'segmentation': 'cae-mm[pretrain] onedl-mmsegmentation>=1.4,<1.5',
    # Both detection extras and segmentation-openmmlab need mmcv with compiled operators, which a
    # plain `pip install` does not build: see tools/setup.sh.
    'detection': 'cae-mm[pretrain] onedl-mmdetection>=3.5,<3.6',
    'pretrain-openmmlab': """openmim>=0.3.9,<0.4 mmcv>=2.1,<2.2 mmengine>=0.10.4,<1
        mmpretrain>=1.2,<1.3""",
    # mmsegmentation imports ftfy and regex without requiring them.
    'segmentation-openmmlab': 'cae-mm[pretrain-openmmlab] mmsegmentation>=1.2.2,<1.3 ftfy regex',
    'detection-openmmlab': 'cae-mm[pretrain-openmmlab] mmdet>=3.3,<3.4',
    # The photographs that the demo and the tests use.
    'demo': 'scikit-image',
    # Writing weights for timm and Hugging Face, and reading what they made.
    'export': 'onnx>=1.16 onnxruntime>=1.18 timm>=1.0.20 transformers>=4.41,<5',
    # The site that `make docs` builds, and tests of its pages.
    'docs': 'furo>=2024.8 myst-parser>=4.0 sphinx>=8.1 sphinx-copybutton>=0.5.2',
    # docs/first_encoder.md as a Jupyter notebook, by `make notebook`.
    'notebook': 'cae-mm[demo,export] ipykernel>=6.29 jupytext>=1.16 nbclient>=0.10',
    # Numbers and pictures of a run in a browser while it goes on: settings.watch.
    'watch': 'tensorboard>=2.16',
    # Maps by UMAP, in tools/picture.py.
    'umap': 'umap-learn>=0.5.12',
    # Same versions as in .pre-commit-config.yaml and constraints/.
    'dev': """cae-mm[demo,docs,export,notebook,umap,watch] hypothesis==6.168.5 mypy==2.4.1
        pre-commit==4.6.2 pytest==9.2.0 pytest-xdist==3.8.0 ruff==0.17.5""",
}
EXTRAS_REQUIRE = {extra: packages.split() for extra, packages in _REQUIREMENTS.items()}
INSTALL_REQUIRES = EXTRAS_REQUIRE.pop('')


class Requirement(str):
    """A package with its lowest version and, maybe, the first too new: ``mmcv>=2.1,<2.2``."""

    @property
    def name(self) -> str:
        """Name of the package."""
        return self.partition('>=')[0]

    @property
    def installed(self) -> str | None:
        """The version installed, if any."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    def judge(self, version: str) -> str:
        """Returns ok, too old or too new; suffixes such as ``+cpu`` or ``rc1`` do not count."""
        lowest, _, limit = self.partition('>=')[2].partition(',<')
        if _release(version) < _release(lowest):
            return 'too old'
        return 'too new' if limit and _release(version) >= _release(limit) else 'ok'


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.split(r'\.?[^\d.]', version)[0].split('.'))


class Dependency(NamedTuple):
    """A module to import and the packages, at least one of them, that provide it."""

    module: str
    onedl: Requirement
    upstream: Requirement | None = None
    optional: bool = False

    @property
    def package(self) -> str:
        """Name of the top-level package."""
        return self.module.partition('.')[0]

    @property
    def installed(self) -> dict[Requirement, str]:
        """The packages that are installed, with their versions."""
        return {known: known.installed for known in self[1:3] if known and known.installed}


_NAMED = {known.name: known for known in map(Requirement, ' '.join(_REQUIREMENTS.values()).split())}
DEPENDENCIES = (
    Dependency('torch', _NAMED['torch']),
    Dependency('torchvision', _NAMED['torchvision']),
    Dependency('safetensors', _NAMED['safetensors']),
    Dependency('mmengine', _NAMED['onedl-mmengine'], _NAMED['mmengine']),
    Dependency('mmcv', _NAMED['onedl-mmcv'], _NAMED['mmcv']),
    # .models imports all of it, with mmcv's warning that it has no operators
    Dependency('mmpretrain.models', _NAMED['onedl-mmpretrain'], _NAMED['mmpretrain']),
    Dependency('mim', _NAMED['onedl-mim'], _NAMED['openmim'], optional=True),
    Dependency(
        'mmseg.models', _NAMED['onedl-mmsegmentation'], _NAMED['mmsegmentation'], optional=True
    ),
    Dependency('mmdet.models', _NAMED['onedl-mmdetection'], _NAMED['mmdet'], optional=True),
)


class Problem(NamedTuple):
    """Something wrong: in a word, in a sentence, and the command that fixes it."""

    state: str
    text: str
    command: str
    essential: bool = True
    cause: Exception | None = None


def check_dependencies(imports: bool = True) -> None:
    """Raises ImportError that names everything essential that is wrong, with what fixes it.

    Versions, read in milliseconds, tell more than a failing import, so imports are tried last.
    """
    essential = [dependency for dependency in DEPENDENCIES if not dependency.optional]
    for find in (find_problem, find_import_problem) if imports else (find_problem,):
        problems = [problem for each in essential if (problem := find(each))]
        if problems:
            lines = (f'  {problem.text}\n    {problem.command}\n' for problem in problems)
            raise ImportError(
                f'cae_mm cannot be used:\n{"".join(lines)}'
                'In a checkout of cae-mm, `make setup` installs versions that fit together; '
                '`python -m cae_mm.doctor` tells more.'
            ) from problems[0].cause


def find_problem(dependency: Dependency) -> Problem | None:
    """Looks at the versions installed; a missing optional dependency is no problem."""
    installed, essential = dependency.installed, not dependency.optional
    if len(installed) > 1:
        names = [requirement.name for requirement in installed]
        text = f'{" and ".join(names)} are both installed and overwrite each other'
        command = f'{PIP} uninstall -y {" ".join(names)} && {PIP} install "{dependency.onedl}"'
        return Problem('installed twice', text, command, essential)
    for requirement, version in installed.items():
        if (state := requirement.judge(version)) != 'ok':
            text = f'{requirement.name} {version} is {state}, {requirement} is needed'
            return Problem(state, text, f'{PIP} install "{requirement}"', essential)
    if installed or dependency.optional:
        return None
    # OneDL's package, or upstream's where only upstream's packages are installed
    others = [known for each in DEPENDENCIES if each.upstream for known in each.installed]
    upstream = others and not any('onedl' in known for known in others)
    package = dependency.upstream if dependency.upstream and upstream else dependency.onedl
    text = f'{dependency.package} is missing'
    return Problem('missing', text, f'{PIP} install "{package}"')


def find_import_problem(dependency: Dependency) -> Problem | None:
    """Imports an installed dependency and explains the error, if there is one."""
    try:
        with warnings.catch_warnings():
            # Deprecations inside these packages, or mmcv without operators: nothing to act upon.
            warnings.simplefilter('ignore')
            import_module(dependency.module)
    except Exception as error:  # a broken binary raises almost anything
        text = f'{dependency.module} cannot be imported: {error}'
        command = _command_after(str(error), dependency)
        return Problem('cannot be imported', text, command, not dependency.optional, error)
    return None


def _command_after(error: str, dependency: Dependency) -> str:
    """Returns the command for an error known from issue trackers, else a reinstallation."""
    if 'torchvision::' in error:
        # torchvision's binary was built for another torch: another version, or CPU against CUDA.
        torch = _NAMED['torch'].installed or ''
        build = torch.partition('+')[2]
        index = f' --index-url https://download.pytorch.org/whl/{build}' if build else ''
        return f'{PIP} uninstall -y torchvision && {PIP} install torch=={torch} torchvision{index}'
    if 'pkg_resources' in error:
        return f'{PIP} install "setuptools<81"'
    prepare, options = '', ''
    if 'mmcv._ext' in error:  # mmcv was built without its operators
        [dependency] = (known for known in DEPENDENCIES if known.module == 'mmcv')
        prepare = f'{PIP} install "setuptools>=80,<81" wheel ninja packaging && MMCV_WITH_OPS=1 '
        options = ' --no-build-isolation --no-cache-dir'
    [(requirement, version)] = dependency.installed.items()
    package = f'{requirement.name}=={version}'
    return f'{prepare}{PIP} install --force-reinstall --no-deps {package}{options}'
