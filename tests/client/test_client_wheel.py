"""The client as a microservice installs it: the wheel alone in an empty environment, against a real router's front."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from scripts.client_wheel import InstallError, build_wheel, make_environment
from tests.router.rig import answering, running

ROOT = Path(__file__).resolve().parents[2]
TEXT = " Paris."
NO_NETWORK = ("NewConnectionError", "NameResolutionError", "Max retries exceeded", "ProxyError")

PROGRAM = """
import asyncio, importlib.util, json, pathlib, sys
import octavo
from octavo.client import Client, tracing

async def main(address):
    async with Client(address) as client:
        context = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
        answer = await client.complete("The capital of France is", traceparent=context)
        models = [model.name for model in await client.list_models()]
        return {"text": answer.text, "trace_id": answer.trace_id, "models": models, "health": await client.health()}

strangers = ["opentelemetry", "cluster", "router", "workers", "ray", "grpc_health", "google.api_core"]
found = []
for name in strangers:
    try:
        if importlib.util.find_spec(name):
            found.append(name)
    except ModuleNotFoundError:
        pass
package = pathlib.Path(octavo.__file__).parent
report = asyncio.run(main(sys.argv[1]))
report |= {
    "found": found,
    "prefix": str(package).startswith(sys.prefix),
    "typed": (package / "py.typed").exists(),
    "protos": sorted(path.name for path in package.rglob("*.proto")),
    "has_opentelemetry": tracing.HAS_OPENTELEMETRY,
}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel and its dependencies, and nothing else."""
    directory = tmp_path_factory.mktemp("wheel")
    try:
        return make_environment(directory / "environment", str(build_wheel(directory)))
    except InstallError as error:
        if any(word in str(error) for word in NO_NETWORK):
            pytest.skip("the client's dependencies cannot be installed: no package index is reached")
        raise


async def run(python: Path, *arguments: str, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        python,
        "-W",
        "error",
        *arguments,
        cwd=cwd,
        env={"PATH": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    return stdout.decode()


async def test_the_wheel_alone_calls_a_router(python: Path, tmp_path: Path) -> None:
    async with running() as rig:
        rig.backend.script = answering(TEXT)
        report = json.loads(await run(python, "-c", PROGRAM, rig.address, cwd=tmp_path))
    assert report == {
        "text": TEXT,
        "trace_id": "a" * 32,
        "models": ["toy"],
        "health": True,
        "found": [],
        "prefix": True,
        "typed": True,
        "protos": [
            "data_plane.proto",
            "inference_service.proto",
            "model_service.proto",
            "pooling.proto",
            "status_service.proto",
            "types.proto",
        ],
        "has_opentelemetry": False,
    }
    assert rig.backend.works[0].request.traceparent


async def test_the_example_streams_an_answer(python: Path, tmp_path: Path) -> None:
    async with running() as rig:
        rig.backend.script = answering(TEXT)
        printed = await run(python, str(ROOT / "examples" / "python_client.py"), rig.address, cwd=tmp_path)
    assert printed == f"{TEXT}\n"
    [work] = rig.backend.works
    assert work.request.max_tokens == 16
    assert work.request.sampling.is_greedy
