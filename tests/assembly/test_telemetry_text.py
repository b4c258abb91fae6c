"""Metrics as Prometheus text: our names, vLLM's beside them, and the texts of several processes as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from octavo.metrics import CATALOGUE, ENGINE_RUNNING, FINISHED_CHOICES, TIME_TO_FIRST_TOKEN
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.telemetry_text import is_text, merged, own_text

RECORD = {"counter": "add", "histogram": "record", "gauge": "set"}


def text_of_all(role: str = "router", *, aliases: bool = True, label: str = "toy") -> str:
    """Every metric of the table once, with `label` for each of its attributes."""
    registry = CollectorRegistry()
    provider = MeterProvider(
        [PrometheusMetricReader(scope_info_enabled=False, registry=registry)], shutdown_on_exit=False
    )
    meter = provider.get_meter("test")
    for metric in CATALOGUE:
        labels = dict.fromkeys(metric.attributes, label)
        instrument = metric.create(meter, observing(labels))
        if metric.kind in RECORD:
            getattr(instrument, RECORD[metric.kind])(2, labels)
    return own_text(registry, role, aliases=aliases)


def observing(labels: dict[str, str]) -> Callable[[Any], Sequence[Observation]]:
    return lambda _: [Observation(2, labels)]


def samples(text: str) -> dict[str, list[dict[str, str]]]:
    """Labels by the names of samples. Raises ValueError for what Prometheus would not read."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_every_metric_has_the_name_that_the_table_says() -> None:
    found = samples(text_of_all())
    for metric in CATALOGUE:
        name = metric.text_name + ("_bucket" if metric.kind == "histogram" else "")
        assert name in found
        labels = {attribute.replace(".", "_") for attribute in metric.attributes}
        assert {*found[name][0]} - {"le"} == labels | {"process"}


def test_what_vllm_has_as_well_has_its_names_too() -> None:
    found = samples(text_of_all("replica"))
    assert found["vllm:num_requests_running"] == [{"model_name": "toy", "process": "replica"}]
    assert found["vllm:request_success_total"][0] == {
        "model_name": "toy",
        "finished_reason": "toy",
        "process": "replica",
    }
    first = found["vllm:time_to_first_token_seconds_bucket"][0]
    assert (first["model_name"], first["le"]) == ("toy", "0.001")
    for metric in (ENGINE_RUNNING, FINISHED_CHOICES, TIME_TO_FIRST_TOKEN):
        assert metric.alias.startswith("vllm:")
    assert not any(name.startswith("vllm:") for name in samples(text_of_all(aliases=False)))


def test_texts_of_several_processes_are_one_with_each_family_once() -> None:
    texts = {"R": text_of_all(), "w-1": text_of_all("replica"), 'odd "\\\n': text_of_all("replica", aliases=False)}
    text = merged(texts)
    assert is_text(text)
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    found = samples(text)
    own = {name: len(labels) for name, labels in samples(texts["R"]).items()}
    for name, count in own.items():
        assert len(found[name]) == count * (2 if name.startswith("vllm:") else 3)
    queue = [(each["instance"], each["process"]) for each in found["octavo_queue_requests"]]
    assert queue == [("R", "router"), ("w-1", "replica"), ('odd "\\\n', "replica")]


def test_labels_that_need_care_come_through() -> None:
    odd = 'a"b\\c\nd{e="f"} 1'
    found = samples(merged({"x": text_of_all(label=odd)}))
    assert found["octavo_queue_requests"] == [{"gen_ai_request_model": odd, "process": "router", "instance": "x"}]


def test_samples_without_labels_get_them() -> None:
    text = merged({"x": "# HELP up Whether.\n# TYPE up gauge\nup 1.0\n", "y": ""})
    assert text == '# HELP up Whether.\n# TYPE up gauge\nup{instance="x"} 1.0\n'
    assert not is_text("<html>")
