"""One page with everything that was measured: figures beside those of the papers, time, memory, speed, pictures.

The page stands alone: pictures and styles are inside. It reads build/results/*.json and the executed notebooks.
"""

import re
from collections import defaultdict
from html import unescape
from pathlib import Path
from typing import Any, Literal

import jinja2
import nbformat
from markupsafe import Markup
from nbformat import NotebookNode

from course_lib import evidence, paths
from course_lib.course import build
from course_lib.data.files import BrokenFile, read_json
from course_lib.lesson import PROFILES, commit, with_unit

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --dim: #55606e; --paper: #fdfdfb; --card: #ffffff; --line: #d9dde3;
        --mark: #12508f; --warn: #8a4b00; --bad: #a3172a; --good: #1a6634; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #a5afbd; --paper: #14181e; --card: #1b2129;
        --line: #343d49; --mark: #8fc1f7; --warn: #f0b565; --bad: #ff9aa5; --good: #86d9a2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-bottom: .25rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; } .dim, caption, figcaption, small { color: var(--dim); } a { color: var(--mark); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: .5rem;
          background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .75rem; font-size: .9rem; position: sticky; left: 0;
          max-width: calc(100vw - 2.5rem); }
th, td { padding: .45rem .75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { font-size: .85rem; color: var(--dim); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; min-width: min(15rem, 38vw); } td strong { font-weight: 650; }
.number { text-align: right; white-space: nowrap; } td.note { min-width: 14rem; font-size: .9rem; }
.stale { color: var(--warn); } .failed { color: var(--bad); } .passed { color: var(--good); }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
            align-items: start; }
figure { margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto .5rem; background: #fff;
             border-radius: .25rem; }
figure figure { padding: 0; border: 0; } figure img[hidden] { display: none; }
figure input[type=range] { width: min(100%, 18rem); vertical-align: middle; } figcaption { font-size: .9rem; }
"""

SECTIONS = {
    "lessons": "Lessons",
    "figures": "What was measured",
    "speed": "Speed",
    "pictures": "Pictures",
    "versions": "Made with",
}
PAGE = """\
{% macro section(id) %}
{% if id in sections %}
<section aria-labelledby="{{ id }}"><h2 id="{{ id }}">{{ sections[id] }}</h2>
{{ caller() }}</section>
{% endif %}
{% endmacro %}
{% macro table(caption, columns) %}
<div class="scroll" role="region" aria-label="{{ caption }}" tabindex="0"><table><caption>{{ caption }}</caption>
<thead><tr>
{% for column, kind in columns.items() %}
<th scope="col"{{ {"class": kind} | xmlattr }}>{{ column }}</th>
{% endfor %}
</tr></thead><tbody>
{{ caller() }}</tbody></table></div>
{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>From Maps to Masks: report</title>
<style>{{ style }}</style></head>
<body><header><h1>From Maps to Masks</h1>
<p class="dim">What the lessons measured, in the profile “{{ profile }}”
{%- if commit %}, at commit {{ commit }}{% endif %}.</p>
<nav aria-label="Sections"><ul>
{% for id, title in sections.items() %}
<li><a href="#{{ id }}">{{ title }}</a></li>
{% endfor %}
</ul></nav></header><main>

{% call section("lessons") %}
{% set columns = {"Lesson": none, "State": none, "Exercises": "number", "Seconds": "number",
                  "with start": "number", "Peak MB": "number", "Device": none, "Data": none} %}
{% set caption = "Time from set-up to the last cell, and with the kernel’s start; most memory held; " ~
                 "fingerprint of the data." %}
{% if lessons %}
{% call table(caption, columns) %}
{% for lesson in lessons %}
<tr><th scope="row">{{ lesson.title }}</th>
{% if lesson.failed %}
<td><span class="failed">failed: {{ lesson.failed }}</span></td>
{% elif lesson.stale %}
<td><span class="stale">stale: measured {{ lesson.stale }}</span></td>
{% else %}
<td><span class="passed">ran through</span>
{%- if lesson.torn %}, <span class="failed">{{ lesson.torn }}</span>{% endif %}</td>
{% endif %}
<td class="number">{{ lesson.passed }}</td>
{% for name in ("seconds", "wall_seconds", "peak_mb") %}
<td class="number">{{ lesson.get(name) | with_unit }}</td>
{% endfor %}
<td>{{ lesson.device or "–" }}</td><td>{{ lesson.fingerprint or "–" }}</td></tr>
{% endfor %}
{% endcall %}
{% else %}
<p>No lesson has been run yet: <code>make run</code>.</p>
{% endif %}
{% endcall %}

{% call section("figures") %}
{% for lesson in lessons if lesson.figures %}
{% set columns = {"Figure": none, "Measured": "number", lesson.evidence.seeds | length ~ " seeds": "number",
                  "In the paper": "number", "Note": "note"} %}
{% call table(lesson.title ~ (", stale: measured " ~ lesson.stale if lesson.stale), columns) %}
{% for figure in lesson.figures %}
{% set known = lesson.evidence.figures[figure.name] %}
<tr><th scope="row">{{ figure.name }}</th>
<td class="number"><strong>{{ figure.value | with_unit(figure.unit) }}</strong></td>
<td class="number">{{ known["values"] | over_seeds if known else "–" }}</td>
<td class="number">{{ figure.get("paper") | with_unit(figure.unit) }}</td>
<td class="note">{{ figure.note }}</td></tr>
{% endfor %}
{% endcall %}
{% endfor %}
{% endcall %}

{% call section("speed") %}
{% call table(bench.caption, bench.columns) %}
{% for row in bench.rows %}
<tr>
{% for column, kind in bench.columns.items() %}
{% if loop.first %}
<th scope="row">{{ row[column] | with_unit }}</th>
{% else %}
<td{{ {"class": kind} | xmlattr }}>{{ row[column] | with_unit }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
{% endcall %}
{% endcall %}

{% call section("pictures") %}
{% for heading, pictures in albums if pictures %}
<h3>{{ heading }}</h3><div class="pictures">
{% for picture, alternative in pictures %}
<figure>{{ picture }}<figcaption>{{ alternative }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
{% endcall %}

{% call section("versions") %}
{% call table("Versions that the figures were measured with", {"Package": none, "Version": none}) %}
{% for name, found in versions.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ found | sort | join(", ") }}</td></tr>
{% endfor %}
{% endcall %}
{% endcall %}
</main></body></html>
"""


def write(results: Path, executed: Path, target: Path, profile: str = "mini") -> Path:
    """Write the report; returns its path.

    Args:
        results: folder with NN.json of the lessons and, if the benchmark was run, bench.json.
        executed: folder with executed notebooks, for their pictures.
        target: the page.
        profile: the profile that results should have; others are marked as stale.
    """
    lessons = [_readable(path) for path in sorted(results.glob("[0-9][0-9].json"))]
    _, newest = max(((one.get("time", ""), one["run"]) for one in lessons if one.get("run")), default=("", None))
    notebooks, torn = {}, {}
    for path in sorted(executed.glob("[0-9][0-9]_*.ipynb")):
        try:
            notebooks[path.stem[:2]] = nbformat.read(path, 4)
        except Exception as error:  # nbformat and what it reads with raise nearly anything
            torn[path.stem[:2]] = f"its notebook {path} cannot be read ({type(error).__name__}); run the lesson again"
    albums = [(_title(notebook, number), pictures(notebook)) for number, notebook in notebooks.items()]
    versions = defaultdict(set)
    for lesson in lessons:
        number, verdicts = lesson["lesson"], list(lesson.get("exercises", {}).values())
        lesson["title"] = _title(notebooks.get(number), number)
        lesson["stale"] = _stale(lesson, profile, newest)
        lesson["torn"] = torn.get(number)
        lesson["passed"] = f"{verdicts.count('PASS')} of {len(verdicts)}" if verdicts else "–"
        lesson["evidence"] = evidence.table(number) or {"seeds": [], "figures": {}}
        for name, version in lesson.get("versions", {}).items():
            versions[name].add(str(version))
    bench = _bench(results / "bench.json")
    shown = {
        "lessons": True,
        "figures": any(lesson.get("figures") for lesson in lessons),
        "speed": bench,
        "pictures": any(found for _, found in albums),
        "versions": versions,
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"with_unit": with_unit, "over_seeds": evidence.over_seeds}
    page = environment.from_string(PAGE).render(
        style=Markup(STYLE),
        profile=profile,
        commit=commit(),
        sections={name: title for name, title in SECTIONS.items() if shown[name]},
        lessons=lessons,
        bench=bench,
        albums=albums,
        versions=versions,
    )
    paths.write_text(target, page.lstrip() + "\n")
    return target


def write_readme(root: Path, results: Path) -> None:
    """Write the table of lessons into README.md: minutes, badge, and seconds and memory of the last mini run."""
    where = build.address(root)
    rows = ["| lesson | to work through | computes | memory | open |", "|---|---|---|---|---|"]
    for source in build.sources(root / "notebooks" / "src"):
        number, result = source.stem[:2], results / f"{source.stem[:2]}.json"
        minutes = re.search(r"\*\*Time\*\* (?:about )?(\d+) min", source.read_text("utf-8"))[1]
        measured = read_result(result) if result.is_file() else {}
        if measured.get("profile") != "mini" or not {"seconds", "peak_mb"} <= measured.keys():
            raise ValueError(f"Lesson {number} has no result of the mini profile in {results}: run `make run` first.")
        rows.append(
            f"| [{build.title(source)}](notebooks/{source.stem}.ipynb) | {minutes} min | {measured['seconds']:.0f} s | "
            f"{measured['peak_mb'] / 1000:.1f} GB | {build.badge(source, where)} |"
        )
    page, table = root / "README.md", "\n".join(rows)
    text = re.sub(
        "(<!-- lessons:.*?-->\n).*?(?=<!-- /lessons -->)",
        lambda start: f"{start[1]}{table}\n",
        page.read_text("utf-8"),
        flags=re.DOTALL,
    )
    paths.write_text(page, text)


# Kinds of what a result holds, and of what each of its figures does.
TEXTS, MAPPINGS = ("lesson", "profile", "time", "failed"), ("exercises", "versions")
RESULT = dict.fromkeys(TEXTS, str) | dict.fromkeys(MAPPINGS, dict) | {"figures": list}
FIGURE = {"name": str, "unit": str, "value": int | float | str | None}


def read_result(path: Path) -> dict[str, Any]:
    """The result of a lesson.

    Raises:
        FileNotFoundError: there is none.
        BrokenFile: it is damaged, or no lesson has written it.
    """
    found = {"figures": [], "seed": None} | read_json(path)
    wrong = [name for name, kind in RESULT.items() if not isinstance(found.get(name, kind()), kind)]
    wrong += [name for name in ("lesson", "profile") if name not in found]
    for figure in () if wrong else found["figures"]:
        whole = isinstance(figure, dict) and FIGURE.keys() <= figure.keys()
        if not (whole and all(isinstance(figure[name], kind) for name, kind in FIGURE.items())):
            wrong = ["figures"]
    if wrong:
        raise BrokenFile(f"{path}: expected the result of a lesson, got another {', '.join(wrong)}; run it again.")
    return found


def _readable(path: Path) -> dict[str, Any]:
    """The result of a lesson, or in its place that it cannot be read."""
    try:
        found = read_result(path)
    except (OSError, BrokenFile) as error:
        return {"lesson": path.stem, "profile": "", "failed": str(error)}
    if found.get("run", "") is None:  # a lesson that somebody worked through; its figures are not the course's
        found |= {"failed": "not measured by `make run`", "figures": []}
    return found


def main(profile: Literal[PROFILES] = "mini", readme: bool = False) -> None:
    """Write build/report.html from the results and executed notebooks that are there.

    Args:
        profile: results of others are marked.
        readme: also write the table of lessons into README.md.
    """
    place, results = build.place(profile), build.measured(profile)
    print(write(results, place / "run", place / "report.html", profile))
    if readme:
        write_readme(build.course_root(), results)


def pictures(notebook: NotebookNode) -> list[tuple[Markup, str]]:
    """The pictures of an executed notebook in order, as (HTML without scripts from outside, text alternative)."""
    found = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output):
        html = "".join(output.data.get("text/html", ""))
        mime = next((mime for mime in ("image/png", "image/jpeg") if mime in output.data), None)
        if 'type="range"' in html:  # a flipbook: all its frames, and it still flips
            found.append((Markup(html), f"{html.count('<img')} frames; turn them with the slider"))
        elif mime:
            alt = output.metadata.get(mime, {}).get("alt", "") or _alt(html)
            source = "".join("".join(output.data[mime]).split())
            image = Markup('<img alt="{}" loading="lazy" src="data:{};base64,{}">').format(alt, mime, source)
            found.append((image, alt))
        else:
            images = re.findall(r"<img\b[^>]*>", html)
            found += [(Markup(image), _alt(image)) for image in images if 'src="data:' in image]
    return found


def _alt(html: str) -> str:
    found = re.search(r'alt="([^"]*)"', html)
    return unescape(found[1]) if found else ""


def _title(notebook: NotebookNode | None, number: str) -> str:
    """The lesson's first heading, or its number if there is no executed notebook."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown") if notebook else ""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else f"Lesson {number}"


def _stale(result: dict[str, Any], profile: str, run: str | None) -> str:
    """Why a result does not belong to this report; empty if it does.

    Args:
        run: name of the newest one.
    """
    reasons = []
    if result.get("run") != run:
        when = result.get("time", "")[:16].replace("T", " ")
        reasons.append(f"by an earlier run, of {when}" if when else "by an earlier run")
    if result["profile"] != profile:
        reasons.append(f"in the profile {result['profile']}")
    if result.get("commit", commit()) != commit():
        reasons.append(_at(result["commit"]))
    return ", ".join(reasons)


def _at(measured: str | None) -> str:
    """Which sources something was measured with, in words."""
    return f"at commit {measured}" if measured else "with sources of no known commit"


def _bench(path: Path) -> dict[str, Any]:
    """The table of a benchmark, nothing if there is none: its caption, {column: class of its cells}, and rows."""
    bench = read_json(path) if path.is_file() else {}
    if not bench.get("rows"):
        return {}
    versions = ", ".join(f"{name} {version}" for name, version in bench.get("versions", {}).items())
    caption = f"Ours and others, side by side in one run, one thread, median of several. {versions}"
    if bench.get("commit") != commit():
        caption += f", stale: measured {_at(bench.get('commit'))}"
    rows = [{name.replace("_", " "): row.get(name) for name in bench["rows"][0]} for row in bench["rows"]]
    numbers = {name for name in rows[0] if all(isinstance(row[name], int | float) for row in rows)}
    return {
        "caption": caption,
        "columns": {name: "number" if name in numbers else None for name in rows[0]},
        "rows": rows,
    }
