"""Metrics as Prometheus text: one process's own, with vLLM's names beside ours, and the texts of several made one.

Pure. `own_text` formats what a registry of prometheus_client collects and says in each sample which kind of process it
is from (label ``process``); `merged` needs no parser, for all texts are of that form, and adds the label ``instance``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from octavo.metrics import CATALOGUE
from octavo.names import Attribute
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.samples import Sample

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_HELP: Final = "# HELP "
_ALIASES: Final = {metric.text_name.removesuffix("_total"): metric.alias for metric in CATALOGUE if metric.alias}
_ALIAS_LABELS: Final = {
    Attribute.REQUEST_MODEL.replace(".", "_"): "model_name",
    Attribute.FINISH_REASON.replace(".", "_"): "finished_reason",
}
"""What vLLM calls labels of ours."""


def own_text(registry: CollectorRegistry, role: str, *, aliases: bool) -> str:
    """Return what `registry` has, and if asked for, once more under vLLM's names what vLLM has as well."""
    return generate_latest(_Families(registry, role, aliases)).decode()


def merged(texts: Mapping[str, str]) -> str:
    """Return the samples of all, family by family. `texts` of processes by their names, of which each must have been
    made by `own_text`."""
    families: dict[str, _Lines] = {}
    for instance, text in texts.items():
        label = f'instance="{_escaped(instance)}"'
        for name, lines in _families_of(text):
            families.setdefault(name, _Lines(lines[:2])).samples += [_labelled(line, label) for line in lines[2:]]
    return "".join(f"{line}\n" for family in families.values() for line in (*family.head, *family.samples))


def is_text(text: str) -> bool:
    """Whether it may have been made by `own_text`."""
    return text.startswith(_HELP)


@dataclass(slots=True)
class _Lines:
    head: Sequence[str]
    """HELP and TYPE."""
    samples: list[str] = field(default_factory=list)


class _Families:
    """What prometheus_client formats: a registry's families with the role in each sample, then the aliases."""

    def __init__(self, registry: CollectorRegistry, role: str, aliases: bool) -> None:
        self._registry, self._role, self._aliases = registry, role, aliases

    def collect(self) -> Iterable[Family]:
        families = [_renamed(family, family.name, {}, self._role) for family in self._registry.collect()]
        yield from families
        for family in families if self._aliases else ():
            if family.name in _ALIASES:
                yield _renamed(family, _ALIASES[family.name], _ALIAS_LABELS, self._role)


def _renamed(family: Family, name: str, labels: Mapping[str, str], role: str) -> Family:
    renamed = Family(name, family.documentation, family.type)
    suffix = len(family.name)
    for sample in family.samples:
        own = {labels.get(label, label): value for label, value in sample.labels.items()}
        own["process"] = role
        renamed.samples.append(Sample(name + sample.name[suffix:], own, sample.value))
    return renamed


def _families_of(text: str) -> Iterator[tuple[str, list[str]]]:
    for part in text.split(_HELP)[1:]:
        lines = (_HELP + part).rstrip("\n").split("\n")
        if len(lines) >= 2:
            yield part.partition(" ")[0], lines


def _labelled(line: str, label: str) -> str:
    name, brace, rest = line.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
