"""The court of one lesson: a process that runs the checks, with the student's functions in a jail.

It executes the lesson's set-up cell, forks the jail's warder, and only then is told the solutions and hidden tests. A
check runs here, as in the notebook; where it calls the student's function, the inputs go into the jail and the answer
comes out, so that no expected value is ever where the student's code is. Names of other exercises are the solution's.

Credit. A check is a row of cases: a call of the student's function with all that is asserted of it, each round of a
loop by itself. It ends at the first case that fails; those before it count if a value was right among them (`same`),
not only its form. Once the check passes, each hidden test counts as one more case. Credit is the share of all cases.
"""

import ast
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from types import CodeType, TracebackType
from typing import Any

import torch

from course_lib import checks, paths
from course_lib.course.jail import CANNOT, CannotIsolate, Halted, Jail, Warder, handed_out, remember, run_cell

BEGIN = "### BEGIN SOLUTION"
PASSED = "_passed"
PROBE = """
import ctypes, os, socket
def probe(hidden):
    open_ = [path for path in hidden if os.path.lexists(path)]
    def child():
        if os.fork() == 0:
            os._exit(0)
    def user_namespace():
        if ctypes.CDLL(None).unshare(0x10000000):
            raise OSError
    for name, work in {
        "the network": lambda: socket.socket().connect(("192.0.2.1", 80)),
        "a new process": child,
        "a file outside /scratch": lambda: open("/written", "w"),
        "a file of the library": lambda: open(__library__ + "/written", "w"),
        "a new user namespace": user_namespace,
        "a privilege": lambda: os.chroot("/scratch"),
    }.items():
        try:
            work()
        except Exception:
            continue
        open_.append(name)
    return open_
"""


def functions(solution: str) -> list[str]:
    """Names of the functions that a student writes in an exercise, given its solved cell.

    Raises:
        ValueError: a part of the solution stands outside of functions, where nobody can ask for it.
    """
    lines = solution.splitlines()
    inside = {
        node.name: sum(BEGIN in line for line in lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(solution).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    if sum(inside.values()) != sum(BEGIN in line for line in lines):
        raise ValueError(f"Expected every {BEGIN} inside a function, so that it can be graded, got {lines[0]!r}.")
    return [name for name, count in inside.items() if count]


def _named(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _asserts(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Assert) for part in ast.walk(node)) or _named(node, {"same"})


def counted(check: str, own: list[str], filename: str) -> CodeType:
    """A visible check that calls `_passed(of a value)` at the end of each case.

    Args:
        own: names of the student's functions.
    """
    asking = {*own}

    def split(body):
        result, case = [], []

        def close():
            if any(map(_asserts, case)):
                call = ast.Call(
                    ast.Name(PASSED, ast.Load()), [ast.Constant(_named(ast.Module(case, []), {"same"}))], []
                )
                result.append(ast.fix_missing_locations(ast.copy_location(ast.Expr(call), case[-1])))
            case.clear()

        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if _named(node, asking):
                    asking.add(node.name)
            elif _named(node, asking):
                close()
                if isinstance(node, ast.With | ast.For):
                    node.body = split(node.body)
                else:
                    case.append(node)
            else:
                case.append(node)
            result.append(node)
        close()
        return result

    tree = ast.parse(check)
    tree.body = split(tree.body)
    return compile(tree, filename, "exec", dont_inherit=True)


def hidden_cases(tests: str, filename: str) -> list[CodeType]:
    """The hidden tests of a check, each with the statements before it that it needs."""
    groups: list[list[ast.stmt]] = [[]]
    for node in ast.parse(tests).body:
        groups[-1].append(node)
        if not isinstance(node, ast.FunctionDef) and _asserts(node):
            groups.append([])
    if groups[-1] and len(groups) > 1:
        groups[-2] += groups[-1]
    return [compile(ast.Module(group, []), filename, "exec", dont_inherit=True) for group in groups[:-1]]


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """End what takes longer, such as a check that a strange answer keeps busy."""

    def stop(*_):
        raise Halted("the check of your answer takes too long.")

    before = signal.signal(signal.SIGALRM, stop)
    other = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *other)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """Judges answers to the exercises of one lesson.

    Args:
        names: after the set-up cell.
        stubs: number of an exercise -> its cell as handed out.
        key: number -> its "solution", "visible" and "hidden" tests, and "points".
        seconds: that the jail gives each answer.
    """

    def __init__(self, names: dict[str, Any], stubs: dict, key: dict, warder: Warder, seconds: float):
        self.names, self.stubs, self.key, self.warder, self.seconds = names, stubs, key, warder, seconds
        self.solved, self.code, self.cases = dict(names), {}, {}
        for number, part in key.items():
            run_cell(part["solution"], f"/solution/{number}", self.solved)
        for number, part in key.items():
            own = functions(part["solution"])
            remember(part["visible"], f"/check/{number}")
            visible = counted(part["visible"], own, f"/check/{number}")
            self.code[number] = own, visible, hidden_cases(part["hidden"], f"/hidden/{number}")

    def prove(self) -> list[str]:
        """Judge the solutions, which sets the number of cases; returns a sentence for each that does not pass."""
        faults = []
        for number, part in self.key.items():
            verdict, message, passed, right = self._examine(number, [(number, part["solution"])])
            self.cases[number] = passed, right
            if verdict != "PASS" or right < len(self.code[number][2]):
                faults.append(f"{number}: its own solution does not pass: {message or 'a hidden test fails'}")
        return faults

    def judge(self, answers: dict[str, list[tuple[str, str]]]) -> dict[str, dict]:
        """For each exercise of a submission points, verdict and what to say.

        Args:
            answers: number -> cells (name, source) to execute, the answer last; none if nothing was written.
        """
        return {
            number: self._verdict(number, answers.get(number, [])) for number in self.key if self.key[number]["points"]
        }

    def _verdict(self, number, cells):
        started, most = time.perf_counter(), float(self.key[number]["points"])
        visible, hidden = self.cases[number]
        total, got, verdict, message = len(visible) + hidden, 0, "TODO", "Not written yet."
        if cells:
            verdict, message, passed, right = self._examine(number, cells)
            if any(passed) or not any(visible):
                got = min(total, len(passed) + right)
            if verdict == "PASS":
                message = "All right."
                if got < total:
                    verdict = "PART"
                    message = f"It passes the check in the notebook, and {right} of {hidden} further tests."
            elif got:
                verdict, message = "PART", f"{got} of {total} cases are right. {message}"
        seconds = round(time.perf_counter() - started, 2)
        found = {"points": round(most * got / total, 2), "max": most, "verdict": verdict, "message": message}
        return found | {"cases": [got, total], "seconds": seconds}

    def _examine(self, number, cells):
        """Verdict of the visible check, what it says, its passed cases, and the number of hidden tests that pass."""
        own, visible, hidden = self.code[number]
        handed = dict(self.names)
        run_cell(self.stubs[number], "/handed-out", handed)
        known = handed_out(self.names, handed)
        names, passed, right, said = (
            {**self.solved, **{place[0]: handed[place[0]] for place in known}},
            [],
            0,
            StringIO(),
        )
        torch.manual_seed(0)
        checks.status.pop(number, None)
        with Jail(self.warder, self.seconds, self.stubs[number]) as jail, _within(4 * self.seconds + 60):
            jail.know(known)
            stopped = [jail.cell(source, name) for name, source in cells][-1]
            names |= {name: jail.function(name) for name in own} | {PASSED: passed.append}
            with redirect_stdout(said):
                exec(visible, names)
            verdict = checks.status.get(number, "FAIL")
            for test in hidden if verdict == "PASS" else ():
                try:
                    exec(test, names)
                    right += 1
                except Exception:  # whatever a wrong answer raises
                    continue
        message = said.getvalue().strip().rpartition(f"[{verdict}] {number}: ")[2]
        if stopped and verdict != "PASS":
            message = f"Your cell stopped: {stopped}"
        return verdict, message[:1000].encode("utf-8", "replace").decode(), passed, right


def court(descriptor: int) -> None:
    """What the process of a court does, at the other end of `Court`."""
    link = Connection(descriptor)
    setup, stubs, hidden, seconds, memory = link.recv()
    names: dict[str, Any] = {"__name__": "lesson"}
    with redirect_stdout(StringIO()):
        for text in setup:
            run_cell(text, "/setup", names)
    with tempfile.TemporaryDirectory() as root:
        try:
            warder = Warder(names, Path(root), memory)
            with Jail(warder, 60.0) as jail:
                jail.cell(f"__library__ = {str(paths.HERE)!r}{PROBE}", "probe")
                if found := jail.function("probe")(hidden):
                    raise CannotIsolate(CANNOT.format(f"a submission would reach {', '.join(found)}"))
        except CannotIsolate as error:
            link.send(error)
            return
        link.send(None)
        bench = Bench(names, stubs, link.recv(), warder, seconds)
        link.send(bench.prove())
        while True:
            try:
                link.send(bench.judge(link.recv()))
            except EOFError:
                return


class Court:
    """Starts the court of a lesson, and asks it; a context.

    Args:
        lesson: "setup" (cells), "stubs" and "key", see `Bench`.
        hidden: paths that no submission may see.
        seconds: for each answer.
        memory: bytes for each answer, on top of what the lesson loads.
    Raises:
        CannotIsolate: a sentence, if this machine gives no jail.
        ValueError: the exercises whose own solution does not pass.
    """

    def __init__(self, lesson: dict, hidden: list[str], seconds: float, memory: int):
        own, inside = socketpair()
        self.link = Connection(own.detach())
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        clean = {"PATH": os.defpath, "HOME": str(Path.home()), "PYTHONPATH": str(Path(__file__).parents[2])}
        course = {"COURSE_PROFILE": "smoke", "COURSE_DEVICE": "cpu", "COURSE_DATA": "/tmp", "COURSE_CACHE": "off"}
        course |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg", "NO_COLOR": "1"}  # a GPU would bring threads
        with inside:
            code = f"from course_lib.course.court import court; court({inside.fileno()})"
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=clean | threads | course,
                cwd="/",
                stdin=subprocess.DEVNULL,
                pass_fds=[inside.fileno()],
                start_new_session=True,
            )
        try:
            self.link.send((lesson["setup"], lesson["stubs"], hidden, seconds, memory))
            if error := self._answer(600.0):
                raise error
            self.link.send(lesson["key"])
            if faults := self._answer(600.0):
                raise ValueError("\n".join(faults))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Court":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self.link.close()  # an idle court tidies up and ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def judge(self, answers: dict[str, list[tuple[str, str]]], seconds: float) -> dict[str, dict]:
        """What `Bench.judge` says; an error if the process ends, or takes longer than `seconds`."""
        self.link.send(answers)
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        if not self.link.poll(seconds):
            raise TimeoutError(f"the process that checks answers took longer than {seconds:g} s")
        return self.link.recv()
