"""The picture is a document, and its longest bar belongs to the largest figure."""

from __future__ import annotations

from xml.etree import ElementTree

from load_tests.chart import FULL, PANELS, draw
from load_tests.measurement import Sample, summarise

SVG = "{http://www.w3.org/2000/svg}"


def test_a_bar_for_each_workload_and_figure() -> None:
    sample = Sample(first_token_s=0.1, total_s=1.1, num_tokens=11, num_cached=0)
    measurements = [summarise("single", 2.0, [sample]), summarise("<conc>", 1.0, [sample])]
    root = ElementTree.fromstring(draw(measurements, "a & b"))
    background, *bars = root.iter(f"{SVG}rect")
    assert len(bars) == len(PANELS) * 2
    assert [float(bar.attrib["width"]) for bar in bars[:2]] == [FULL / 2, FULL]
    assert float(background.attrib["height"]) >= float(bars[-1].attrib["y"])
    assert "<conc>" in [text.text for text in root.iter(f"{SVG}text")]


def test_nothing_measured_is_no_bar() -> None:
    root = ElementTree.fromstring(draw([], "nothing"))
    assert len(list(root.iter(f"{SVG}rect"))) == 1
