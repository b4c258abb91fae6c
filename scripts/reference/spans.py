"""docs/spans.md: every span with its parent, links, events and attributes, and what each attribute means."""

from __future__ import annotations

from octavo.names import Attribute, Event
from octavo.spans import CATALOGUE, EVENT_ATTRIBUTES, Kind

from scripts.reference.docstrings import of_class
from scripts.reference.markdown import code, codes, table

INTRODUCTION = """\
# Spans

One request is one trace. Context comes in as W3C `traceparent` and goes on with the request through queues, replicas,
resumes and retries. What many requests share, a batch or a step, is a span of its own with a link to each of them.
[telemetry.md](telemetry.md) says how to see them.
"""


def page() -> str:
    return "\n".join(
        [
            INTRODUCTION,
            *map(_kind, CATALOGUE),
            "## Events\n",
            table(("event", "attributes", "meaning"), _events()),
            "## Attributes\n",
            table(("attribute", "meaning"), _attributes()),
        ]
    )


def _events() -> list[tuple[str, ...]]:
    meanings = of_class(Event)
    values = {name: str(getattr(Event, name)) for name in meanings}
    return [(code(value), codes(EVENT_ATTRIBUTES[value]), meanings[name]) for name, value in values.items()]


def _attributes() -> list[tuple[str, ...]]:
    meanings = of_class(Attribute)
    used = {attribute for kind in CATALOGUE for attribute in (*kind.always, *kind.sometimes)}
    used |= {attribute for attributes in EVENT_ATTRIBUTES.values() for attribute in attributes}
    values = {name: str(getattr(Attribute, name)) for name in meanings}
    return [(code(value), meanings[name]) for name, value in values.items() if value in used]


def _kind(kind: Kind) -> str:
    facts = [
        ("made by", kind.by),
        ("parent", kind.parent),
        ("links", kind.links),
        ("attributes", codes(kind.always)),
        ("and where they say something", codes(kind.sometimes)),
        ("events", codes(kind.events)),
    ]
    lines = [f"- {what}: {fact}" for what, fact in facts if fact]
    return "\n".join([f"## {kind.name}\n", f"{kind.about}.\n", *lines, ""])
