"""Checks that speak like a tutor: what is right, what is off, the most likely reason.

In a notebook a check prints [PASS], [FAIL] or [TODO], in green, red or yellow, and never stops *Run all*. While work is
graded (NBGRADER_EXECUTION) or when COURSE_STRICT=1 is set, it prints the same line and raises. The word says all that
the colour says; NO_COLOR=1 of the environment leaves it out.
"""

import builtins
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

status: dict[str, str] = {}  # "01.1" -> PASS, FAIL or TODO, in order


COLOURS = {"PASS": 32, "FAIL": 31, "TODO": 33}  # of a terminal, which notebooks understand


class Undiagnosed(AssertionError):
    """An answer is wrong, and nothing tells why."""


@contextmanager
def check(exercise: str, hint: str = "") -> Iterator[Callable]:
    """Judge one exercise: prints [PASS], [FAIL] with the likely reason, or [TODO] while its stub is untouched.

    Gives a function to call the student's with: see `ask`.

    Args:
        exercise: its number, such as "01.1".
        hint: a sentence that is added to [TODO], and to [FAIL] where no reason was found.
    """
    try:
        yield ask
    except Exception as error:
        # torch raises this error, too; a stub raises it in the notebook
        todo = isinstance(error, NotImplementedError) and _is_cell(
            traceback.extract_tb(error.__traceback__)[-1].filename
        )
        status[exercise] = "TODO" if todo else "FAIL"
        reason = "not written yet." if todo else _reason(error)
        found = isinstance(error, AssertionError) and not isinstance(error, Undiagnosed)
        print(f"{verdict(exercise)}: {reason}" + (f"  Hint: {hint}" if hint and not found else ""))
        if os.environ.get("NBGRADER_EXECUTION") or os.environ.get("COURSE_STRICT") == "1":
            raise
    else:
        status[exercise] = "PASS"
        print(verdict(exercise))


def verdict(exercise: str) -> str:
    """What became of an exercise, such as "[PASS] 01.1", in colour where a notebook shows it."""
    words = f"[{status[exercise]}] {exercise}"
    coloured = hasattr(builtins, "__IPYTHON__") and "NO_COLOR" not in os.environ
    return f"\x1b[1;{COLOURS[status[exercise]]}m{words}\x1b[0m" if coloured else words


def ask(function: Callable, *inputs: Any, **named: Any) -> Any:
    """What a student's function answers to copies of the inputs, so that no answer can change what it is held against.

    Raises:
        AssertionError: it changed tensors or arrays that it was given.
    """
    copies = tree_map(_copied, (inputs, named))
    answer = function(*copies[0], **copies[1])
    pairs = zip(tree_leaves((inputs, named)), tree_leaves(copies))
    if any(isinstance(old, Tensor | np.ndarray) and not _equal(_tensor(old), _tensor(new), 0) for old, new in pairs):
        raise AssertionError(
            f"{function.__name__} changes what it is given: whoever calls it would go on with other values. Make new "
            "ones (`x = x - 1` in place of `x -= 1`, `masked_fill` in place of `x[mask] = ...`), or clone them first."
        )
    return answer


def yours(exercise: str, own: Callable, library: Callable) -> Callable:
    """The student's function once its check has passed, and the library's until then: what comes next is made with it.

    Args:
        exercise: its number, such as "01.1".
        own: the student's function.
        library: one that takes the same arguments and gives the same.
    """
    if status.get(exercise) == "PASS":
        print(f"With your own {own.__name__}, exercise {exercise}.")
        return own
    print(f"With the library's {library.__name__}: exercise {exercise} has not passed its check yet.")
    return library


@contextmanager
def expect_error(*types: type[Exception]) -> Iterator[None]:
    """Show an instructive error in one line without stopping *Run all*; AssertionError if none of `types` came."""
    try:
        yield
    except types as error:
        print(f"{type(error).__name__}: {error}")
    else:
        names = " or ".join(kind.__name__ for kind in types)
        raise AssertionError(
            f"This cell shows what happens when something is wrong: {names} was expected, but none came."
        )


def same(
    got: Any,
    want: Any,
    name: str = "result",
    suspects: Mapping[str, Any] | None = None,
    atol: float = 1e-5,
    axes: str = "",
) -> None:
    """Assert inside a check that an answer equals the wanted value; the message names the most likely reason.

    Args:
        got: the student's value.
        want: a tensor, number or sequence of numbers.
        name: what the value is called in messages.
        suspects: for each typical mistake its sentence and the value it gives (or a function of no arguments that
            returns it, called only when needed). The first one that matches speaks.
        atol: absolute tolerance; the relative one is 1e-4.
        axes: names of the axes, such as "b c h w", for messages about shapes.
    Raises:
        AssertionError: with one sentence for the student.
    """
    wanted = _tensor(want)
    if got is None:
        raise AssertionError(f"{name} is None: does your function end with `return`?")
    if isinstance(want, Tensor) and want.ndim and not isinstance(got, Tensor):
        raise AssertionError(f"{name} should be a torch.Tensor, but a {_kind(got)} came.")
    try:
        came = _tensor(got)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{name} should be a {_kind(want)}, but a {_kind(got)} came.") from None
    if _equal(came, wanted, atol):
        return
    for sentence, value in (suspects or {}).items():
        if _equal(came, _tensor(value() if callable(value) else value), atol):
            raise AssertionError(sentence)
    reason = _likely(came, wanted, name, axes.split(), atol)
    raise AssertionError(reason) if reason else Undiagnosed(_difference(came, wanted, name, axes.split(), atol))


def _copied(value):
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _tensor(value):
    return torch.as_tensor(value).detach().cpu().double()


def _equal(a, b, atol):
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=atol, equal_nan=True)


def _kind(value):
    kind = type(value).__name__
    return {"ndarray": "NumPy array", "Tensor": "torch.Tensor"}.get(kind, kind)


def _other_shape(came, want, name, axes):
    named = f" ({' '.join(axes)})" if axes else ""
    text = f"{name} has the shape {tuple(came.shape)}, but {tuple(want.shape)} is expected{named}."
    if came.squeeze().shape == want.squeeze().shape:
        return f"{text} Only axes of length 1 differ: look at keepdim, squeeze and indexing with None."
    if came.ndim != want.ndim:
        return f"{text} It has {came.ndim} {'axis' if came.ndim == 1 else 'axes'} in place of {want.ndim}."
    if sorted(came.shape) == sorted(want.shape):
        return f"{text} The axes came in another order."
    names = axes if len(axes) == want.ndim else [f"number {i}" for i in range(want.ndim)]
    wrong = [f"axis {axis}: {a} came, {b} expected" for axis, a, b in zip(names, came.shape, want.shape) if a != b]
    return f"{text} Look at {'; '.join(wrong)}."


def _likely(came, want, name, axes, atol):
    """The most likely reason why two tensors differ, if there is one."""
    if came.shape != want.shape:
        return _other_shape(came, want, name, axes)
    if came.isnan().any() and not want.isnan().any():
        return f"{name} holds NaN ({int(came.isnan().sum())} of {came.numel()} values): is something divided by 0?"
    if came.numel() < 4:  # of few values any wrong answer has some pattern
        return None
    ratio = ((came * want).sum() / want.square().sum()).item()  # least squares: came = ratio * want
    if 1e-6 < abs(ratio) < math.inf and _equal(came, ratio * want, atol * abs(ratio)):
        if abs(ratio + 1) < 1e-4:
            return f"{name} has the wrong sign: every value is the negative of the expected one."
        return f"{name} has the right pattern, but every value is {ratio:.4g} times the expected one."
    offset = (came - want).mean().item()
    if math.isfinite(offset) and _equal(came, want + offset, atol):
        return f"{name} has the right pattern, but every value is off by the same {offset:+.4g}."
    return None


def _difference(came, want, name, axes, atol):
    """Where two tensors of one shape differ most."""
    if came.numel() < 4:
        return f"{name} is {_few(came)}, but {_few(want)} is expected."
    wrong = ~torch.isclose(came, want, rtol=1e-4, atol=atol)
    worst = torch.unravel_index((came - want).abs().nan_to_num(math.inf, math.inf).argmax(), want.shape)
    names = [f"{axis}=" for axis in axes] if len(axes) == want.ndim else [""] * want.ndim
    at = ", ".join(f"{axis}{index}" for axis, index in zip(names, worst))
    return (
        f"{name}: {int(wrong.sum())} of {want.numel()} values differ, most at [{at}]: "
        f"{came[worst].item():.5g} came, {want[worst].item():.5g} is expected."
    )


def _few(values):
    return str([float(f"{value:.5g}") for value in values.flatten()]) if values.ndim else f"{values:.5g}"


def _reason(error):
    """One sentence about an error: an assertion's own, or the kind of error and the line of the student's code."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first frame is `check` itself
    cell = frames[0].filename
    if isinstance(error, AssertionError):
        inside = [frame for frame in frames if frame.filename == cell]
        return str(error) or f"this does not hold: {inside[-1].line}"
    if isinstance(error, NameError) and len(frames) == 1:
        return f"{error.name!r} does not exist yet: run the cell above first, and keep the name that is given there."
    what = f"{type(error).__name__}: {error}"
    own = [frame for frame in frames if frame.filename != cell and _is_cell(frame.filename)]
    if own:
        return f"your code stopped with {what}  (line {own[-1].lineno} of {own[-1].name}: {own[-1].line})"
    return f"the check stopped with {what}  Does your function return what the text above asks for?"


def _is_cell(filename):
    """True for code typed into a notebook: its name is like that of a file, but there is none (generated: <names>)."""
    return filename.startswith("<ipython-input") or not (filename.startswith("<") or os.path.exists(filename))
