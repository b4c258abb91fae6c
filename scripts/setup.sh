#!/usr/bin/env bash
# Makes .venv with everything that demo, serve, check and test need. Does nothing when it is up to date.
#   PYTHON       the interpreter to start from (default: the first of python3.11, 3.12, 3.13, python3 that fits)
#   TORCH_INDEX  a package index with CPU builds of torch (default: the configured indexes)
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

stamp=.venv/.octavo-$(cat constraints.txt pyproject.toml protos/pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)
native=.venv/.native-$(cat workers/native/*.[ch] workers/native/*.inc | sha256sum | cut -c1-16)
[ -e "$stamp" ] && [ -e "$native" ] && exit 0

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }
python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if fits "$candidate"; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ] || ! fits "$python"; then
  echo "setup: needs Python 3.11, 3.12 or 3.13; set PYTHON to one (found: ${python:-none})" >&2
  exit 1
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install -q --progress-bar off -c constraints.txt)
octavo=(-e ./protos -e '.[cpu,otel,dev]' --config-settings editable_mode=compat)

# pip compiles the C library of kernels, and does without it where that fails.
install() {
  rm -f workers/native/_kernels*.so
  "${pip[@]}" "$@" 2> >(grep -v '^WARNING: Location' >&2)
  rm -f .venv/.octavo-* .venv/.native-*
  touch "$stamp" "$native"
  if ! ls workers/native/_kernels*.so >/dev/null 2>&1; then
    echo "setup: no C compiler, or it failed: the engine will compute with torch, several times slower" >&2
  fi
}

if [ -e "$stamp" ]; then
  echo "setup: compiling the kernels"
  install --no-deps "${octavo[@]}"
  exit 0
fi
torch=$(grep -E '^torch==' constraints.txt)

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if [ -n "${TORCH_INDEX:-}" ]; then
    echo "setup: installing $torch from TORCH_INDEX"
    .venv/bin/python -m pip install -q --index-url "$TORCH_INDEX" "$torch"
  else
    if .venv/bin/python -m pip install -q --dry-run --report - "$torch" 2>/dev/null | grep -q '"name": "nvidia-'; then
      echo "setup: the configured indexes offer only a CUDA build of $torch: about 3 GB to download, 7 GB on disk."
      echo "setup: for a CPU build (200 MB) set TORCH_INDEX to an index that has one and run again."
    else
      echo "setup: installing $torch, a CPU build (about 200 MB)"
    fi
    "${pip[@]}" "$torch" 2> >(grep -v '^WARNING: Location' >&2)
  fi
fi
echo "setup: installing octavo and what it needs (1.7 GB on disk with torch; one to three minutes)"
install "${octavo[@]}"
