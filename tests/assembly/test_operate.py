"""Commands that change a running cluster, as far as no cluster is needed: which Ray they mean, what they say, how they
end."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import ray_connection
from cluster.cli import app
from cluster.ray_connection import credentials, running_rays
from cluster.serve_view import ApplicationView, DeploymentView, Progress, ServeReplica
from workers.errors import ConfigError, ModelFileError, OctavoError, StartupError

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "theirs"}


def write_process(proc: Path, pid: int, address: str, environ: str | None) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_text(f"/ray/raylet\0--gcs-address={address}\0")
    if environ is not None:
        (proc / str(pid) / "environ").write_text(environ)


def test_the_token_of_a_ray_is_in_the_environment_of_its_processes(tmp_path: Path) -> None:
    write_process(tmp_path, 7, "127.0.0.1:1", "HOME=/home\0RAY_AUTH_MODE=token\0RAY_AUTH_TOKEN=theirs\0EQUAL=a=b\0\0")
    write_process(tmp_path, 8, "127.0.0.1:2", None)
    rays = running_rays(tmp_path)
    assert rays == {"127.0.0.1:1": {**TOKEN, "HOME": "/home", "EQUAL": "a=b"}, "127.0.0.1:2": None}


@pytest.mark.parametrize(
    ("theirs", "ours", "added"),
    [
        (TOKEN, {}, TOKEN),
        (TOKEN, {"RAY_AUTH_MODE": "disabled"}, TOKEN),
        (TOKEN, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "given"}, {}),
        ({"RAY_AUTH_MODE": "disabled"}, {}, {"RAY_AUTH_MODE": "disabled"}),
        ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token"}, {}),
        ({}, {}, {}),
    ],
)
def test_a_found_token_is_used_unless_one_was_given(
    theirs: dict[str, str], ours: dict[str, str], added: dict[str, str]
) -> None:
    assert credentials(theirs, ours) == added


def test_auto_means_the_ray_of_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_connection._only_one({"a:1": None, "b:2": {"HOME": "ours"}}) == "b:2"
    assert ray_connection._only_one({"a:1": None}) == "a:1"
    assert ray_connection._only_one({}) == ""
    with pytest.raises(StartupError, match="several Rays run here"):
        ray_connection._only_one({"a:1": {}, "b:2": {}})


def deployment(status: str = "HEALTHY", message: str = "", **replicas: str) -> DeploymentView:
    return DeploymentView(status, message, len(replicas), tuple(ServeReplica(*each) for each in replicas.items()))


def view(**deployments: DeploymentView) -> ApplicationView:
    return ApplicationView("RUNNING", "", deployments)


def test_progress_says_each_step_once_and_nothing_of_what_stays() -> None:
    said: list[str] = []
    router = deployment(r="RUNNING")
    progress = Progress(view(Router=router, Worker=deployment(a="RUNNING", b="RUNNING")), said.append)
    for replicas in (
        {"a": "RUNNING", "b": "RUNNING"},
        {"a": "RUNNING", "b": "RUNNING", "c": "STARTING"},
        {"a": "RUNNING", "b": "RUNNING", "c": "STARTING"},
        {"a": "STOPPING", "b": "RUNNING", "c": "RUNNING", "d": "STARTING"},
        {"c": "RUNNING", "d": "RUNNING"},
    ):
        progress(view(Router=router, Worker=deployment(**replicas)))
    assert said == [
        "Worker: 1 new starting, 2 old serving",
        "Worker: 1 new serving, 1 new starting, 1 old draining, 1 old serving",
        "Worker: 2 new serving",
    ]


def test_progress_says_that_a_replica_waits_for_a_node_with_room() -> None:
    said: list[str] = []
    replicas = (ServeReplica("a", "RUNNING"), ServeReplica("b", "STARTING", has_place=False))
    Progress(None, said.append)(view(Worker=DeploymentView("UPDATING", "", 2, replicas)))
    assert said == ["Worker: 1 new serving, 1 new waiting for room"]


def test_why_replicas_do_not_start_is_told_in_the_words_of_their_error() -> None:
    assert deployment("UPDATING").failure is None
    met = deployment("UPDATING", "ray::Worker()\nworkers.errors.ModelFileError: the model m is truncated\n").failure
    assert isinstance(met, ModelFileError)
    assert str(met) == "the model m is truncated"
    given_up = deployment("DEPLOY_FAILED", "failed 3 times\nOSError: no space left\n").failure
    assert isinstance(given_up, StartupError)
    assert str(given_up) == "OSError: no space left"


def test_a_replica_is_named_by_the_beginning_of_its_id() -> None:
    there = view(Router=deployment(abc="RUNNING"), Worker=deployment(abd="RUNNING", ab="RUNNING", xyz="STOPPING"))
    assert there.find("abd", among=["Worker"]) == ("Worker", "abd")
    assert there.find("ab", among=["Worker"]) == ("Worker", "ab")
    for name in ("a", "xyz", "abc", ""):
        with pytest.raises(ConfigError, match="ab, abd"):
            there.find(name, among=["Worker"])


def exit_code(*arguments: str) -> int:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, OctavoError):
        assert isinstance(result.exception, StartupError)
        return result.exception.exit_code
    return result.exit_code


def test_what_is_wrong_by_itself_ends_with_2_before_any_ray_is_looked_for(tmp_path: Path) -> None:
    wrong = tmp_path / "cluster.toml"
    wrong.write_text("[engine]\nthread = 1\n")
    assert exit_code("apply", str(wrong)) == 2
    assert exit_code("apply", str(tmp_path / "missing.toml")) == 2
    assert exit_code("apply") == 2
    assert exit_code("scale", "m", "many") == 2
    assert exit_code("scale", "m", "-1") == 2
    assert exit_code("drain", "r", "--ray-address", "nowhere") == 2


def test_no_ray_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text('model = "fake"\n[engine]\nengine = "fake"\n')
    nowhere = ("--ray-address", "127.0.0.1:1")
    assert exit_code("apply", str(tmp_path / "cluster.toml"), *nowhere) == 1
    assert exit_code("scale", "m", "auto", *nowhere) == 1
    assert exit_code("drain", "r", *nowhere) == 1
