"""sentence-transformers by itself, in the environment of sentence_env.sh: one process, a JSON object a line in and out.

    python sentence_direct.py DIRECTORY THREADS
    {"batches": [[text, ...], ...]}  ->  {"seconds": one for each batch, "vectors": of the last batch}

Says {"ready": version} first. Imports nothing of ours: its environment has nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time


def main(directory: str, threads: int) -> None:
    import sentence_transformers
    import torch

    torch.set_num_threads(threads)
    model = sentence_transformers.SentenceTransformer(directory, device="cpu")
    print(json.dumps({"ready": sentence_transformers.__version__}), flush=True)
    for line in sys.stdin:
        seconds = []
        for texts in json.loads(line)["batches"]:
            began = time.perf_counter()
            vectors = model.encode(texts, batch_size=max(1, len(texts)), show_progress_bar=False)
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds, "vectors": vectors.tolist()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
