#!/usr/bin/env bash
# Makes the environment with sentence-transformers that the bench of embeddings compares with: a minute, 1 GB.
#   usage: sentence_env.sh [DIR]      PYTHON: the interpreter to start from (default: that of .venv)
#   DIR: default OCTAVO_SENTENCE_ENV, or ~/.cache/octavo-peers/sentence-transformers
# torch and transformers are of the versions that Octavo runs with: what differs is how they are driven.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=${1:-${OCTAVO_SENTENCE_ENV:-$HOME/.cache/octavo-peers/sentence-transformers}}
python=${PYTHON:-$root/.venv/bin/python}
version=6.2.0
export PIP_DISABLE_PIP_VERSION_CHECK=1
same=$("$python" -c 'import importlib.metadata as m; print(*(f"{n}=={m.version(n)}" for n in ("torch", "transformers", "tokenizers", "numpy")))')
stamp=$dir/.octavo-$(echo "$version $same" | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0
echo "sentence_env: sentence-transformers $version into $dir"
"$python" -m venv --clear "$dir"
# shellcheck disable=SC2086  # a requirement a word
"$dir/bin/python" -m pip install -q $same "sentence-transformers==$version"
"$dir/bin/python" -c 'import sentence_transformers'
touch "$stamp"
