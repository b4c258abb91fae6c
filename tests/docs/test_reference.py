"""The pages of docs/ that are written from code: up to date, complete, and their tables true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from octavo import reasons, spans
from octavo.client.errors import CallError
from octavo.metrics import CATALOGUE
from octavo.names import Attribute, Event, Reason, Span
from octavo.reasons import Retry

from scripts.reference import __main__ as reference
from scripts.reference import commands, configuration, metrics
from scripts.reference.docstrings import of_class
from workers import errors

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    ("InvalidRequestError", Reason.INCOMPATIBLE_PEER),
}
"""Classes and reasons that go together in the code and are no request's error."""


def constants(kind: type) -> set[str]:
    return {value for name, value in vars(kind).items() if name.isupper()}


def test_pages_are_what_the_code_says() -> None:
    assert reference.stale() == [], "run 'make docs'"


def test_a_page_that_differs_fails_the_check_and_says_how_to_renew_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "DOCS", tmp_path)
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    page = tmp_path / "errors.md"
    page.write_text(page.read_text().replace("QUEUE_FULL", "QUEUE_FULLER"))
    assert reference.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/errors.md is not what the code says: run 'make docs'\n"


def test_every_reason_is_told() -> None:
    assert list(reasons.CATALOGUE) == [value for name, value in vars(Reason).items() if name.isupper()]


def test_reasons_have_the_codes_that_errors_of_the_code_have() -> None:
    """Wherever router or replicas name a reason beside an error's class, the class has the code of the table."""
    told = list(raised())
    assert len(told) > 20
    wrong = [
        f"{name}: {reason}"
        for name, reason in told
        if getattr(errors, name).code != reasons.CATALOGUE[reason].code and (name, reason) not in ELSEWHERE
    ]
    assert wrong == []


def raised() -> Iterator[tuple[str, str]]:
    for kind in vars(errors).values():
        is_error = isinstance(kind, type) and issubclass(kind, errors.OctavoError)
        if is_error and kind.default_reason != Reason.INTERNAL:
            yield kind.__name__, kind.default_reason
    for path in (*ROOT.glob("router/*.py"), *ROOT.glob("workers/*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and hasattr(errors, call.func.id):
                for keyword in call.keywords:
                    match keyword:
                        case ast.keyword(
                            arg="reason", value=ast.Attribute(value=ast.Name(id="Reason"), attr=attribute)
                        ):
                            yield call.func.id, getattr(Reason, attribute)


def test_who_may_try_again_is_what_the_client_does() -> None:
    for reason, about in reasons.CATALOGUE.items():
        with_delay, without = (
            CallError("", code=grpc.StatusCode[about.code], reason=reason, retry_delay=delay) for delay in (1.0, None)
        )
        assert without.retryable is (about.retry is Retry.NOW), reason
        if about.retry is not Retry.NO:
            assert with_delay.retryable, reason


def test_every_span_and_every_attribute_of_one_is_told() -> None:
    assert {kind.name for kind in spans.CATALOGUE} == constants(Span)
    told = {attribute for kind in spans.CATALOGUE for attribute in (*kind.always, *kind.sometimes)}
    told |= {attribute for attributes in spans.EVENT_ATTRIBUTES.values() for attribute in attributes}
    assert spans.EVENT_ATTRIBUTES.keys() == constants(Event)
    counted = {attribute for metric in CATALOGUE for attribute in metric.attributes}
    assert told | counted == constants(Attribute)
    undocumented = [name for kind in (Attribute, Event) for name, meaning in of_class(kind).items() if not meaning]
    assert undocumented == []


def test_every_metric_has_a_line_with_its_names() -> None:
    page = metrics.page()
    for metric in CATALOGUE:
        assert f"| `{metric.name}` | `{metric.text_name}` |" in page


def test_every_key_has_a_meaning_and_says_its_rule() -> None:
    rows = [line.split(" | ") for line in configuration.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row[0] for row in rows if not row[4].strip()] == []
    assert configuration.rule("engine.block_size", int) == "must be in [1, 256]"
    assert configuration.rule("engine.dtype", str) == "must be one of auto, fp32, bf16, int8"
    assert configuration.rule("log.requests", bool) == ""


def test_every_command_has_its_options() -> None:
    page = commands.page()
    for line in ("## octavo serve", "## octavo keys create", "| `--ray-temp-dir` |", "`OCTAVO_ADDRESS`"):
        assert line in page


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "deploy/observability/README.md"], ids=str)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_pictures_are_small() -> None:
    pictures = [*ROOT.glob("docs/*.svg"), *ROOT.glob("docs/*.png")]
    assert {"overview.svg", "trace.png"} <= {path.name for path in pictures}
    own = [path for path in pictures if path.name != "demo.svg"]
    assert [path.name for path in own if path.stat().st_size > 150_000] == []
