"""What a lesson says of its figures, what a student predicts, the student's own code in later cells, new words."""

import json
import re
from pathlib import Path

import pytest

from course_lib import checks
from course_lib.course import build
from course_lib.lesson import start

FOLDER = Path(__file__).parents[1] / "notebooks" / "src"


@pytest.fixture
def begin(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    for name in ("COURSE_PROFILE", "COURSE_STRICT", "COURSE_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    return lambda **settings: start("77", **{"profile": "mini", "data_root": tmp_path} | settings)


def test_a_claim_says_its_numbers_and_whether_they_agree(begin, capsys):
    lesson = begin()
    lesson.claim("4 is more than 3.", 4 > 3)
    lesson.claim("3 is more than 4.", 3 > 4)
    assert lesson.claims == {"4 is more than 3.": True, "3 is more than 4.": False}
    said = capsys.readouterr().out
    assert "✓ 4 is more than 3.\n" in said and "✗ Not so in this run: 3 is more than 4.\n" in said


def test_a_claim_that_is_no_longer_true_stops_where_results_come_from(begin, monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(AssertionError, match="3 is more than 4"):
        begin().claim("3 is more than 4.", 3 > 4)
    other = begin(seed=1)
    other.claim("3 is more than 4.", 3 > 4)
    assert not any(other.claims.values())


def test_the_smoke_profile_decides_nothing(begin, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_STRICT", "1")
    lesson = begin(profile="smoke")
    lesson.claim("3 is more than 4.", 3 > 4)
    assert "(too little data to say: 3 is more than 4.)" in capsys.readouterr().out and not lesson.claims


def test_claims_stand_in_the_results(begin, tmp_path, capsys):
    lesson = begin()
    lesson.claim("a.", True)
    lesson.claim("b.", False)
    lesson.finish()
    assert json.loads((tmp_path / "results" / "77.json").read_text())["claims"] == [
        {"sentence": "a.", "holds": True},
        {"sentence": "b.", "holds": False},
    ]
    assert "1 of 2 claims hold in this run." in capsys.readouterr().out


def test_a_prediction_is_shown_beside_what_came(begin, capsys):
    lesson = begin()
    lesson.predict("77.a", 30)
    lesson.predict("77.b", None)
    lesson.outcome("77.a", 4.0, "%")
    lesson.outcome("77.b", 12)
    said = capsys.readouterr().out
    assert "77.a: you expected 30 %; measured: 4 %." in said and "77.b: no prediction was made; measured: 12." in said


def test_a_prediction_is_a_number_or_a_word(begin):
    with pytest.raises(TypeError, match="77.a"):
        begin().predict("77.a", [1, 2])


@pytest.mark.parametrize(("verdict", "chosen"), [("PASS", "own"), ("FAIL", "library"), ("TODO", "library")])
def test_a_function_of_the_student_is_used_once_it_passed(verdict, chosen, monkeypatch, capsys):
    def own(): ...
    def library(): ...

    monkeypatch.setitem(checks.status, "77.1", verdict)
    assert checks.yours("77.1", own, library).__name__ == chosen
    assert "77.1" in capsys.readouterr().out


def test_a_word_is_defined_once_and_used_in_its_lesson():
    known = build.terms(FOLDER)
    words = [term.lower() for lesson in known.values() for term in lesson]
    assert len(words) == len(set(words))
    assert list(known) == sorted(known)


@pytest.mark.parametrize("source", build.sources(FOLDER), ids=lambda path: path.stem)
def test_the_text_uses_a_word_no_earlier_than_it_is_defined(source):
    """A term that a later lesson defines is foreign here; a term of this one is used here, after the list of words."""
    known, text = build.terms(FOLDER), source.read_text("utf-8")
    prose = "\n".join(re.findall(r"^# (?!%%)(.*)$", text, re.M)).lower()
    for number, entries in known.items():
        for term in entries:
            used = re.search(rf"\b{re.escape(term.lower())}", prose)
            if number == source.stem[:2]:
                assert used, f"{term} is defined for lesson {number}, which does not use it"
            elif number > source.stem[:2]:
                assert not used, f"lesson {source.stem[:2]} uses {term}, which lesson {number} defines"
    if known.get(source.stem[:2]):
        assert "{{words}}" in text


def test_the_list_of_words_links_to_earlier_lessons(tmp_path):
    for name in ("01_one", "02_two"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "glossary.toml").write_text('["01"]\nlogit = "a score."\n["02"]\ngauge = "a freedom."\n')
    first, second = (build.glossary(tmp_path / f"{name}.py") for name in ("01_one", "02_two"))
    assert first == "- **logit**: a score."
    assert second == "- **gauge**: a freedom.\n\nKnown from [01](01_one.ipynb#words): logit."
