"""Modules are found under the names of earlier editions, as the same modules, and say where they are now."""

import importlib
import sys

import pytest

import course_lib
from course_lib import lesson
from course_lib.worlds import minis, photographs


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("course_lib.data.minis", minis),
        ("course_lib.data.fetch", photographs),
        ("course_lib.teach.lesson", lesson),
    ],
)
def test_an_earlier_name_is_the_same_module(name, module, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{name} is now {module.__name__}."):
        assert importlib.import_module(name) is module
    assert module.__spec__.name == module.__name__


def test_from_an_earlier_package(monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith("course_lib.teach") or name == "course_lib.data.minis"
    ]:
        monkeypatch.delitem(sys.modules, name)
    names = {}
    with pytest.warns(DeprecationWarning):
        exec("from course_lib.teach import lesson, build; from course_lib.data import minis", names)
    assert [names[name].__name__ for name in ("lesson", "build", "minis")] == [
        "course_lib.lesson",
        "course_lib.course.build",
        "course_lib.worlds.minis",
    ]


def test_every_earlier_name_leads_to_a_module():
    for name, present in course_lib.EARLIER_NAMES.items():
        assert importlib.util.find_spec(present), name


def test_other_names_are_still_missing():
    with pytest.raises(ModuleNotFoundError, match="course_lib.data.nothing"):
        importlib.import_module("course_lib.data.nothing")
