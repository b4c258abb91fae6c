#!/usr/bin/env bash
# Writes the Python stubs beside their .proto files, with the pinned generator in an environment of its own.
# usage: scripts/protos.sh [OUT]     OUT: where the stubs go (default: protos/)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-protos}
env=.venv-protos
stamp=$env/.octavo-1
if [ ! -e "$stamp" ]; then
  rm -rf "$env"
  "${PYTHON:-python3}" -m venv "$env"
  "$env/bin/pip" install -q grpcio-tools==1.76.0 'protobuf>=6.31,<6.34' 'setuptools<81' mypy-protobuf==3.7.0
  touch "$stamp"
fi
mkdir -p "$out"
PATH="$env/bin:$PATH" "$env/bin/python" -m grpc_tools.protoc -Iprotos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  $(cd protos && find octavo -name '*.proto' | sort)
