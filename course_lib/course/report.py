"""One page with everything that was measured: figures beside those of the papers, time, memory, speed, pictures.

The page stands alone: pictures and styles are inside. It reads build/results/*.json and the executed notebooks.
"""

import argparse
import json
import re
import sys
from collections.abc import Set
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from course_lib import paths
from course_lib.course import build
from course_lib.lesson import PROFILES, commit, evidence, over_seeds, with_unit

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
.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .75rem; font-size: .9rem; position: sticky; left: 0; max-width: calc(100vw - 2.5rem); }
th, td { padding: .45rem .75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { font-size: .85rem; color: var(--dim); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; min-width: min(15rem, 38vw); } .number { text-align: right; white-space: nowrap; } td.note { min-width: 14rem; font-size: .9rem; }
td strong { font-weight: 650; } .stale { color: var(--warn); } .failed { color: var(--bad); } .passed { color: var(--good); }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); align-items: start; }
figure { margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto .5rem; background: #fff; border-radius: .25rem; }
figure figure { padding: 0; border: 0; } figure img[hidden] { display: none; } figure input[type=range] { width: min(100%, 18rem); vertical-align: middle; }
figcaption { font-size: .9rem; }
"""


def write(results: Path, executed: Path, target: Path, profile: str = "mini") -> Path:
    """Write the report; returns its path.

    Args:
        results: folder with NN.json of the lessons and, if the benchmark was run, bench.json.
        executed: folder with executed notebooks, for their pictures.
        target: the page.
        profile: the profile that results should have; others are marked as stale.
    """
    lessons = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("[0-9][0-9].json"))]
    notebooks = {
        path.stem.split("_")[0]: nbformat.read(path, 4) for path in sorted(executed.glob("[0-9][0-9]_*.ipynb"))
    }
    bench = results / "bench.json"
    parts = {
        "lessons": ("Lessons", _lessons(lessons, notebooks, profile)),
        "figures": ("What was measured", _figures(lessons, notebooks, profile)),
        "speed": ("Speed", _bench(json.loads(bench.read_text(encoding="utf-8"))) if bench.is_file() else ""),
        "pictures": ("Pictures", "".join(_pictures(number, notebook) for number, notebook in notebooks.items())),
        "versions": ("Made with", _versions(lessons)),
    }
    parts = {name: (title, body) for name, (title, body) in parts.items() if body}
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in parts.items())
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{body}</section>'
        for name, (title, body) in parts.items()
    )
    paths.write_text(
        target,
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><title>From Maps to Masks: report</title>'
            f"<style>{STYLE}</style></head><body><header><h1>From Maps to Masks</h1>"
            f'<p class="dim">What the lessons measured, in the profile “{escape(profile)}”'
            f"{f', at commit {escape(commit() or str())}' if commit() else ''}.</p>"
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main></body></html>\n'
        ),
    )
    return target


def readme(root: Path, results: Path) -> None:
    """Write the table of lessons into README.md of the checkout: minutes, badge, and the seconds of the last mini run."""
    where, rows = build.address(root), ["| lesson | to work through | computes | open |", "|---|---|---|---|"]
    for source in build.sources(root / "notebooks" / "src"):
        text, result = source.read_text(encoding="utf-8"), results / f"{source.stem[:2]}.json"
        title, minutes = re.search(r"^# # (.+)$", text, re.M)[1], re.search(r"\*\*Time\*\* (\d+) min", text)[1]
        measured = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        if measured.get("profile") != "mini" or "seconds" not in measured:
            sys.exit(f"Lesson {source.stem[:2]} has no result of the mini profile in {results}: run `make run` first.")
        rows.append(
            f"| [{title}](notebooks/{source.stem}.ipynb) | {minutes} min | {measured['seconds']:.0f} s | "
            f"{build.badge(source, where)} |"
        )
    page = root / "README.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- lessons:", 1)
    start, after = rest.split("-->", 1)[0], rest.split("<!-- /lessons -->", 1)[1]
    paths.write_text(page, f"{before}<!-- lessons:{start}-->\n" + "\n".join(rows) + f"\n<!-- /lessons -->{after}")


def main(argv: list[str]) -> int:
    """`python -m course_lib report [--profile mini] [--readme]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib report",
        description="Write build/report.html from the results and executed notebooks that are there.",
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default="mini", help="results of others are marked (default: mini)"
    )
    parser.add_argument("--readme", action="store_true", help="also write the table of lessons into README.md")
    arguments = parser.parse_args(argv)
    root = paths.checkout()
    if root is None:
        sys.exit("The report is made in a checkout of the course, but course_lib is installed without one.")
    print(write(paths.results(), root / "build" / "run", root / "build" / "report.html", arguments.profile))
    if arguments.readme:
        readme(root, paths.results())
    return 0


def pictures(notebook: NotebookNode) -> list[tuple[str, str]]:
    """The pictures of an executed notebook in order, as (HTML without scripts from outside, text alternative)."""
    found = []
    for data, metadata in _outputs(notebook):
        html = "".join(data.get("text/html", ""))
        if 'type="range"' in html:  # a flipbook: all its frames, and it still flips
            found.append((html, f"{html.count('<img')} frames; turn them with the slider"))
            continue
        for mime in ("image/png", "image/jpeg"):
            if mime in data:
                alt = metadata.get(mime, {}).get("alt", "") or _alt(html)
                source = "".join("".join(data[mime]).split())
                found.append((f'<img alt="{escape(alt)}" loading="lazy" src="data:{mime};base64,{source}">', alt))
                break
        else:
            found += [(image, _alt(image)) for image in re.findall(r"<img\b[^>]*>", html) if 'src="data:' in image]
    return found


def _outputs(notebook: NotebookNode) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [
        (output.data, output.metadata)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]


def _alt(html: str) -> str:
    found = re.search(r'alt="([^"]*)"', html)
    return found[1] if found else ""


def _stale(result: dict[str, Any], profile: str) -> str:
    """Why a result does not belong to this report; empty if it does."""
    reasons = [f"profile {result['profile']}"] * (result["profile"] != profile)
    if "commit" in result and result["commit"] != commit():
        reasons.append(f"commit {result['commit']}")
    return " and ".join(reasons)


def _table(
    caption: str, header: list[str], rows: list[list[str]], numbers: Set[int] = frozenset(), note: int = -1
) -> str:
    """A table from cells that are HTML already; the first cell of each row is its header."""
    kind = ["number" if i in numbers else "note" if i == note else "" for i in range(len(header))]
    kind = [f' class="{name}"' if name else "" for name in kind]
    head = "".join(f'<th scope="col"{kind[i]}>{title}</th>' for i, title in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row"{kind[0]}>{cell}</th>' if i == 0 else f"<td{kind[i]}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _lessons(lessons: list[dict[str, Any]], notebooks: dict[str, NotebookNode], profile: str) -> str:
    rows = []
    for result in lessons:
        number = result["lesson"]
        if "failed" in result:
            state = f'<span class="failed">failed: {escape(result["failed"])}</span>'
        elif why := _stale(result, profile):
            state = f'<span class="stale">stale: measured with {escape(why)}</span>'
        else:
            state = '<span class="passed">ran through</span>'
        exercises = result.get("exercises", {})
        passed = sum(verdict == "PASS" for verdict in exercises.values())
        rows.append(
            [
                escape(_title(notebooks.get(number), number)),
                state,
                f"{passed} of {len(exercises)}" if exercises else "–",
                with_unit(result.get("seconds")),
                with_unit(result.get("wall_seconds")),
                with_unit(result.get("peak_mb")),
                escape(result.get("device", "–")),
                escape(result.get("fingerprint") or "–"),
            ]
        )
    header = ["Lesson", "State", "Exercises", "Seconds", "with start", "Peak MB", "Device", "Data"]
    caption = (
        "Time from set-up to the last cell, and with the kernel’s start; most memory held; fingerprint of the data."
    )
    return (
        _table(caption, header, rows, {2, 3, 4, 5})
        if rows
        else "<p>No lesson has been run yet: <code>make run</code>.</p>"
    )


def _figures(lessons: list[dict[str, Any]], notebooks: dict[str, NotebookNode], profile: str) -> str:
    tables = []
    for result in lessons:
        why = _stale(result, profile)
        table = evidence(result["lesson"]) or {"seeds": [], "figures": {}}
        rows = [
            [
                escape(figure["name"]),
                f"<strong>{escape(with_unit(figure['value'], figure['unit']))}</strong>",
                over_seeds(table["figures"][figure["name"]]["values"]) if figure["name"] in table["figures"] else "–",
                "–" if figure["paper"] is None else escape(with_unit(figure["paper"], figure["unit"])),
                escape(figure["note"]),
            ]
            for figure in result.get("figures", [])
        ]
        caption = escape(_title(notebooks.get(result["lesson"]), result["lesson"]))
        caption += f", stale: measured with {escape(why)}" if why else ""
        tables += (
            [
                _table(
                    caption,
                    ["Figure", "Measured", f"{len(table['seeds'])} seeds", "In the paper", "Note"],
                    rows,
                    {1, 2, 3},
                    4,
                )
            ]
            if rows
            else []
        )
    return "".join(tables)


def _bench(bench: dict[str, Any]) -> str:
    rows, header = bench["rows"], list(bench["rows"][0]) if bench["rows"] else []
    numbers = {i for i, name in enumerate(header) if all(isinstance(row.get(name), int | float) for row in rows)}
    cells = [[escape(with_unit(row.get(name))) for name in header] for row in rows]
    versions = ", ".join(
        f"{escape(name)} {escape(str(version))}" for name, version in bench.get("versions", {}).items()
    )
    caption = "Ours and others, side by side in one run, one thread, median of several. " + versions
    if bench.get("commit") != commit():
        caption += f", stale: measured with commit {escape(str(bench.get('commit')))}"
    return _table(caption, [escape(name.replace("_", " ")) for name in header], cells, numbers) if rows else ""


def _pictures(number: str, notebook: NotebookNode) -> str:
    items = "".join(f"<figure>{html}<figcaption>{alt}</figcaption></figure>" for html, alt in pictures(notebook))
    return f'<h3>{escape(_title(notebook, number))}</h3><div class="pictures">{items}</div>' if items else ""


def _versions(lessons: list[dict[str, Any]]) -> str:
    seen = {
        name: sorted({result["versions"][name] for result in lessons if name in result.get("versions", {})})
        for name in dict.fromkeys(name for result in lessons for name in result.get("versions", {}))
    }
    rows = [[escape(name), escape(", ".join(versions))] for name, versions in seen.items()]
    return _table("Versions that the figures were measured with", ["Package", "Version"], rows) if rows else ""


def _title(notebook: NotebookNode | None, number: str) -> str:
    """The lesson's first heading, or its number if there is no executed notebook."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown") if notebook else ""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else f"Lesson {number}"
