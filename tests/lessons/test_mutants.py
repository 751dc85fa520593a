"""The checks of an exercise notice small faults: mutants of its solution fail its visible check or its hidden tests."""

import functools
import io
import itertools
import re
import symtable
from contextlib import redirect_stdout, suppress

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from course_lib import checks

from .mutants import mutants
from .test_lessons import code
from .test_near_misses import execute, prepared, surroundings  # noqa: F401  (fixtures)

WANTED = 12  # of each exercise at least
# What differs from the solution in nothing that a check could or should see.
EQUIVALENT: dict[str, dict[str, str]] = {
    "00.1": {"line 6: without item": "a tensor of one number is taken, too"},
    "01.2": {
        "line 6: 1 -> 2": "whatever divides the zeros of a constant map",
        "line 4: -2 -> 2": "the same axis of four",
    },
    "01.4": {
        "line 5: iou(a[None], b[None]): arguments exchanged": "the IoU is symmetric",
        "line 6: zip(found, true): arguments exchanged": "the IoU is symmetric",
        "line 5: without item": "a tensor of one number is taken, too",
        "line 9: without item": "a tensor of one number is taken, too",
        "line 8: argsort without stable": "which of two that are equally large comes first is not asked",
        "line 8: True -> False": "which of two that are equally large comes first is not asked",
    },
    "02.2": {
        "line 7: 1 -> 2": "a factor, which the sum to 1 takes out",
        "line 5: query[:, None] - reference[None] -> reference[None] - query[:, None]": "its absolute value is taken",
    },
    "02.4": {"line 11: without item": "a tensor of one number is taken, too"},
    "02.5": {
        "line 4: high - low > tolerance -> high - low >= tolerance": "an interval as long as that is short enough"
    },
    "03.1": {
        "line 5: features[:, None] - prototypes[None] -> prototypes[None] - features[:, None]": "its sign is lost",
        "line 11: 1 -> 2": "what is added to all distances, softmax takes out",
        "line 11: 1 -> 0": "what is added to all distances, softmax takes out",
        "line 11: normalize without dim": "1 is its default",
    },
    "03.2": {
        "line 9: 1 -> 0": "the matrix is symmetric",
        "line 10: 1 -> 0": "the matrix is symmetric",
        "line 11: 1 -> 0": "the matrix is symmetric",
        "line 7: eye without device": "checks run on the CPU",
    },
    "04.1": {
        "line 7: support.mean(2)[:, :, None] - query[:, None] -> query[:, None] - support.mean(2)[:, :, None]": (
            "its sign is lost"
        ),
        "line 5: mean -> sum": "a factor, which the length of 1 takes out",
    },
    "04.4": {
        "line 10: without item": "a tensor of one number is taken, too",
        "line 11: v > 0 -> v >= 0": "no gain is 0",
    },
    "05.1": {"line 9: 1 -> 0": "the matrix is symmetric"},
    "05.2": {
        "line 7: argsort without dim": "the last axis is its default",
        "line 7: argsort without stable": "which of two that are equally near comes first is not asked",
        "line 7: True -> False": "which of two that are equally near comes first is not asked",
    },
    "05.3": {
        "line 5: features - features.mean(0) -> features.mean(0) - features": "two that are turned round are as near",
        "line 6: normalize without dim": "1 is its default",
        "line 7: normalize without dim": "1 is its default",
        "line 13: without item": "a tensor of one number is taken, too",
    },
    "06.1": {"line 11: without item": "a tensor of one number is taken, too"},
    "07.2": {
        "line 11: above[..., :1] + rest[..., None] -> rest[..., None]": "the best class is never the background",
    },
    "07.3": {
        "line 6: f.norm(dim=1, keepdim=True) + 1e-05 -> f.norm(dim=1, keepdim=True) - 1e-05": "below what is compared",
        "line 8: affinity.sum(1, keepdim=True) + 1e-05 -> affinity.sum(1, keepdim=True) - 1e-05": (
            "below what is compared"
        ),
        "line 6: 1e-05 -> 2e-05": "below what is compared",
        "line 8: 1e-05 -> 2e-05": "below what is compared",
    },
    "07.4": {"line 8: without item": "a tensor of one number is taken, too"},
    "08.1": {"line 8: sum -> mean": "a factor, which the length of 1 takes out"},
    "08.2": {"line 5: normalize without dim": "1 is its default"},
    "08.3": {
        "line 6: 1 - i -> i - 1": "entry -1 of two is entry 1",
        "line 8: 1 - i -> i - 1": "entry -1 of two is entry 1",
    },
    "08.5": {"line 10: without item": "a tensor of one number is taken, too"},
    "08.4": {
        "line 12: 1 -> 0": "the matrix is symmetric",
        "line 13: 0 -> -1": "there is one column",
    },
    "09.2": {"line 7: place[:, None] - place -> place - place[:, None]": "it is squared"},
    "09.4": {"line 10: 0 -> -1": "there is one map"},
    "10.2": {
        "line 11: known & (labels == truth) -> labels == truth": "labels are never void",
        "line 15: without item": "a tensor of one number is taken, too",
    },
    "10.3": {"line 6: 0 -> -1": "there is one axis"},
}


def written(source):
    """What a student writes in each exercise: number -> lines between the marks of the source."""
    cells = re.findall(r'^# %% exercise="([\d.]+)"$(.*?)(?=^# %%)', source.read_text("utf-8"), re.M | re.S)
    return {
        number: "\n".join(re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell, re.S))
        for number, cell in cells
    }


def caught(answer, exercise, names):
    """Where a wrong answer is noticed: "visible", "hidden" or "" (nowhere)."""
    _, visible, marker, hidden = exercise
    torch.manual_seed(0)
    with redirect_stdout(io.StringIO()):
        for where, text in ("visible", answer), ("visible", visible), ("hidden", marker + hidden):
            try:
                execute(text, f"/notebook/{where}", names)
            except Exception:
                return where
    return ""


def survivors(source, prepare):
    """Of each exercise: how many mutants were tried, and those that nothing noticed."""
    for number, solution in written(source).items():
        names, exercises = prepare(source)
        known = {} if source.parent.name == "miniature" else EQUIVALENT.get(number, {})
        every = list(mutants(exercises[number][0], solution))
        assert not known.keys() - dict(every).keys(), f"{number}: EQUIVALENT is stale"
        made = [(what, code) for what, code in every if what not in known]
        if source.parent.name != "miniature":
            assert len(made) >= WANTED, f"{number}: {len(made)} mutants"
        yield number, len(made), [what for what, code in made if not caught(code, exercises[number], dict(names))]


def test_mutants_are_caught(source, prepared, capsys):  # noqa: F811
    rows = list(survivors(source, prepared))
    with capsys.disabled():
        for number, tried, alive in rows:
            print(f"\n{number}: {tried - len(alive)} of {tried} mutants caught {alive or ''}", end="")
    assert not any(alive for *_, alive in rows)


def test_no_two_suspects_give_the_same(source, prepared):  # noqa: F811
    """A wrong answer is named by the sentence meant for it only if no other mistake, nor the solution, gives it."""
    for number in written(source):
        names, exercises = prepare_with(prepared, source, "same", listening := Listener())
        execute(exercises[number][1], "/notebook/check", names)
        first = {
            tuple(sentence for sentence, _ in suspects): (asked, suspects) for asked, suspects in listening.heard[::-1]
        }
        for asked, suspects in first.values():  # of the calls in a loop the first one that fails speaks
            values = {sentence: checks._tensor(value() if callable(value) else value) for sentence, value in suspects}
            for one, other in itertools.combinations(values, 2):
                assert not checks._equal(values[one], values[other], 1e-5), f"{number}, {asked}: {one!r} and {other!r}"


def test_an_answer_in_place_is_named(source, prepared, capsys):  # noqa: F811
    """Whatever an answer does to its inputs, no mistake is named that it has not made."""
    for number in written(source):
        names, exercises = prepared(source)
        _, visible, *_ = exercises[number]
        asked = set(re.findall(r"\bask\((\w+)", visible))
        for name in asked:
            names[name] = ruthless(names[name])
        with suppress(AssertionError):
            execute(visible, "/notebook/check", names)
        said = capsys.readouterr().out
        assert number in ("02.5", "03.3", "06.2") or "changes what it is given" in said, said


def test_checks_leak_no_names(notebook):
    """Whoever runs a check again, at any time, changes no name of the lesson."""
    judges, lesson = [], set()
    for cell in code(notebook):
        table = symtable.symtable(re.sub("(?m)^[%!].*$", "", cell.source), "cell", "exec")
        if cell.metadata.get("nbgrader", {}).get("grade"):
            judges.append((cell.metadata.nbgrader.grade_id, table))
        else:
            lesson |= used(table)
    for name, table in judges:
        bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
        assert not bound & lesson, f"{name} binds names that the lesson uses, too: {sorted(bound & lesson)}"


def used(table, inside=False):
    """Names of the notebook's own scope that a cell reads or binds, its functions included."""
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() or not inside}
    return own.union(*(used(child, True) for child in table.get_children()))


class Listener:
    """In the place of `same`: keeps what every call held an answer against."""

    def __init__(self):
        self.heard = []

    def __call__(self, got, want, name="result", suspects=None, **options):
        self.heard.append((name, [("the solution", want), *(suspects or {}).items()]))
        checks.same(got, want, name, suspects, **options)


def prepare_with(prepare, source, name, value):
    names, exercises = prepare(source)
    return {**names, name: value}, exercises


def ruthless(function):
    @functools.wraps(function)
    def answer(*inputs, **named):
        found = function(*inputs, **named)
        for value in tree_leaves(inputs):
            if isinstance(value, torch.Tensor):
                value.detach().copy_(torch.logical_not(value) if value.dtype == torch.bool else value.detach() + 1)
            elif isinstance(value, np.ndarray):
                value += 1
        return found

    return answer
