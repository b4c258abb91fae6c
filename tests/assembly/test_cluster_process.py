"""What surrounds a cluster in each process: secret, telemetry, the processes of a Ray of our own, the model `fake`."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import telemetry
from cluster.boot import ClusterBoot
from cluster.config_sections import LogConfig
from cluster.model_cache import ModelCache
from cluster.model_fake import VOCAB_SIZE, fake_files
from cluster.processes import await_end, descendants
from cluster.ray_connection import running_rays
from cluster.secret import SecretSource, read_secret, write_secret
from router import membership
from router.model import ServedModel
from router.types import ReplicaAddress
from workers.errors import ConfigError


def test_a_secret_is_32_bytes_or_their_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = bytes(range(32))
    raw, digits, short = (tmp_path / name for name in ("raw", "digits", "short"))
    raw.write_bytes(secret)
    digits.write_text(secret.hex() + "\n")
    short.write_bytes(secret[:31])
    assert read_secret(raw) == read_secret(digits) == secret
    with pytest.raises(ConfigError, match="has 31 bytes"):
        read_secret(short)
    with pytest.raises(ConfigError, match="cannot read the secret"):
        read_secret(tmp_path / "missing")
    monkeypatch.setenv("OCTAVO_SECRET_FILE", str(raw))
    assert pickle.loads(pickle.dumps(SecretSource()))() == secret


def test_a_secret_that_is_written_is_new_and_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"an older one that everybody may read")
    write_secret(file)
    first = read_secret(file)
    assert file.stat().st_mode & 0o777 == 0o600
    write_secret(file)
    assert read_secret(file) != first


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "must be otlp or none, is 'zipkin'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "must be grpc, is 'http/json'"),
    ],
)
def test_an_exporter_that_is_not_there_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        telemetry.start("router", variables, LogConfig())


def test_the_rays_of_this_machine_are_found_by_their_raylets(tmp_path: Path) -> None:
    commands = {
        "7": "/ray/raylet\0--node_ip_address=127.0.0.1\0--gcs-address=127.0.0.1:6379\0",
        "8": "/ray/raylet\0--gcs-address=10.0.0.7:6379\0",
        "9": "/usr/bin/python\0/ray/worker.py\0--gcs-address=10.0.0.8:6379\0",
        "10": "",
    }
    for pid, command in commands.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_text(command)
    (tmp_path / "11").mkdir()
    assert running_rays(tmp_path).keys() == {"127.0.0.1:6379", "10.0.0.7:6379"}


def test_log_lines_are_json_and_hold_only_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    process = telemetry.start("worker", {"OTEL_SDK_DISABLED": "true"}, LogConfig(format="json", level="warning"))
    logging.getLogger("router.somewhere").info("too quiet")
    logging.getLogger("router.somewhere").warning("%d left", 3, extra={"prompt": "secret"})
    process.stop()
    out, err = capsys.readouterr()
    line = json.loads(err)
    assert out == ""
    assert (line["level"], line["role"], line["message"]) == ("warning", "worker", "3 left")
    assert "prompt" not in line


def test_descendants_are_found_awaited_and_if_need_be_killed() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import subprocess as s; s.Popen(['sleep', '60']); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        family = descendants(os.getpid())
        assert child.pid in {process.pid for process in family}
        mine = {process for process in family if process in descendants(child.pid) or process.pid == child.pid}
        assert len(mine) == 2
        assert await_end(mine, 0.05) == mine
    assert await_end(mine, 10.0) == set()


async def test_the_model_fake_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    files = pickle.loads(pickle.dumps(ClusterBoot(LogConfig()))).model_files("fake")
    assert files == fake_files(ModelCache(tmp_path))
    model = ServedModel.from_files(files)
    assert model.manifest.vocab_size == VOCAB_SIZE
    ids = model.tokenizer.encode("Grüße, 세계 </s>")
    assert await model.tokenizer.decode(ids, skip_special_tokens=False) == "Grüße, 세계 </s>"


def test_membership_reaches_watchers_old_and_new() -> None:
    one, two = (ReplicaAddress(replica_id=name, address="127.0.0.1:1") for name in "ab")
    early: list[tuple[ReplicaAddress, ...]] = []
    late: list[tuple[ReplicaAddress, ...]] = []
    membership.watch("test-group", early.append)
    membership.publish("test-group", (one,))
    membership.publish("test-group", (one,))
    membership.watch("test-group", late.append)
    membership.publish("other-group", (two,))
    membership.publish("test-group", ())
    assert early == [(one,), ()]
    assert late == [(one,), ()]
