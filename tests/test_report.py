"""The report: every figure beside the paper's, nothing foreign inside, stale results marked, readable by everyone."""

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from course_lib.course import report
from course_lib.course import run as runner

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n-").decode()
FRAME = f'src="data:image/png;base64,{PNG}"'
FLIPBOOK = (
    '<figure class="flipbook"><label>threshold <input type="range" min="0" max="1" value="0"></label>'
    f'<img alt="Frame at 0.1" {FRAME}><img alt="Frame at 0.2" hidden {FRAME}></figure>'
)


def result(number="01", **changes):
    return {
        "lesson": number,
        "profile": "mini",
        "seed": 0,
        "device": "cpu",
        "seconds": 61.2,
        "wall_seconds": 65.0,
        "peak_mb": 812,
        "cuda_peak_mb": None,
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "commit": "abc",
        "fingerprint": "f00d",
        "exercises": {"01.1": "PASS", "01.2": "PASS"},
        "figures": [
            {
                "name": "GT-known <localisation>",
                "value": 62.345678,
                "unit": "%",
                "paper": 48.1,
                "note": "other data & classes",
            },
            {"name": "top-1", "value": None, "unit": "%", "paper": None, "note": ""},
        ],
        **changes,
    }


def notebook(*outputs):
    cells = [
        nbformat.v4.new_markdown_cell("# 01 · Maps & masks"),
        nbformat.v4.new_code_cell("show()", outputs=list(outputs)),
    ]
    return nbformat.v4.new_notebook(cells=cells)


def output(metadata=None, **data):
    return nbformat.v4.new_output(
        "display_data", data={key.replace("_", "/"): value for key, value in data.items()}, metadata=metadata or {}
    )


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "commit", lambda: "abc")
    (tmp_path / "results").mkdir()
    (tmp_path / "run").mkdir()

    def write(*results, outputs=(), bench=None):
        for entry in results:
            (tmp_path / "results" / f"{entry['lesson']}.json").write_text(json.dumps(entry))
        if bench:
            (tmp_path / "results" / "bench.json").write_text(json.dumps(bench))
        nbformat.write(notebook(*outputs), tmp_path / "run" / "01_maps.ipynb")
        return report.write(tmp_path / "results", tmp_path / "run", tmp_path / "report.html", "mini").read_text()

    return write


class Balance(HTMLParser):
    """Tags that are opened are closed, in order; cells know their scope; pictures have alternatives."""

    VOID = frozenset(("meta", "img", "input", "br"))

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_figures_stand_beside_those_of_the_paper(page):
    text = page(result())
    row = re.search(r'<tr><th scope="row">GT-known.*?</tr>', text, re.S)[0]
    assert "GT-known &lt;localisation&gt;" in row and "<strong>62.35 %</strong>" in row and "48.1 %" in row
    assert "other data &amp; classes" in row
    for piece in ("61.2", "65", "812", "f00d", "2 of 2", "torch", "2.14.1", "01 · Maps &amp; masks"):
        assert piece in text
    assert "stale" not in text.split("</style>")[1] and "ran through" in text


@pytest.mark.parametrize(
    "changes, mark",
    [
        ({"commit": "old"}, "stale: measured at commit old"),
        ({"profile": "smoke"}, "stale: measured in the profile smoke"),
        (
            {"commit": None, "profile": "paper"},
            "stale: measured in the profile paper, with sources of no known commit",
        ),
    ],
)
def test_results_of_another_commit_or_profile_are_marked(page, changes, mark):
    assert page(result(**changes)).count(mark + "<") == 2  # beside the lesson and over its figures


def test_what_is_damaged_is_said_in_its_row_and_the_rest_is_shown(page, tmp_path):
    (tmp_path / "results" / "02.json").write_text('{"lesson": "02", "profi')
    (tmp_path / "results" / "03.json").write_text('{"lesson": "03", "profile": "mini", "figures": [{"name": 3}]}')
    (tmp_path / "run" / "04_x.ipynb").write_text('{"cells": [{"cell_ty')
    text = page(result(), result("04"))
    assert "ran through" in text and "failed: " in text and not Balance(text).open
    assert "02.json: expected JSON" in text and "03.json: expected the result of a lesson, got another figures" in text
    assert re.search(r"its notebook \S*04_x.ipynb cannot be read", text) and text.count("GT-known") == 2


def test_rows_of_another_run_are_marked_and_what_no_run_measured_is_not_shown(page):
    new, old = ({"run": run, "time": f"2026-11-2{day}T10:00:00+0000"} for run, day in (("b", 5), ("a", 4)))
    text = page(result(**new), result("02", **old), result("03", run=None, time="2026-11-26T10:00:00+0000"))
    assert text.count("stale: measured by an earlier run, of 2026-11-24 10:00<") == 2 and text.count("stale:") == 3
    assert "not measured by `make run`" in text and text.count("GT-known") == 2


def test_a_failed_lesson_is_said_and_shows_no_figures(page):
    text = page(result(), {"lesson": "02", "profile": "mini", "failed": "ValueError: <broken>", "wall_seconds": 3.0})
    assert "failed: ValueError: &lt;broken&gt;" in text and text.count("GT-known") == 1


def test_pictures_are_inside_with_their_alternatives(page):
    text = page(
        result(),
        outputs=[
            output(image_png=PNG, metadata={"image/png": {"alt": 'a "bird" & its box'}}),
            output(
                text_html=f'<img alt="A heatmap &amp; more" src="data:image/jpeg;base64,{PNG}">', text_plain="[figure]"
            ),
            output(text_html=FLIPBOOK),
            output(text_plain="3"),
        ],
    )
    images = [attributes for tag, attributes in Balance(text).seen if tag == "img"]
    assert [image["alt"] for image in images] == [
        'a "bird" & its box',
        "A heatmap & more",
        "Frame at 0.1",
        "Frame at 0.2",
    ]
    assert all(image["src"].startswith("data:image/") for image in images)
    assert 'type="range"' in text and text.count("<figcaption>") == 3


def test_the_page_is_whole_and_stands_alone(page):
    text = page(
        result(),
        outputs=[output(text_html=FLIPBOOK)],
        bench={
            "rows": [{"what": "20 maps", "ours_ms": 3.2, "theirs_ms": 64, "ratio": 20.0}],
            "versions": {"torchcam": "0.4"},
        },
    )
    checked = Balance(text)
    assert not checked.open
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text and "@import" not in text
    assert all("scope" in attributes for tag, attributes in checked.seen if tag == "th")
    tags = [tag for tag, _ in checked.seen]
    assert tags.count("caption") == tags.count("table") == 4 and tags.count("h1") == 1
    assert "torchcam 0.4" in text and "20 maps" in text and "theirs ms" in text
    anchors = {attributes["href"][1:] for tag, attributes in checked.seen if tag == "a"}
    assert anchors <= {attributes.get("id") for _, attributes in checked.seen}


def test_a_result_of_another_run_at_no_known_time_is_marked(page):
    text = page(result(run="b", time="2026-11-25T10:00:00+0000"), result("02", run="a"))
    assert text.count("stale: measured by an earlier run<") == 2


@pytest.mark.parametrize("measured, mark", [("abc", ""), ("old", "at commit old"), (None, "with sources of no known")])
def test_a_benchmark_of_another_commit_is_marked(page, measured, mark):
    text = page(result(), bench={"commit": measured, "rows": [{"what": "20 maps", "ratio": 20.0}]})
    assert f"stale: measured {mark}" in text if mark else "stale: measured" not in text


def test_nothing_measured_yet(tmp_path):
    text = report.write(tmp_path / "none", tmp_path / "none", tmp_path / "report.html").read_text()
    assert "No lesson has been run yet" in text and not Balance(text).open


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1])
def test_text_is_readable_in_light_and_dark(mode):
    blocks = re.findall(r":root \{(.*?)\}", report.STYLE, re.S)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[mode]))
    for text in ("ink", "dim", "mark", "warn", "bad", "good"):
        for ground in ("paper", "card"):
            high, low = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)  # WCAG 2.1 AA


def lesson_notebook(path, source):
    parameters = nbformat.v4.new_code_cell('PROFILE = "mini"', metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[parameters, nbformat.v4.new_code_cell(source)],
        metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    )
    nbformat.write(notebook, path)
    return path


def test_the_runner_goes_on_after_a_failure_and_replaces_old_figures(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "01.json").write_text(json.dumps(result()))
    finish = (
        'import os, json\nassert (PROFILE, os.environ["COURSE_STRICT"]) == ("smoke", "1")\n'
        'json.dump({"lesson": "02"}, open(os.environ["COURSE_RESULTS"] + "/02.json", "w"))'
    )
    notebooks = [
        lesson_notebook(tmp_path / "01_broken.ipynb", 'raise ValueError("a broken lesson")'),
        lesson_notebook(tmp_path / "02_sound.ipynb", finish),
        lesson_notebook(tmp_path / "03_silent.ipynb", "1 + 1"),
    ]
    assert runner.run(notebooks, tmp_path / "run", "smoke", strict=True, at_once=2) == ["01_broken"]
    said = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert said["01"] | {"lesson": "01", "profile": "smoke", "failed": "ValueError: a broken lesson"} == said["01"]
    assert {"commit", "run", "time"} < set(said["01"])
    assert said["02"]["wall_seconds"] > 0
    assert said["03"]["failed"] == "ran, but did not end with lesson.finish()"
    noise = capfd.readouterr().err
    assert "01_broken failed: ValueError: a broken lesson" in noise
    assert re.search(r"0[123]_\w+ +[^\n]*/3 cells", noise)  # a bar; how far it is drawn is a matter of time
    assert re.search(r"^02_sound +ran in 0 min \d\d s$", noise, re.M)
    assert "TCP" not in noise and "KeyboardInterrupt" not in noise


def test_a_run_into_a_folder_leaves_results_and_report_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(runner.build, "build_solved", lambda *_: [Path("01_x.ipynb")])
    monkeypatch.setattr(
        runner, "run", lambda *asked, strict, at_once: seen.append((*asked, os.environ["COURSE_RESULTS"])) or []
    )
    monkeypatch.setattr(report, "write", lambda *_: pytest.fail("a report of a run elsewhere"))
    seen, other = [], tmp_path / "other"
    assert runner.main(profile="smoke", into=str(other)) == 0
    assert seen == [([Path("01_x.ipynb")], other, "smoke", str(other / "results"))]
    assert capsys.readouterr().out == "1 of 1 lessons ran.\n"
