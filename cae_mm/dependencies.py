"""The packages cae_mm needs, what can be wrong with them and the command that mends it.

The OpenMMLab packages are published under two sets of names, by OneDL and by OpenMMLab itself
(upstream), with the same modules inside. This file uses the standard library only.
"""

import re
import sys
import warnings
from importlib import import_module, metadata
from typing import NamedTuple

PIP = f'{sys.executable} -m pip'


class Requirement(NamedTuple):
    """A distribution, its lowest version and the first one that is too new."""

    name: str
    lowest: str
    limit: str | None = None

    def __str__(self) -> str:
        return f'{self.name}>={self.lowest}' + (f',<{self.limit}' if self.limit else '')

    @property
    def installed(self) -> str | None:
        """The version installed, if any."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    def judge(self, version: str) -> str:
        """Returns ok, too old or too new; suffixes such as ``+cpu`` or ``rc1`` do not count."""
        release = _release(version)
        if release < _release(self.lowest):
            return 'too old'
        if self.limit and release >= _release(self.limit):
            return 'too new'
        return 'ok'


class Dependency(NamedTuple):
    """A module to import and the distributions, at least one of them, that provide it."""

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
        """The distributions found, with their versions."""
        candidates = (self.onedl, self.upstream)
        return {known: known.installed for known in candidates if known and known.installed}


class Problem(NamedTuple):
    """Something wrong: in a word, in a sentence, and the command that mends it."""

    state: str
    text: str
    command: str
    essential: bool = True
    cause: Exception | None = None


DEPENDENCIES = (
    Dependency('torch', Requirement('torch', '2.4')),
    Dependency('torchvision', Requirement('torchvision', '0.19')),
    Dependency('safetensors', Requirement('safetensors', '0.4')),
    Dependency(
        'mmengine',
        Requirement('onedl-mmengine', '0.10.8', '1'),
        Requirement('mmengine', '0.10.4', '1'),
    ),
    Dependency('mmcv', Requirement('onedl-mmcv', '2.3', '2.4'), Requirement('mmcv', '2.1', '2.2')),
    Dependency(
        'mmpretrain.models',  # imports all of it, with mmcv's warning that it has no operators
        Requirement('onedl-mmpretrain', '1.3', '1.4'),
        Requirement('mmpretrain', '1.2', '1.3'),
    ),
    Dependency(
        'mim',
        Requirement('onedl-mim', '0.5', '1'),
        Requirement('openmim', '0.3.9', '0.4'),
        optional=True,
    ),
    Dependency(
        'mmseg.models',
        Requirement('onedl-mmsegmentation', '1.4', '1.5'),
        Requirement('mmsegmentation', '1.2.2', '1.3'),
        optional=True,
    ),
    Dependency(
        'mmdet.models',
        Requirement('onedl-mmdetection', '3.5', '3.6'),
        Requirement('mmdet', '3.3', '3.4'),
        optional=True,
    ),
)


def check_dependencies() -> None:
    """Raises ImportError that names everything essential that is wrong, with what mends it."""
    essential = [dependency for dependency in DEPENDENCIES if not dependency.optional]
    # Metadata first: it is read in milliseconds and tells more than a failing import.
    problems = [problem for dependency in essential if (problem := find_problem(dependency))]
    problems = problems or [
        problem for dependency in essential if (problem := find_import_problem(dependency))
    ]
    if problems:
        lines = (f'  {problem.text}\n    {problem.command}' for problem in problems)
        raise ImportError(
            'cae_mm cannot be used:\n' + '\n'.join(lines) + '\n'
            'In a checkout of cae-mm, `make setup` installs versions that fit together; '
            '`python -m cae_mm.doctor` tells more.'
        ) from problems[0].cause


def find_problem(dependency: Dependency) -> Problem | None:
    """Looks at the versions installed; a missing optional dependency is no problem."""
    installed = dependency.installed
    essential = not dependency.optional
    if not installed:
        if dependency.optional:
            return None
        text = f'{dependency.package} is missing'
        return Problem('missing', text, f'{PIP} install "{_choose(dependency)}"')
    if len(installed) > 1:
        names = [requirement.name for requirement in installed]
        text = f'{" and ".join(names)} are both installed and overwrite each other'
        command = f'{PIP} uninstall -y {" ".join(names)} && {PIP} install "{dependency.onedl}"'
        return Problem('installed twice', text, command, essential)
    [(requirement, version)] = installed.items()
    state = requirement.judge(version)
    if state == 'ok':
        return None
    text = f'{requirement.name} {version} is {state}, {requirement} is needed'
    return Problem(state, text, f'{PIP} install "{requirement}"', essential)


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
        torch = _named('torch').onedl.installed or ''
        build = torch.partition('+')[2]
        index = f' --index-url https://download.pytorch.org/whl/{build}' if build else ''
        return f'{PIP} uninstall -y torchvision && {PIP} install torch=={torch} torchvision{index}'
    if 'mmcv._ext' in error:  # mmcv was built without its operators
        mmcv, version = next(iter(_named('mmcv').installed.items()))
        return (
            f'{PIP} install "setuptools>=80,<81" wheel ninja packaging && MMCV_WITH_OPS=1 {PIP} '
            'install --no-build-isolation --no-deps --no-cache-dir --force-reinstall '
            f'{mmcv.name}=={version}'
        )
    if 'pkg_resources' in error:
        return f'{PIP} install "setuptools<81"'
    [(requirement, version)] = dependency.installed.items()
    return f'{PIP} install --force-reinstall --no-deps {requirement.name}=={version}'


def _choose(dependency: Dependency) -> Requirement:
    """Returns OneDL's package, or upstream's where only upstream's packages are installed."""
    pairs = [(known.onedl, known.upstream) for known in DEPENDENCIES if known.upstream]
    any_onedl = any(onedl.installed for onedl, _ in pairs)
    any_upstream = any(upstream.installed for _, upstream in pairs)
    if dependency.upstream and any_upstream and not any_onedl:
        return dependency.upstream
    return dependency.onedl


def _named(package: str) -> Dependency:
    return next(dependency for dependency in DEPENDENCIES if dependency.package == package)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r'\d+(\.\d+)*', version)
    if match is None:
        raise ValueError(f'Not a version: {version}')
    return tuple(int(number) for number in match[0].split('.'))
