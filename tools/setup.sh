#!/usr/bin/env bash
# Makes the virtual environment of one stack; `make setup` calls this.
#
#   STACK          onedl (.venv, Python 3.11) or openmmlab (.venv-openmmlab, Python 3.10)
#   EXTRAS         any of pretrain, segmentation, detection, or all; what was installed before stays
#   PYTHON         the interpreter to use, in place of the search
#   CAE_MM_CACHE   where compiled mmcv wheels are kept
#
# A second run ends at once while nothing that matters has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "make setup: $1" >&2
  exit 1
}

stack=${STACK:-onedl}
case $stack in
  onedl)
    venv=.venv version=3.11 suffix='' mmcv=onedl-mmcv
    needs_operators='detection'
    ;;
  openmmlab)
    venv=.venv-openmmlab version=3.10 suffix=-openmmlab mmcv=mmcv
    needs_operators='segmentation|detection'
    ;;
  *) fail "unknown STACK '$stack': use onedl or openmmlab" ;;
esac
constraints=constraints/$stack.txt
python=$venv/bin/python
stamp=$venv/setup.stamp
log=$venv/setup.log

# The extras asked for, together with those that the environment already has.
requested=$(tr ',' ' ' <<<"${EXTRAS:-pretrain}")
requested=${requested/all/pretrain segmentation detection}
for extra in $requested; do
  case $extra in
    pretrain | segmentation | detection) ;;
    *) fail "unknown EXTRAS '$extra': use pretrain, segmentation, detection or all" ;;
  esac
done
installed=$(head -n 1 "$stamp" 2>/dev/null || true)
extras=$(printf '%s\n' pretrain $requested $installed | sort -u | xargs)

# A moved checkout counts as changed, because the editable install points to its folder.
checksum=$(cat cae_mm/dependencies.py setup.cfg setup.py "$constraints" tools/setup.sh <(pwd) | cksum)
state=$extras$'\n'$checksum
if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then
  echo "set-up is up to date: $venv ($extras)"
  exit
fi

# A name in PATH can be a pyenv shim that fails, so each candidate is tried by running it.
find_python() {
  local candidate candidates
  mapfile -t candidates < <(
    type -ap "python$version" python3 python
    compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version.*/bin/python"
  )
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c "import ensurepip, sys
sys.exit(sys.version_info[:2] != (${version/./, }))" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no usable Python $version (with venv and ensurepip) in PATH or under pyenv.
Install one, for example with 'pyenv install $version' or 'apt install python$version-venv',
or name it: make setup STACK=$stack PYTHON=/path/to/python$version"
}

# step MESSAGE COMMAND...: runs quietly; when it fails, shows the end of the log and stops.
step() {
  local message=$1 start=$SECONDS
  shift
  printf '  %-56s' "$message"
  printf '\n+ %s\n' "$*" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    printf 'failed\n\n'
    tail -n 20 "$log"
    printf '\n'
    fail "'$message' failed; the whole log is $log"
  fi
  printf '%5d s\n' $((SECONDS - start))
}

# The wheel is kept by torch and Python version, which pip's own cache does not look at.
install_mmcv_with_operators() {
  local cuda=0 key wheels
  key=$("$python" -c 'import sys, torch
print("torch%s-py%d.%d" % (torch.__version__, *sys.version_info[:2]))')
  if command -v nvcc && "$python" -c 'import torch; assert torch.cuda.is_available()'; then
    cuda=1
    key+=-cuda
  else
    export CUDA_VISIBLE_DEVICES=  # else mmcv's setup.py calls for nvcc wherever it sees a GPU
  fi
  wheels=${CAE_MM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cae-mm}/wheels/$key
  local install=("${pip[@]}" install --no-index --find-links "$wheels" --no-deps --force-reinstall "$mmcv")
  "${install[@]}" && return
  "${pip[@]}" install ninja packaging &&
    env --unset=PIP_BUILD_CONSTRAINT PATH="$PWD/$venv/bin:$PATH" \
      CFLAGS=-g0 MMCV_WITH_OPS=1 FORCE_CUDA=$cuda MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
      "${pip[@]}" wheel --no-build-isolation --no-deps --no-cache-dir --wheel-dir "$wheels" "$mmcv" &&
    "${install[@]}"
}

if ! "$python" -c '' 2>/dev/null; then
  base=${PYTHON:-$(find_python)}
  echo "making $venv with $base"
  rm -rf "$venv"
  "$base" -m venv "$venv"
fi
echo "setting up $venv ($extras); details in $log"
: >"$log"

# Build environments need the constraints too: a setup.py may not work with today's setuptools.
export PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$python" -m pip)
step 'pip, setuptools, wheel' "${pip[@]}" install pip setuptools wheel
step 'torch and torchvision (a few GB)' "${pip[@]}" install torch torchvision
if [[ $extras =~ $needs_operators ]]; then
  step 'mmcv with compiled operators (minutes if not in cache)' install_mmcv_with_operators
else
  # Built in pip's isolation, which has no torch, so without operators.
  step 'mmcv without operators' "${pip[@]}" install --no-cache-dir --no-deps "$mmcv"
fi
groups=$(printf "%s$suffix," $extras)dev
step "cae-mm[$groups]" "${pip[@]}" install --editable ".[$groups]"

echo "$state" >"$stamp"
echo "$venv is ready"
