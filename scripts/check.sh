#!/usr/bin/env bash
# Everything that can be said about the sources without running a cluster. Stops at the first complaint.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
step() { printf 'check: %s\n' "$1"; }

step "ruff format";        "$bin/ruff" format --check .
step "ruff";               "$bin/ruff" check .
step "mypy --strict";      "$bin/mypy"
step "buf lint";           "$bin/buf" lint protos
step "buf breaking";       "$bin/buf" breaking protos --against protos/baseline.binpb
step "stubs up to date"
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
bash scripts/protos.sh "$fresh"
(cd "$fresh" && find . -type f | sort) | while read -r file; do
  diff -q "$fresh/$file" "protos/$file" >/dev/null || { echo "check: protos/${file#./} is not what its .proto says: run 'make protos'" >&2; exit 1; }
done
step "stubs beside protobuf 6.33 and 7.x"; "$bin/python" scripts/check_protobuf_matrix.py
step "docs written from code"; "$bin/python" -m scripts.reference --check; "$bin/python" -m scripts.dashboards --check
step "import arrows, names, manifests";    "$bin/python" -m pytest -q tests/checks
