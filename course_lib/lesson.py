"""The frame of a lesson: `start` seeds, picks the device and finds the data; `finish` writes what was measured."""

import json
import math
import os
import platform
import random
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from course_lib import checks, evidence, paths
from course_lib.data.files import read_json

PROFILES = ("smoke", "mini", "paper")
PACKAGES = ("torch", "torchvision", "timm", "numpy")
Value = float | int | str | None


@dataclass(frozen=True)
class Lesson:
    """What a lesson knows about its run. Made by `start`."""

    number: str
    profile: str
    device: torch.device
    data: Path
    seed: int
    started: float = field(default_factory=time.perf_counter, repr=False)
    figures: dict[str, dict] = field(default_factory=dict, repr=False)  # by name, in order
    claims: dict[str, bool] = field(default_factory=dict, repr=False)  # what was said of them, and whether it held
    predictions: dict[str, Value] = field(default_factory=dict, repr=False)  # of the student

    def choose(self, *, smoke: Any, mini: Any, paper: Any) -> Any:
        """The value that belongs to this run's profile."""
        return {"smoke": smoke, "mini": mini, "paper": paper}[self.profile]

    def record(self, name: str, value: Any, unit: str = "", paper: Value = None, note: str = "") -> None:
        """Keep a measured figure for the lesson's table and the report; recording a name again replaces it.

        Args:
            name: what was measured, as it will stand in the table.
            value: a number, a word, None, or a tensor or array of one element.
            unit: such as "%" or "s".
            paper: the paper's figure for the same thing, in the same unit.
            note: what a reader must know to compare the two.
        """
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, Value):
            raise TypeError(
                f"A figure is a number, a word or None, but {name!r} is a {type(value).__name__}. "
                "Record one number at a time."
            )
        if isinstance(value, float) and not math.isfinite(value):
            value, note = None, f"{note} (came out as {value})".strip()
        self.figures.pop(name, None)
        self.figures[name] = {"name": name, "value": value, "unit": unit, "paper": paper, "note": note}

    def claim(self, sentence: str, holds: Any) -> None:
        """Say what was measured, with its numbers, if it is so in this run, and keep whether it is.

        Comparisons stand here and not in the text around a cell, so that none can drift from its numbers. The smoke
        profile has too little data to decide anything, and says so. A student sees a sentence that does not hold as
        just that; where results come from (COURSE_STRICT=1, mini profile, random seed 0) it stops the lesson.

        Args:
            sentence: such as f"W = P errs less than Dist-CAM: {a:.1f} against {b:.1f} %."
            holds: whether it is true here: a bool, or a tensor or array of one element.
        Raises:
            AssertionError: the sentence is no longer true where results come from.
        """
        if self.profile == "smoke":
            print(f"(too little data to say: {sentence})")
            return
        self.claims[sentence] = bool(holds)
        if not holds and os.environ.get("COURSE_STRICT") == "1" and (self.profile, self.seed) == ("mini", 0):
            raise AssertionError(
                f"The lesson says what was not measured: {sentence} Correct the sentence or its cause."
            )
        print(f"✓ {sentence}" if holds else f"✗ Not so in this run: {sentence}")

    def predict(self, name: str, guess: Value | bool = None) -> None:
        """Keep what a student expects, until `outcome` shows it beside what came. None costs nothing.

        Args:
            name: of the question, such as "02.b".
            guess: a number or a word, or None.
        """
        if not isinstance(guess, Value | bool):
            raise TypeError(
                f"Expected a number or a word as the prediction {name!r}, got a {type(guess).__name__}. "
                'Write it like 30 or "the cat".'
            )
        self.predictions[name] = guess
        if guess is not None:
            print(f"{name}: you expect {guess}.")

    def outcome(self, name: str, value: Any, unit: str = "") -> None:
        """Show what came beside what the student expected, if anything.

        Args:
            name: of the question, as `predict` had it.
            value: a number, a word, or a tensor or array of one element.
            unit: such as "%".
        """
        value = value.item() if hasattr(value, "item") else value
        guess = self.predictions.get(name)
        said = "no prediction was made" if guess is None else f"you expected {with_unit(guess, unit)}"
        print(f"{name}: {said}; measured: {with_unit(value, unit)}.")

    def finish(self, fingerprint: str = "") -> None:
        """Write <results>/<number>.json in one piece, and print what stands in it.

        Results of `run` go where it says (COURSE_RESULTS), with the name of the run; a student's go to work/results.

        Args:
            fingerprint: of the data set that the figures were measured on.
        """
        result = {
            "lesson": self.number,
            "profile": self.profile,
            "seed": self.seed,
            "device": str(self.device),
            "seconds": round(time.perf_counter() - self.started, 1),
            "peak_mb": round(peak_memory()),
            "cuda_peak_mb": round(torch.cuda.max_memory_allocated() / 2**20) if self.device.type == "cuda" else None,
            "versions": versions(),
            "commit": commit(),
            "run": os.environ.get("COURSE_RUN"),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "fingerprint": fingerprint,
            "exercises": dict(checks.status),
            "figures": list(self.figures.values()),
            "claims": [{"sentence": sentence, "holds": holds} for sentence, holds in self.claims.items()],
        }
        folder = paths.results() if os.environ.get("COURSE_RESULTS") else paths.work() / "results"
        path = folder / f"{self.number}.json"
        ending = f"written to {path}"
        try:
            paths.write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            ending = f"not written: {error}; set COURSE_RESULTS to a folder of your own and run this cell again"
        table = (evidence.table(self.number) if self.profile == "mini" else None) or {"seeds": [], "figures": {}}
        known = {name: evidence.over_seeds(figure["values"]) for name, figure in table["figures"].items()}
        rows = [("measured", "here", f"{len(table['seeds'])} seeds", "in the paper", "note")]
        for name, figure in self.figures.items():
            paper = "" if figure["paper"] is None else with_unit(figure["paper"], figure["unit"])
            rows.append((name, with_unit(figure["value"], figure["unit"]), known.get(name, ""), paper, figure["note"]))
        print(*_columns(rows) if self.figures else ["(no figure recorded)"], sep="\n")
        if self.claims:
            print(f"{sum(self.claims.values())} of {len(self.claims)} claims hold in this run.")
        for exercise in checks.status:
            print(checks.verdict(exercise))
        print(f"{result['seconds']} s, {result['peak_mb']} MB at most; {ending}")


def start(
    number: str, profile: str = "mini", data_root: str | Path = "", device: str = "auto", seed: int = 0
) -> Lesson:
    """Begin a lesson: seeds Python, NumPy and torch, picks the device, sets the look of plots, and says so in one line.

    COURSE_PROFILE, COURSE_DATA and COURSE_DEVICE of the environment go before the arguments.

    Args:
        number: of the lesson, such as "01".
        profile: "smoke" (seconds: does it run), "mini" (minutes on a CPU) or "paper" (the real benchmark, on a GPU).
        data_root: folder of the data sets; "" finds it.
        device: "auto" (CUDA if there is one, else the CPU) or a name that torch knows.
        seed: of all generators.
    """
    from course_lib.show import plots  # late: seaborn takes a second to import

    profile = os.environ.get("COURSE_PROFILE") or profile
    if profile not in PROFILES:
        raise ValueError(f"PROFILE is one of {', '.join(PROFILES)}, but {profile!r} came.")
    device = os.environ.get("COURSE_DEVICE") or device
    gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if gpu else "cpu"
    if device.startswith("cuda") and not gpu:
        raise ValueError(
            f"DEVICE is {device!r}, but torch sees no CUDA device here. "
            'On Colab choose Runtime > Change runtime type > GPU; DEVICE = "auto" always works.'
        )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    checks.status.clear()
    plots.theme()
    data = paths.data_root(os.environ.get("COURSE_DATA") or data_root)
    lesson = Lesson(number, profile, torch.device(device), data, seed)
    print(f"Lesson {number} · profile {profile} · device {lesson.device} · data {lesson.data} · seed {seed}")
    return lesson


def progress() -> None:
    """Print what became of the exercises of all lessons that you ran to their end, by lesson."""
    found = sorted((paths.work() / "results").glob("[0-9][0-9].json"))
    rows = [("lesson", "passed", "open", "wrong", "run")]
    for path in found:
        result = read_json(path)
        verdicts = [*result["exercises"].values()]
        counts = (verdicts.count(word) for word in ("PASS", "TODO", "FAIL"))
        rows.append((result["lesson"], *(str(count or "–") for count in counts), result["time"][:16].replace("T", " ")))
    missing = "(no lesson has been run to its end yet; its last cell keeps what became of its exercises)"
    print(*_columns(rows) if found else [missing], sep="\n")


def with_unit(value: Value, unit: str = "") -> str:
    """A figure as text: four significant digits, with its unit; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        digits = ".0f" if abs(value) >= 1e4 else ".4g" if abs(value) >= 1e-3 else ".2g"
        value = f"{value:{digits}}"
    return f"{value} {unit}".strip()


def peak_memory() -> float:
    """The largest amount of memory this process has held so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory too
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
    import resource  # exists on Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, as macOS counts


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on; a package that is missing is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The commit of the checkout, with -dirty if tracked files differ from it; None without git, or outside of one."""
    root = paths.checkout()
    if root is None or not (root / ".git").exists():
        return None
    command = "git --no-optional-locks describe --always --dirty --abbrev=12 --exclude=*"
    try:
        answer = subprocess.run(command.split(), cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None


def _columns(rows):
    """Rows of text as aligned lines, a rule under the first; columns with nothing but their header are left out."""
    kept = [column for column in zip(*rows) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    header, *others = zip(*kept)
    rule = ["-" * width for width in (*widths[:-1], len(header[-1]))]  # a long note must not wrap the rule
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, rule, *others)]
