"""Write a GGUF model as a Hugging Face directory in bf16, so that vLLM has the weights that everybody has.

    python dequantise.py FILE.gguf DIRECTORY

Runs in vLLM's environment (transformers, gguf, accelerate), not in ours. In bf16, which is what vLLM computes in by
default; rounding once costs the weights 0.13 %.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    gguf, directory = Path(sys.argv[1]), sys.argv[2]
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    described = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**described))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    main()
