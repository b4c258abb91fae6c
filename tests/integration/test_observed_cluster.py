"""A cluster under load as dashboards, alerts and traces show it: what is documented is there, and queries have data.

A real Prometheus scrapes it (Debian's package prometheus; without it those tests are skipped by name), and a collector
gets its spans.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from octavo import spans
from octavo.names import Attribute

from load_tests.prometheus import OBSERVABILITY, is_installed, scraping
from load_tests.rigs.telemetry_load import CONFIG, Load
from load_tests.rigs.telemetry_queries import Survey, strike
from tests.cluster import ClusterProcess, running
from tests.collector import Collector, Span

pytestmark = pytest.mark.cluster
LOAD_S = 4.0
CALLS = "octavo.v1."
"""How the names of server spans begin."""


class Observed:
    """What was to be seen of one cluster. `survey` is what Prometheus had no answer to; None without one."""

    def __init__(self, cluster: ClusterProcess, folder: Path) -> None:
        self.survey: Survey | None = None
        if not is_installed():
            self.load = self._strike(cluster, lambda: True)
            return
        with scraping(cluster.ready["metrics"], folder) as prometheus:
            self.survey = Survey(prometheus)
            self.load = self._strike(cluster, self.survey.ask)
            self.nothing = prometheus.ask("octavo_no_such_metric")
            failed = prometheus.ask('sum by (error_type) (octavo_requests_total{error_type!=""}) > 0')
            self.reasons = {each.labels["error_type"] for each in failed}

    def _strike(self, cluster: ClusterProcess, is_seen: Callable[[], bool]) -> Load:
        return asyncio.run(strike(cluster.address, cluster.pids[0], LOAD_S, is_seen))


@pytest.fixture(scope="module")
def observed(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    folder = tmp_path_factory.mktemp("observed")
    config = folder / "cluster.toml"
    config.write_text(CONFIG)
    with running(
        *("--config", str(config)),
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="200",
    ) as cluster:
        return Observed(cluster, folder)  # when this is over the cluster has ended, and sent its last spans


@pytest.fixture
def scraped(observed: Observed) -> Observed:
    if observed.survey is None:
        pytest.skip("prometheus: it is not installed (Debian's package prometheus)")
    return observed


def test_the_load_had_something_of_everything(observed: Observed) -> None:
    outcomes = observed.load.outcomes
    assert {"OK", "INVALID_FIELD", "MODEL_NOT_FOUND"} <= outcomes.keys()
    assert {"DEADLINE_PASSED", "DEADLINE_UNREACHABLE"} & outcomes.keys()
    assert outcomes["OK"] > 20


def test_every_query_of_dashboards_and_alerts_has_data(scraped: Observed) -> None:
    assert list(map(str, scraped.survey.panels)) == []
    assert list(map(str, scraped.survey.rules)) == []
    assert scraped.nothing == [], "a query without data is noticed"


def test_every_documented_metric_is_there(scraped: Observed) -> None:
    assert scraped.survey.series == set()


def test_errors_are_counted_by_the_reasons_that_clients_got(scraped: Observed) -> None:
    assert scraped.reasons >= observed_reasons(scraped.load)


def observed_reasons(load: Load) -> set[str]:
    return load.outcomes.keys() - {"OK", "DEADLINE_PASSED"}  # a client may give up by itself before it is told


@pytest.mark.parametrize("kind", spans.CATALOGUE, ids=lambda kind: str(kind.name))
def test_spans_have_the_attributes_that_are_documented(
    observed: Observed, collector: Collector, kind: spans.Kind
) -> None:
    found = of_servers(collector.named(kind.name))
    if kind.name.startswith(CALLS) and kind.name != spans.Span.SESSION_REQUEST:
        return  # the load comes over Sessions; what there is are other tests' calls, some within spans of theirs
    assert found
    for span in found:
        assert set(kind.always) <= span.attributes.keys()
        assert span.attributes.keys() <= {*kind.always, *kind.sometimes}
        for event in span.events:
            assert event.name in kind.events
            assert event.name == "exception" or set(spans.EVENT_ATTRIBUTES[event.name]) == event.attributes.keys()
    assert all(span.parent_id == "" for span in found) == (kind.parent == "none")
    assert any(span.links for span in found) == bool(kind.links)


def of_servers(found: list[Span]) -> list[Span]:
    return [span for span in found if span.service != "octavo-client"]


def test_every_documented_event_happens(observed: Observed, collector: Collector) -> None:
    every = (span for kind in spans.CATALOGUE for span in of_servers(collector.named(kind.name)))
    assert {event.name for span in every for event in span.events} == {*spans.EVENT_ATTRIBUTES, "exception"}


def test_a_trace_has_only_documented_spans(observed: Observed, collector: Collector) -> None:
    names = {span.name for trace_id in observed.load.trace_ids for span in collector.spans(trace_id)}
    assert names <= {kind.name for kind in spans.CATALOGUE}
    assert {spans.Span.SESSION_REQUEST, spans.Span.QUEUE, spans.Span.DISPATCH, spans.Span.DECODE} <= names


@pytest.mark.parametrize("policy", ["deadline-misses", "lost-replicas", "scaling"])
def test_the_collectors_rules_find_what_they_are_for(observed: Observed, collector: Collector, policy: str) -> None:
    """Rules of tail sampling, applied to the spans that really came."""
    (rule,) = (each for each in tail_policies() if each["name"] == policy)
    every = [span for kind in spans.CATALOGUE for span in of_servers(collector.named(kind.name))]
    kept = [span for span in every if keeps(rule, span)]
    assert kept
    assert len(kept) < len(every) / 2, "it keeps nearly everything"


def test_the_first_tokens_time_is_a_number_that_a_rule_can_compare(observed: Observed, collector: Collector) -> None:
    times = [
        span.attributes[Attribute.TIME_TO_FIRST_TOKEN]
        for span in of_servers(collector.named(spans.Span.SESSION_REQUEST))
        if Attribute.TIME_TO_FIRST_TOKEN in span.attributes
    ]
    assert len(times) >= len(observed.load.trace_ids) > 20
    assert all(isinstance(value, float) and 0 < value < 60 for value in times)


def tail_policies() -> list[dict[str, Any]]:
    config = yaml.safe_load((OBSERVABILITY / "kubernetes/collector.yaml").read_text())
    policies: list[dict[str, Any]] = config["processors"]["tail_sampling"]["policies"]
    return policies


def keeps(rule: dict[str, Any], span: Span) -> bool:
    match rule:
        case {"string_attribute": {"key": key, "values": values}}:
            return span.attributes.get(key) in values
        case {"numeric_attribute": {"key": key, "min_value": least, "max_value": most}}:
            value = span.attributes.get(key)
            return isinstance(value, int) and least <= value <= most
        case {"ottl_condition": {"span": [condition]}}:
            return bool(condition == f'name == "{span.name}"')
    raise AssertionError(rule)
