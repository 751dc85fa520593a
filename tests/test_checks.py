"""Checks speak like a tutor: each kind of answer gets the sentence meant for it."""

import builtins
import json
import linecache
import random
import re
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib import checks, lesson
from course_lib.checks import same
from course_lib.lesson import progress, start


@pytest.fixture(autouse=True)
def gentle(monkeypatch):
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    checks.status.clear()


def cell(text, name, **names):
    """Execute text the way a notebook does: source in memory, no file on disk."""
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), names)
    return names


def judged(
    capsys, answer, test="with check('01.1', hint='Look again.'):\n    same(f(torch.ones(2, 3)), torch.ones(2))"
):
    names = cell(answer, "/nowhere/answer.py", torch=torch)
    cell(test, "/nowhere/check.py", **{**names, "check": checks.check, "same": same})
    return capsys.readouterr().out.strip()


def said(got, want, **options):
    with pytest.raises(AssertionError) as error:
        same(got, want, **options)
    return str(error.value)


def test_pass(capsys):
    assert judged(capsys, "def f(x): return x.mean(1)") == "[PASS] 01.1"
    assert checks.status == {"01.1": "PASS"}


def test_an_untouched_stub_is_to_do_not_wrong(capsys):
    assert (
        judged(capsys, "def f(x): raise NotImplementedError('later')")
        == "[TODO] 01.1: not written yet.  Hint: Look again."
    )
    assert checks.status == {"01.1": "TODO"}


def test_forgotten_return(capsys):
    assert "does your function end with `return`" in judged(capsys, "def f(x): x.mean(1)")
    assert checks.status == {"01.1": "FAIL"}


def test_an_error_names_the_line_of_the_students_own_code(capsys):
    out = judged(capsys, "def g(x):\n    return torch.einsum('bk,ck->bc', x, x.T)\n\ndef f(x):\n    return g(x)")
    assert out.startswith("[FAIL] 01.1: your code stopped with RuntimeError")
    assert "(line 2 of g: return torch.einsum('bk,ck->bc', x, x.T))" in out
    assert "Traceback" not in out


def test_a_missing_function(capsys):
    assert "'f' does not exist yet: run the cell above first" in judged(capsys, "def other(x): return x")


def test_a_name_missing_in_the_students_code_is_not_the_cell_above(capsys):
    assert "your code stopped with NameError: name 'nothing' is not defined  (line 1 of f: " in judged(
        capsys, "def f(x): return nothing"
    )


def test_an_answer_that_breaks_the_check_itself(capsys):
    out = judged(capsys, "def f(x): return 3", "with check('01.1'):\n    f(1).shape")
    assert "the check stopped with AttributeError" in out and "what the text above asks for" in out


def test_an_assertion_without_a_sentence_shows_itself(capsys):
    assert "this does not hold: assert f(1) == 4" in judged(
        capsys, "def f(x): return 3", "with check('01.1'):\n    assert f(1) == 4"
    )


@pytest.mark.parametrize("variable", ["COURSE_STRICT", "NBGRADER_EXECUTION"])
def test_strict_prints_and_raises(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(AssertionError, match="is None"):
        judged(capsys, "def f(x): pass")
    assert capsys.readouterr().out.startswith("[FAIL] 01.1: ")
    with pytest.raises(NotImplementedError):
        judged(capsys, "def f(x): raise NotImplementedError")


def test_expect_error(capsys):
    with checks.expect_error(ValueError, TypeError):
        raise ValueError("no")
    assert capsys.readouterr().out == "ValueError: no\n"
    with pytest.raises(AssertionError, match="ValueError or TypeError was expected, but none came"):
        with checks.expect_error(ValueError, TypeError):
            pass
    with pytest.raises(KeyError):
        with checks.expect_error(ValueError):
            raise KeyError("x")


WANT = torch.arange(24.0).reshape(2, 3, 2, 2).sin()


def test_the_suspect_that_matches_speaks_and_others_are_not_computed():
    never = pytest.fail
    suspects = {"You forgot the root.": lambda: WANT**2, "unused": lambda: never("computed for nothing")}
    assert said(WANT**2, WANT, suspects=suspects) == "You forgot the root."
    same(WANT.clone(), WANT, suspects={"never": lambda: never("computed although the answer is right")})


def test_a_suspect_may_have_another_shape():
    assert said(WANT.mean(1), WANT, suspects={"wrong axis": WANT.mean(1)}) == "wrong axis"


@pytest.mark.parametrize(
    "got, options, message",
    [
        (WANT.numpy(), {}, "should be a torch.Tensor, but a NumPy array came"),
        ("a map", {}, "but a str came"),
        (
            WANT[:, :2],
            {"axes": "b c h w"},
            "(2, 2, 2, 2), but (2, 3, 2, 2) is expected (b c h w). Look at axis c: 2 came, 3 expected",
        ),
        (WANT[:, :2], {}, "axis number 1: 2 came"),
        (WANT.transpose(0, 1), {}, "The axes came in another order"),
        (WANT[:, :, None], {}, "Only axes of length 1 differ"),
        (WANT[0], {}, "3 axes in place of 4"),
        (WANT.log(), {}, "holds NaN"),
        (-WANT, {}, "wrong sign"),
        (WANT * 4, {}, "every value is 4 times the expected one"),
        (WANT + 3, {}, "off by the same +3"),
        (WANT.index_fill(1, torch.tensor([2]), 9.0), {"axes": "b c h w"}, "8 of 24 values differ, most at [b="),
    ],
)
def test_what_is_off_is_said(got, options, message):
    assert message in said(got, WANT, **options)


def test_numbers_and_sequences():
    same(0.5, 0.5)
    same(torch.tensor(0.5), 0.5)
    same([1, 2, 3, 4], (1, 2, 3, 4))
    same(np.float64(2), 2.0)
    assert said(0.25, 0.5, name="the share") == "the share is 0.25, but 0.5 is expected."
    assert said(torch.tensor([1, 2]), [1, 3], name="box") == "box is [1.0, 2.0], but [1.0, 3.0] is expected."
    assert "should be a list, but a dict came" in said({}, [1, 2])


def test_infinity_and_empty_tensors_are_compared_without_an_accident():
    assert "differ" in said(torch.full((5,), torch.inf), torch.arange(5.0))
    same(torch.zeros(0, 3), torch.zeros(0, 3))
    assert "shape" in said(torch.zeros(0, 3), torch.zeros(2, 3))
    assert said(torch.ones(2, 3), torch.zeros(2, 3))


def test_a_gradient_does_not_matter():
    same(WANT.clone().requires_grad_(), WANT)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=12), st.integers(0, 3), st.floats(0.5, 10))
def test_any_real_difference_fails_with_a_sentence(values, place, error):
    want = torch.tensor(values)
    same(want.clone(), want)
    got = want.clone()
    got[place] += error
    assert said(got, want, name="map").startswith("map")


# ------------------------------------------------------------------------------------------ the frame of a lesson


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("COURSE_PROFILE", "COURSE_DEVICE", "COURSE_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    return tmp_path


def test_start_seeds_all_generators(place, capsys):
    def draw():
        start("07", "smoke", str(place), "cpu", 3)
        return torch.rand(()).item(), np.random.rand(), random.random()

    assert draw() == draw()
    assert capsys.readouterr().out.splitlines()[0] == f"Lesson 07 · profile smoke · device cpu · data {place} · seed 3"


def test_environment_goes_before_parameters(place, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    monkeypatch.setenv("COURSE_DATA", str(place / "elsewhere"))
    begun = start("01", "mini", str(place), "cuda", 0)
    assert (begun.profile, begun.device.type, begun.data) == ("smoke", "cpu", place / "elsewhere")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("01", "quick"), "PROFILE is one of smoke, mini, paper, but 'quick' came"),
        pytest.param(
            ("01", "mini", "", "cuda"),
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_start_refuses_with_a_sentence(place, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        start(*arguments)


def test_choose_follows_the_profile(place):
    assert [start("01", profile, device="cpu").choose(smoke=1, mini=2, paper=3) for profile in lesson.PROFILES] == [
        1,
        2,
        3,
    ]


def test_finish_writes_what_was_recorded(place, capsys):
    begun = start("01", "smoke", str(place), "cpu", 5)
    begun.record("accuracy", torch.tensor(0.5), "%", paper=48.1, note="fewer classes")
    begun.record("accuracy", torch.tensor(62.25), "%", paper=48.1, note="fewer classes")
    begun.record("worst", float("nan"))
    begun.record("backbone", "lite0")
    checks.status["01.1"] = "TODO"
    begun.finish("abc123")
    result = json.loads((place / "results" / "01.json").read_text())
    assert [figure["value"] for figure in result["figures"]] == [62.25, None, "lite0"]
    assert result["figures"][1]["note"] == "(came out as nan)"
    assert (result["profile"], result["seed"], result["device"], result["fingerprint"]) == ("smoke", 5, "cpu", "abc123")
    assert result["exercises"] == {"01.1": "TODO"}
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert 50 < result["peak_mb"] < 100_000 and result["seconds"] >= 0
    out = capsys.readouterr().out
    assert "62.25 %" in out and "48.1 %" in out and "[TODO] 01.1" in out and str(place / "results" / "01.json") in out
    assert [path.name for path in (place / "results").iterdir()] == ["01.json"]  # no half-written file is left


def test_record_refuses_what_is_not_one_number(place):
    with pytest.raises(TypeError, match="Record one number at a time"):
        start("01", "smoke", device="cpu").record("accuracies", [1, 2])


def test_peak_memory_is_this_process_alone():
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])  # a parent with much memory
    code = "from course_lib.lesson import peak_memory; print(peak_memory())"
    child = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    alone = float(
        subprocess.run(["env", sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert abs(child - alone) < 50
    assert lesson.peak_memory() > len(ballast) / 2**20


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (None, "", "–"),
        (0.123456, "", "0.1235"),
        (62.0, "%", "62 %"),
        (12, "images", "12 images"),
        (1e-7, "", "1e-07"),
        (123456.0, "", "123456"),
        ("lite0", "", "lite0"),
        (0.0, "", "0"),
    ],
)
def test_figures_as_text(value, unit, text):
    assert lesson.with_unit(value, unit) == text


def test_results_of_a_run_and_of_a_student_are_kept_apart(place, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(place / "work"))
    for run, folder in (("20261125-120000-7", place / "results"), (None, place / "work" / "results")):
        if run:
            monkeypatch.setenv("COURSE_RUN", run)
        else:
            monkeypatch.delenv("COURSE_RUN", raising=False)
            monkeypatch.delenv("COURSE_RESULTS")
        start("07", "smoke", str(place), "cpu").finish()
        result = json.loads((folder / "07.json").read_text())
        assert (result["run"], result["profile"], result["commit"]) == (run, "smoke", lesson.commit())
        assert datetime.fromisoformat(result["time"]).tzinfo
    assert json.loads((place / "results" / "07.json").read_text())["run"] == "20261125-120000-7"


ASKED = "with check('01.1', hint='Look again.') as ask:\n    x = torch.ones(2, 3)\n    same(ask(f, x), x.mean(1) + 1)"


def test_an_answer_gets_copies_and_may_not_change_them(capsys):
    assert judged(capsys, "def f(x): return x.mean(1) + 1", ASKED) == "[PASS] 01.1"
    for changing in (
        "x += 1\n    return x.mean(1)",
        "x[0] = x[0]\n    x.relu_()\n    x[1, 1] = 2\n    return x.mean(1)",
    ):
        out = judged(capsys, f"def f(x):\n    {changing}", ASKED)
        assert out.startswith("[FAIL] 01.1: f changes what it is given") and "Hint" not in out
    answer = checks.ask(lambda array, by, net: array * by, np.ones(3), by=2, net=torch.nn.ReLU())
    assert answer.tolist() == [2, 2, 2]
    with pytest.raises(AssertionError, match="changes what it is given"):
        checks.ask(lambda pair: pair["a"].sort(), {"a": np.array([2, 1])})
    leaf = torch.ones(2, requires_grad=True)
    checks.ask(lambda x: x * 3, leaf).sum().backward()
    assert leaf.grad.tolist() == [3, 3]


def test_only_the_stub_is_to_do(capsys):
    out = judged(capsys, "def f(x): return torch.nn.Module()(x)")
    assert out.startswith("[FAIL] 01.1: your code stopped with NotImplementedError")


def test_the_hint_comes_where_no_reason_was_found(capsys):
    out = judged(capsys, "def f(x): return torch.tensor([3.0, 5.0])")
    assert out.endswith("is expected.  Hint: Look again.")
    assert "Hint" not in judged(capsys, "def f(x): return x.mean()")  # its axes are named already


def test_numbers_are_taken_where_numbers_are_natural():
    same(2.5, torch.tensor(2.5))
    same(np.float32(2.5), torch.tensor(2.5))
    assert "should be a torch.Tensor" in said([2.5, 1.0], torch.tensor([2.5, 1.0]))


def test_verdicts_are_coloured_in_a_notebook_and_say_the_same_without(capsys, monkeypatch):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    plain = judged(capsys, "def f(x): return x.mean(1)")
    monkeypatch.delenv("NO_COLOR")
    coloured = judged(capsys, "def f(x): return x.mean(1)")
    assert plain == "[PASS] 01.1" and coloured == "\x1b[1;32m[PASS] 01.1\x1b[0m"
    wrong, todo = (judged(capsys, code) for code in ("def f(x): return x", "def f(x): raise NotImplementedError"))
    assert wrong.startswith("\x1b[1;31m[FAIL] 01.1\x1b[0m: ") and todo.startswith("\x1b[1;33m[TODO] 01.1\x1b[0m: ")
    assert re.sub(r"\x1b\[[0-9;]+m", "", coloured) == plain


def test_progress_shows_every_lesson_that_ended(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    progress()
    assert "no lesson has been run" in capsys.readouterr().out
    (tmp_path / "results").mkdir()
    exercises = {"02.1": "PASS", "02.2": "FAIL", "02.3": "PASS", "02.4": "TODO"}
    result = {"lesson": "02", "exercises": exercises, "time": "2026-11-30T09:15:00+0000"}
    (tmp_path / "results" / "02.json").write_text(json.dumps(result))
    progress()
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["lesson", "passed", "open", "wrong", "run"]
    assert row.split() == ["02", "2", "1", "1", "2026-11-30", "09:15"]
