#!/usr/bin/env bash
# Installs Arize Phoenix, a tracing back end, where load_tests/phoenix.py looks for it: 0.9 GB, from the package index.
set -euo pipefail
folder=${1:-$HOME/.cache/octavo-peers/phoenix}
version=20.26.1
if [ ! -x "$folder/bin/phoenix" ] || ! "$folder/bin/python" -c "import importlib.metadata as m; assert m.version('arize-phoenix') == '$version'"; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/pip" install --quiet --disable-pip-version-check "arize-phoenix==$version"
fi
echo "phoenix $version in $folder"
