"""The Node example, from the .proto files alone, against a real router's front."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.router.rig import answering, running

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Octets."
NO_NETWORK = ("ENOTFOUND", "ECONNREFUSED", "EAI_AGAIN", "ETIMEDOUT", "ENETUNREACH", "ENOTCACHED")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its packages, and of nothing but the .proto files."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    root = tmp_path_factory.mktemp("node")
    example = root / "clients" / "node"
    shutil.copytree(ROOT / "clients" / "node", example, ignore=shutil.ignore_patterns("node_modules"))
    for proto in (ROOT / "protos").rglob("*.proto"):
        copy = root / proto.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(proto, copy)
    command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    done = subprocess.run(command, cwd=example, capture_output=True, text=True, check=False)
    if done.returncode:
        if any(word in done.stderr for word in NO_NETWORK):
            pytest.skip("the example's packages cannot be installed: no npm registry is reached")
        pytest.fail(done.stderr)
    return example


async def node(example: Path, *arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        "node",
        "generate.js",
        *arguments,
        cwd=example,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    return process.returncode, stdout.decode(), stderr.decode()


async def test_generate_and_session_print_their_answers(example: Path) -> None:
    async with running() as rig:
        rig.backend.script = answering(TEXT)
        code, stdout, stderr = await node(example, rig.address, "Hi")
    assert (code, stderr) == (0, "")
    trace_id = stdout.splitlines()[1].rpartition(" ")[2]
    assert stdout.splitlines() == [
        f"generate: {TEXT}",
        f"usage: 2 prompt, {len(TEXT)} generated tokens; trace {trace_id}",
        f"session: {TEXT}",
        f"session: {TEXT}",
    ]
    assert rig.backend.works[0].request.traceparent.startswith(f"00-{trace_id}-")
    prompts = [bytes(work.request.prompt).decode() for work in rig.backend.works]
    assert prompts == ["Hi", "Hi", "Once upon a time"]


async def test_an_error_is_printed_and_told_by_the_exit_code(example: Path) -> None:
    async with running() as rig:
        code, _, stderr = await node(example, rig.address, "x" * 100)
    assert code == 1
    assert "100" in stderr


def test_the_lock_file_names_no_host() -> None:
    assert '"resolved"' not in (ROOT / "clients" / "node" / "package-lock.json").read_text()
