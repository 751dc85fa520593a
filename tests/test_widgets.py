"""Widgets: `live` follows its controls, `flipbook` turns without a kernel; both describe what they show."""

import json
import re
from html import unescape

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from skimage import data

from course_lib.show import plots, widgets

PHOTO = data.chelsea()[:224, 100:324]


def draw(**values: object) -> Figure:
    return plots.grid([PHOTO], [json.dumps(values)])


def book(monkeypatch, *args, **kwargs) -> str:
    shown = []
    monkeypatch.setattr(widgets, "display", lambda html: shown.append(html.data))
    widgets.flipbook(*args, **kwargs)
    return shown[0]


def test_live_redraws_with_the_values_of_all_controls():
    seen = []

    def recorded(**values):
        seen.append(values)
        return draw(**values)

    threshold, label = (
        ipywidgets.FloatSlider(0.2, max=1),
        ipywidgets.Dropdown(options=["cat", "dog"], description="class"),
    )
    box = widgets.live(
        recorded, alt=lambda threshold, label: f"{label} at {threshold}", threshold=threshold, label=label
    )
    first = box.children[-1].value
    assert 'alt="cat at 0.2"' in first
    threshold.value = 0.5
    label.value = "dog"
    assert seen == [
        {"threshold": 0.2, "label": "cat"},
        {"threshold": 0.5, "label": "cat"},
        {"threshold": 0.5, "label": "dog"},
    ]
    assert 'alt="dog at 0.5"' in box.children[-1].value and box.children[-1].value.count("<img") == 1
    assert [control.description for control in box.children[:-1]] == ["threshold", "class"]
    assert not any(isinstance(child, ipywidgets.Output) for child in box.children)
    assert not plt.get_fignums()


def test_live_shows_what_went_wrong_and_recovers():
    def fragile(threshold):
        if threshold > 0.5:
            raise RuntimeError("no <box> above 0.5")
        return draw(threshold=threshold)

    slider = ipywidgets.FloatSlider(0.2, max=1)
    box = widgets.live(fragile, alt="a cat", threshold=slider)
    with pytest.raises(RuntimeError):
        slider.value = 0.9
    assert 'role="alert"' in box.children[-1].value and "no &lt;box&gt; above 0.5" in box.children[-1].value
    slider.value = 0.1
    assert "<img" in box.children[-1].value
    with pytest.raises(ZeroDivisionError):  # the first picture fails in the cell itself
        widgets.live(lambda threshold: 1 / 0, alt="a cat", threshold=slider)


def test_live_needs_controls_and_a_description():
    with pytest.raises(ValueError, match="at least one control"):
        widgets.live(draw, alt="a cat")
    with pytest.raises(ValueError, match="alternative text"):
        widgets.live(draw, alt="", threshold=ipywidgets.FloatSlider())


def test_a_flipbook_is_one_labelled_slider_over_described_frames(monkeypatch):
    html = book(
        monkeypatch,
        lambda v: draw(value=v),
        [0.1, 0.2, 0.30000000000000004],
        label="threshold (share)",
        alt=lambda v: f"box at {v:.1f}",
    )
    assert re.findall(r'alt="([^"]+)"', html) == ["box at 0.1", "box at 0.2", "box at 0.3"]
    frames = re.findall(r"<img [^>]*>", html)
    assert ["hidden" in frame for frame in frames] == [False, True, True]
    slider = re.search(r"<label>threshold \(share\) (<input [^>]*>)</label>", html)[1]
    assert 'min="0" max="2" value="0"' in slider and 'data-lm-suppress-shortcuts="true"' in slider
    assert '["0.1", "0.2", "0.3"]' in unescape(slider) and "<output>0.1</output>" in html
    assert not plt.get_fignums()


def test_a_flipbook_is_the_same_every_time_and_compact(monkeypatch):
    def make():
        return book(
            monkeypatch,
            lambda v: plots.grid([PHOTO] * 2, [f"{v}", "x"], predicted=[[v, v, 200, 200]] * 2),
            range(0, 110, 10),
            label="corner (pixels)",
            alt=lambda v: f"a box from {v}",
        )

    html = make()
    assert html == make()
    assert len(html) < 400_000


def test_an_empty_flipbook_and_names_with_markup(monkeypatch):
    with pytest.raises(ValueError, match="at least one value"):
        widgets.flipbook(draw, [], label="x", alt=str)
    html = book(monkeypatch, lambda v: draw(value=v), ["<a>", "'b\""], label="<x>", alt=str)
    assert "<a>" not in html.replace(unescape(html), "") and "&lt;x&gt;" in html and "&lt;a&gt;" in html
