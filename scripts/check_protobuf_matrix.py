"""Checks that the client wheel imports and works beside every protobuf that it allows: the oldest, vLLM's and 7.x.

Builds the wheel, makes an environment for each row of `ROWS` and runs `PROGRAM` in it, warnings as errors.
Exit code 1 if one fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from client_wheel import InstallError, build_wheel, make_environment

ROWS = {
    "protobuf 6.31, grpcio 1.76": ("protobuf==6.31.*", "grpcio==1.76.*"),
    "protobuf 6.33": ("protobuf==6.33.*",),
    "protobuf 7": ("protobuf>=7,<8",),
}

PROGRAM = """
import asyncio, importlib, importlib.metadata, pkgutil
import octavo
for module in pkgutil.walk_packages(octavo.__path__, "octavo."):
    importlib.import_module(module.name)
from octavo.client import Client
from octavo.client.request import make_request
from octavo.internal.v1 import data_plane_pb2
request = make_request([1, 2], model="m", options={"logit_bias": {1: 0.5}, "stop": "x"})
assert type(request).FromString(request.SerializeToString()) == request
async def main():
    async with Client("127.0.0.1:1") as client:
        assert client.generate("p").request_id
asyncio.run(main())
print("protobuf", importlib.metadata.version("protobuf"), "grpcio", importlib.metadata.version("grpcio"))
"""


def main() -> int:
    num_failed = 0
    with tempfile.TemporaryDirectory(prefix="octavo-matrix-") as name:
        directory = Path(name)
        wheel = build_wheel(directory)
        for row, (title, requirements) in enumerate(ROWS.items()):
            try:
                python = make_environment(directory / str(row), str(wheel), *requirements)
            except InstallError as error:
                print(f"{title}: cannot be installed: {error}", file=sys.stderr)
                num_failed += 1
                continue
            done = subprocess.run(
                [python, "-W", "error", "-c", PROGRAM], cwd=directory, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{title}: failed\n{done.stdout}{done.stderr}", file=sys.stderr)
                num_failed += 1
            else:
                print(f"{title}: ok ({done.stdout.strip()})")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
