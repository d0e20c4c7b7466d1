#!/usr/bin/env bash
# Builds wheel and sdist into dist/, and uses them as a stranger would; `make release-check` calls this.
#
#   release_check.sh PYTHON     the interpreter of `make setup`
#   DEPENDENCIES                pypi: all packages are installed anew (gigabytes), borrowed: those of PYTHON serve
#
# The environment is new, nothing of this checkout is in it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=build/release
export PIP_CONSTRAINT=$PWD/constraints/onedl.txt PIP_BUILD_CONSTRAINT=$PWD/constraints/onedl.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1
rm -rf "$venv" dist
"$1" -m venv "$venv"
python=$PWD/$venv/bin/python
version=$(sed -n "s/^__version__ = '\(.*\)'/\1/p" cae_mm/version.py)

grep -q "^## $version$" CHANGELOG.md || { echo "CHANGELOG.md has no section $version" >&2; exit 1; }
grep -q "^version: $version$" CITATION.cff || { echo "CITATION.cff is not of $version" >&2; exit 1; }

"$python" -m pip install --quiet pip setuptools wheel build twine
"$python" -m build --no-isolation .  # the wheel is made of the sdist
"$python" -m twine check --strict dist/*

wheel=dist/cae_mm-$version-py3-none-any.whl
if [[ ${DEPENDENCIES:-pypi} == borrowed ]]; then
  # a path in a .pth file: the editable install there, which is a .pth file too, is not seen
  site='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$1" -c "$site" >"$("$python" -c "$site")/borrowed.pth"
  "$python" -m pip install --quiet --no-deps "$wheel"
else
  "$python" -m pip install --quiet torch torchvision
  "$python" -m pip install --quiet "$wheel[pretrain]"
fi
cd "$venv"  # from here the checkout cannot be seen
"$python" -m cae_mm.doctor --help >/dev/null
"$python" -m cae_mm.doctor
"$python" -W ignore - <<'CODE'
import mmpretrain
from mmengine.config import Config

import cae_mm.models
from cae_mm.model_index import find_model_index

root = find_model_index().parent
assert 'site-packages' in cae_mm.__file__ and str(root).startswith(cae_mm.__path__[0])
configs = sorted(root.rglob('configs/pretrain/*.py'))
for path in configs:
    Config.fromfile(path)
known = mmpretrain.list_models('*cae*_in1k*')
print(f'cae_mm {cae_mm.__version__}: {len(configs)} configs of pretraining in {root}, {len(known)} models known')
assert configs and known
CODE
