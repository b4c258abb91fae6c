"""A model computed by the C library: what it is not to compute, and its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.random_models import VOCAB, write_random_model
from workers.native import library
from workers.native.model import NativeDtype, NativeForward, NativeModel
from workers.plan import Chunk
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId
from workers.weights.packed_cache import load_packed
from workers.weights.packed_mode import PackingMode

pytestmark = pytest.mark.skipif(library.library() is None, reason="the C library is not built")

NUM_BLOCKS, BLOCK_SIZE = 64, 4

ENDLESS = """
import sys, threading
from pathlib import Path
from tests.workers import test_native_model as here

forward = here.new_forward(Path(sys.argv[1]))
chunk = here.chunk_of([token % 50 for token in range(here.NUM_BLOCKS * here.BLOCK_SIZE)])
has_begun = threading.Event()

def compute():
    while True:
        forward.compute([chunk])
        has_begun.set()

threading.Thread(target=compute, daemon=True).start()
has_begun.wait()
"""


def new_forward(weights: Path) -> NativeForward:
    model = NativeModel(load_packed(weights, "", PackingMode.EXACT, None), NativeDtype.FP32, threads=2)
    return model.over(model.new_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE))


def chunk_of(tokens: list[int], *, first_block: int = 0) -> Chunk:
    sequence = Sequence(GenerateWork(work_id=WorkId("test", 0), prompt=tokens, max_tokens=1))
    sequence.block_table = list(range(first_block, first_block - (-len(tokens) // BLOCK_SIZE)))
    return Chunk(sequence, 0, len(tokens), samples=True)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_random_model(tmp_path, "llama")


def test_a_library_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    assert library.library.__wrapped__() is None
    assert f"has ABI {library.ABI - 1} instead of {library.ABI}: run setup again" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        chunk_of([1, 2, VOCAB]),
        chunk_of([1, -1, 2]),
        chunk_of([1, 2, 3], first_block=NUM_BLOCKS),
        chunk_of([1, 2, 3], first_block=-1),
        chunk_of([1] * 9, first_block=NUM_BLOCKS - 2),
    ],
)
def test_tokens_and_blocks_that_are_not_there(weights: Path, wrong: Chunk) -> None:
    """They would be read, and written, wherever that is in memory; the engine gives up the request instead."""
    forward = new_forward(weights)
    right = chunk_of([3, VOCAB - 1, 5], first_block=NUM_BLOCKS - 1)
    expected = forward.compute([right]).values.copy()
    for chunks in ([wrong], [right, wrong]):
        with pytest.raises(IndexError, match=r"a token is not in \[0, 83\), or a block is not the cache's"):
            forward.compute(chunks)
    assert (forward.compute([right]).values == expected).all()
    forward.close()


def test_nothing_is_computed_after_close(weights: Path) -> None:
    forward = new_forward(weights)
    forward.close()
    forward.close()
    with pytest.raises(AssertionError, match="computes nothing after close"):
        forward.compute([chunk_of([1])])


def test_a_process_ends_while_a_step_is_computed(tmp_path: Path) -> None:
    """The engine's thread may be in a step for longer than anybody waits for it. At exit, contexts used to be closed
    under it: the process died of a signal."""
    weights = write_random_model(tmp_path, "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    root = Path(__file__).parents[2]
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", ENDLESS, str(weights)],
            check=False,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
