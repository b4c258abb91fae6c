"""Who may import whom (DESIGN: folders and arrows), read from the sources so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"cluster", "router", "workers", "octavo", "load_tests", "tests"}
ALLOWED = {
    "octavo": set(),
    "workers": {"octavo"},
    "router": {"octavo", "workers"},
    "cluster": {"octavo", "workers", "router"},
    "load_tests": {"octavo"},
}
SHARED_LEAVES = {"workers.types", "workers.errors", "workers.prefix", "workers.handshake", "workers.peer_tls"}
"""What `router` may import of `workers`; these import nothing but the standard library, each other and `LIBRARIES`."""
LIBRARIES = {"workers.peer_tls": {"cryptography", "grpc"}}
LEAF_IMPORTS = SHARED_LEAVES | {"octavo.names"}
RAY_SHAPED = {"router/serve.py", "workers/serve.py"}


def sources(package: str) -> Iterator[Path]:
    folder = ROOT / ("protos/octavo" if package == "octavo" else package)
    return (path for path in sorted(folder.rglob("*.py")) if "_pb2" not in path.name)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in names)


def is_module(name: str) -> bool:
    relative = name.replace(".", "/")
    folders = (ROOT, ROOT / "protos")
    return any((f / f"{relative}.py").exists() or (f / relative).is_dir() for f in folders)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_what_the_arrows_allow(package: str) -> None:
    wrong = []
    for path in sources(package):
        is_rig = relative(path).startswith("load_tests/rigs/")
        allowed = ALLOWED[package] | {package} | ({"cluster", "router", "workers"} if is_rig else set())
        wrong += [f"{relative(path)}: {name}" for name in imports(path) if name.split(".")[0] in OURS - allowed]
    assert wrong == []


def test_router_shares_only_the_leaves_of_workers() -> None:
    wrong = [
        f"{relative(path)}: {name}"
        for path in sources("router")
        for name in imports(path)
        if name.split(".")[0] == "workers" and name not in SHARED_LEAVES
    ]
    assert wrong == []


@pytest.mark.parametrize("leaf", sorted(LEAF_IMPORTS))
def test_leaves_need_only_the_standard_library(leaf: str) -> None:
    import sys

    top = "protos/" if leaf.startswith("octavo") else ""
    path = ROOT / f"{top}{leaf.replace('.', '/')}.py"
    allowed = sys.stdlib_module_names | LIBRARIES.get(leaf, set())
    wrong = [n for n in imports(path) if n not in LEAF_IMPORTS and n.split(".")[0] not in allowed]
    assert wrong == []


def test_router_never_imports_torch_and_only_the_ray_shaped_files_import_ray() -> None:
    wrong = []
    for package in ("router", "workers"):
        for path in sources(package):
            tops = {name.split(".")[0] for name in imports(path)}
            if package == "router" and tops & {"torch", "transformers"}:
                wrong.append(f"{relative(path)}: torch")
            if "ray" in tops and relative(path) not in RAY_SHAPED:
                wrong.append(f"{relative(path)}: ray")
    assert wrong == []


ENVIRONMENT = {
    "workers/vllm_engine/setup.py",  # writes what vLLM reads, and takes in no other way
    "workers/vllm_engine/guard.py",  # a process of its own, which is told its owner and a directory
    "load_tests/rigs/gpu_bench.py",  # a program of its own, on a machine that has nothing but the packed files
    "load_tests/rigs/gpu_contestant.py",  # a process of that
}


@pytest.mark.parametrize("package", ["router", "workers", "octavo", "load_tests"])
def test_only_cluster_reads_the_environment(package: str) -> None:
    wrong = []
    for path in sources(package):
        if relative(path) in ENVIRONMENT:
            continue
        if package == "load_tests" and not relative(path).startswith("load_tests/rigs/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "argv"}:
                wrong.append(f"{relative(path)}:{node.lineno} {node.attr}")
    assert wrong == []


def test_libraries_use_only_the_api_of_opentelemetry() -> None:
    wrong = [
        f"{relative(path)}: {name}"
        for package in ("router", "workers", "octavo")
        for path in sources(package)
        for name in imports(path)
        if name.startswith("opentelemetry.") and name.split(".")[1] in {"sdk", "exporter"}
    ]
    assert wrong == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    nothing = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
    paths = [p for package in ALLOWED for p in sources(package)]
    assert [relative(p) for p in paths if nothing & set(p.stem.split("_"))] == []


def test_package_roots_are_empty() -> None:
    roots = ["workers", "router", "cluster", "protos/octavo", "protos/octavo/v1", "protos/octavo/internal"]
    assert [r for r in roots if (ROOT / r / "__init__.py").read_text().strip()] == []
