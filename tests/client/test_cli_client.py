"""`octavo generate`, `chat` and `status` as processes, against the scripted router; batches in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from octavo.client import Client, ConnectionFailedError, GenerateOptions
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_batch import read_tasks, repair_output, run_batch
from tests.client.scripted_router import ScriptedRouter, expected_text, pb
from tests.client.waiting import until
from tests.router.rig import Work, running
from workers.errors import ConfigError


class Outcome(NamedTuple):
    code: int | None
    stdout: str
    stderr: str


async def octavo(address: str, *arguments: str, stdin: str = "") -> Outcome:
    """Run the command line with OCTAVO_ADDRESS set, and return how it ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cluster.cli",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OCTAVO_ADDRESS": address, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    stdout, stderr = await process.communicate(stdin.encode())
    return Outcome(process.returncode, stdout.decode(), stderr.decode())


async def test_generate_streams_answers_in_order(router: ScriptedRouter) -> None:
    outcome = await octavo(
        router.address, "generate", "one", "-", "--max-tokens", "4", "--temperature", "0", "--stop", "END", stdin="two"
    )
    assert outcome == Outcome(0, f"{expected_text(4)}\n" * 2, "")
    assert [start.request.prompt.text for start in router.starts] == ["one", "two"]
    assert router.starts[0].request.sampling.temperature == 0.0
    assert list(router.starts[0].request.stop) == ["END"]


async def test_generate_as_json_says_what_failed(router: ScriptedRouter) -> None:
    router.refusals = [pb.Terminal(code=3, reason="EMPTY_PROMPT", message="prompt must not be empty")]
    outcome = await octavo(router.address, "generate", "", "hello", "--json", "--chat")
    failed, answered = map(json.loads, outcome.stdout.splitlines())
    assert outcome.code == 1
    assert failed["error"]["reason"] == "EMPTY_PROMPT"
    assert answered["text"] == expected_text(8)
    assert answered["usage"]["generated_tokens"] == 8
    assert "INVALID_ARGUMENT: prompt must not be empty [EMPTY_PROMPT]" in outcome.stderr
    assert router.starts[1].request.prompt.messages.messages[0].role == "user"


NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give a prompt"),
        (["generate", "p", "--address", "nonsense"], "must be HOST:PORT"),
        (["generate", "--input", __file__], "--input and --output go together"),
        (["generate", "p", "--max-tokens", "many"], "--max-tokens"),
        (["chat", "p"], "extra argument"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("arguments", [["status"], ["chat"]])
def test_nobody_there_ends_with_4(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--address", NOBODY], input="hi\n")
    assert result.exit_code == 4
    assert result.stdout == ""
    assert f"cannot reach {NOBODY}" in result.stderr
    assert "octavo serve" in result.stderr


def test_a_wrong_input_file_is_a_wrong_configuration(tmp_path: Path) -> None:
    tasks = write_lines(tmp_path / "in.jsonl", {"text": "no prompt"})
    arguments = ["generate", "--input", str(tasks), "--output", str(tmp_path / "out.jsonl"), "--address", NOBODY]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert not (tmp_path / "out.jsonl").exists()


async def test_status_as_table_and_as_json(router: ScriptedRouter) -> None:
    table, record = await asyncio.gather(
        octavo(router.address, "status"), octavo(NOBODY, "status", "--json", "--address", router.address)
    )
    assert table.code == record.code == 0
    for word in ("router-1", "serving", "12 s", "r1", "scripted", "ready", "fake torch fp32", "64/64"):
        assert word in table.stdout
    status = json.loads(record.stdout)
    assert status["replicas"][0]["kernels"] == "torch"
    assert status["router"]["num_accepted_total"] == 0


async def test_chat_with_piped_lines_keeps_the_conversation(router: ScriptedRouter) -> None:
    outcome = await octavo(
        router.address, "chat", "--system", "Be brief.", "--max-tokens", "3", stdin="hi\n\nwhy?\n/reset\nbye\n"
    )
    assert outcome == Outcome(0, f"{expected_text(3)}\n" * 3, "")
    conversations = [
        [(message.role, message.content[0].text) for message in start.request.prompt.messages.messages]
        for start in router.starts
    ]
    beginning = [("system", "Be brief."), ("user", "hi")]
    assert conversations == [
        beginning,
        [*beginning, ("assistant", expected_text(3)), ("user", "why?")],
        [("system", "Be brief."), ("user", "bye")],
    ]


async def test_ctrl_c_ends_the_answer_and_not_the_chat(router: ScriptedRouter) -> None:
    router.hold(2)
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cluster.cli",
        "chat",
        "--address",
        router.address,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = bytearray()
    loop = asyncio.get_running_loop()

    def take() -> None:
        try:
            seen.extend(os.read(ours, 4096))
        except OSError:  # the other end is closed
            loop.remove_reader(ours)

    loop.add_reader(ours, take)
    try:
        await until(lambda: b"> " in seen)
        os.write(ours, b"hi\n")
        await until(lambda: b"0 1 " in seen)
        process.send_signal(signal.SIGINT)
        await until(lambda: len(router.cancels) == 1)
        await until(lambda: b"[cancelled]" in seen)
        router.release()
        os.write(ours, b"again\n")
        await until(lambda: b"6 7 " in seen)
        os.write(ours, b"\x04")
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(ours)
        os.close(ours)
    said = [message.content[0].text for message in router.starts[1].request.prompt.messages.messages]
    assert said == ["hi", "0 1 ", "again"], "what was said before Ctrl-C stays in the conversation"


# Batches.


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records), "an id is answered once"
    return {record["id"]: record for record in records}


async def batch(client: Client, tasks: Path, answers: Path, **options: Any) -> int:
    return await run_batch(
        client, tasks, answers, model="", timeout_s=None, options=GenerateOptions(**options), concurrency=4
    )


async def test_a_batch_answers_every_line(
    router: ScriptedRouter, make_client: Callable[..., Client], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "a"},
        {"prompt": [1, 2], "id": "ids", "max_tokens": 2},
        {"prompt": [{"role": "user", "content": "c"}], "id": 7, "model": "m", "timeout": 60},
        *({"prompt": "x", "id": f"x{i}"} for i in range(20)),
    )
    assert await batch(make_client(router.address), tasks, tmp_path / "out.jsonl", max_tokens=5) == 0
    answers = read_lines(tmp_path / "out.jsonl")
    assert answers.keys() == {"1", "ids", "7", *(f"x{i}" for i in range(20))}
    assert answers["1"]["text"] == expected_text(5)
    assert answers["ids"]["text"] == expected_text(2)
    assert {start.request.model for start in router.starts} == {"", "m"}
    assert "23 of 23 answered, 0 of them before; 0 failed" in capsys.readouterr().err


async def test_a_batch_takes_every_option_and_gives_every_choice(
    make_client: Callable[..., Client], tmp_path: Path
) -> None:
    def script(work: Work) -> None:
        for index in range(work.request.n):
            work.emit("ab"[index], index, logprob=-1.0 - index if work.request.num_logprobs is not None else None)
            work.finish(index=index)

    tasks = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "p", "id": "two", "n": 2, "logprobs": 1, "min_tokens": 1, "logit_bias": {"5": 1.5}},
        {"prompt": "p", "id": "best", "best_of": 2},
        {"prompt": "p", "id": "more", "received_token_ids": [[104, 105]]},
    )
    async with running() as rig:
        rig.backend.script = script
        assert await batch(make_client(rig.address), tasks, tmp_path / "out.jsonl") == 0
        requests = {sum(map(len, work.request.received)): work.request for work in rig.backend.works}
        assert any(dict(work.request.sampling.logit_bias) == {5: 1.5} for work in rig.backend.works)
        assert requests[2].received == ((104, 105),)
    answers = read_lines(tmp_path / "out.jsonl")
    assert [choice["text"] for choice in answers["two"]["choices"]] == ["a", "b"]
    assert answers["two"]["logprobs"] == [{"token_id": 97, "logprob": -1.0, "top": [[97, -1.0], [0, -9.0]]}]
    assert (answers["best"]["text"], answers["more"]["text"]) == ("a", "a")
    assert (
        answers["best"].keys() == answers["more"].keys() == {"id", "text", "token_ids", "finish", "usage", "trace_id"}
    )


async def test_a_batch_resumes_where_it_stopped(
    router: ScriptedRouter, make_client: Callable[..., Client], tmp_path: Path
) -> None:
    """The first run was killed while it wrote its third line; one of its requests had failed."""
    tasks = write_lines(tmp_path / "in.jsonl", *({"prompt": "p", "id": f"t{i}"} for i in range(5)))
    out = write_lines(tmp_path / "out.jsonl", {"id": "t3", "text": "kept"}, {"id": "t1", "error": {"code": "INTERNAL"}})
    with out.open("a") as output:
        output.write('{"id": "t0", "text": "ha')
    assert await batch(make_client(router.address), tasks, out) == 0
    answers = read_lines(out)
    assert answers.keys() == {f"t{i}" for i in range(5)}
    assert answers["t3"]["text"] == "kept"
    assert answers["t0"]["text"] == expected_text(8)
    assert len(router.starts) == 4
    assert await batch(make_client(router.address), tasks, out) == 0
    assert len(router.starts) == 4, "nothing is left to ask"


async def test_a_batch_says_what_failed_and_tries_what_was_turned_away(
    router: ScriptedRouter, make_client: Callable[..., Client], tmp_path: Path
) -> None:
    busy = pb.Terminal(code=8, reason="QUEUE_FULL", message="full")
    busy.retry_delay.nanos = 10_000_000
    router.refusals = [pb.Terminal(code=3, reason="PROMPT_TOO_LONG", message="too long"), busy]
    tasks = write_lines(tmp_path / "in.jsonl", *({"prompt": "p"} for _ in range(3)), {"prompt": {"not": "a prompt"}})
    out = tmp_path / "out.jsonl"
    assert await batch(make_client(router.address), tasks, out) == 1
    answers = read_lines(out)
    assert answers["1"]["error"]["reason"] == "PROMPT_TOO_LONG"
    assert answers["4"]["error"]["field_violations"][0]["field"] == "prompt"
    assert answers["2"]["text"] == answers["3"]["text"] == expected_text(8)


async def test_a_batch_without_a_router_leaves_its_tasks_unanswered(
    router: ScriptedRouter, make_client: Callable[..., Client], tmp_path: Path
) -> None:
    await router.stop()
    tasks = write_lines(tmp_path / "in.jsonl", *({"prompt": "p"} for _ in range(9)))
    with pytest.raises(ConnectionFailedError):
        await batch(make_client(router.address, retry_timeout_s=0.1), tasks, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 of the input must be a JSON object"),
        (['{"prompt": "a"}', "[]"], "line 2 of the input must be an object"),
        (['{"prompt": "a", "max_token": 1}'], "line 1 of the input has unknown keys: max_token"),
        (['{"prompt": "a", "id": "x"}', "", '{"prompt": "b", "id": "x"}'], "line 3 of the input must have an id"),
        (['{"prompt": "a", "logit_bias": {"the": 1}}'], 'line 1 of the input has a "logit_bias" with a key'),
        (['{"prompt": "a", "timeout": "soon"}'], """line 1 of the input has "timeout" of the wrong type, is 'soon'"""),
    ],
)
def test_a_wrong_input_names_its_line(lines: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(read_tasks(lines, model="", timeout_s=None, options={}))
    assert message in str(caught.value)


def test_an_output_without_flaws_is_left_alone(tmp_path: Path) -> None:
    out = write_lines(tmp_path / "out.jsonl", {"id": 1, "text": "a"}, {"id": "b", "text": "b"})
    before = out.stat()
    assert repair_output(out) == {"1", "b"}
    assert out.stat().st_ino == before.st_ino
    assert repair_output(tmp_path / "none.jsonl") == set()
