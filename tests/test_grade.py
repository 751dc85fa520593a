"""Grading: 26 students from release to feedback, what a jail keeps in, what passes its wall, what is healed."""

import copy
import csv
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
import torch
from grading import ENERGY, MARKER, OK, ROOT, ROOT_ANSWER, answered, cell, checkout, send, students
from torch import nn

from course_lib import __main__
from course_lib.course import build, grade, jail, release, update
from course_lib.course.court import Bench, Court, counted, functions, hidden_cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail is made of Linux namespaces")
LIMIT = ["--seconds", "3", "--memory", "600", "--workers", "1"]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A checkout of the small lesson, with an assignment hw1 that was made of it: (checkout, teaching folder)."""
    root = checkout(tmp_path_factory.mktemp("course"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "course_root", lambda: root)
        patch.setenv("COURSE_WORK", str(root / "work"))
        assert release.main("hw1", "01") == 0
        yield root, grade.teaching()


@pytest.fixture(scope="module")
def handed_out(course):
    return nbformat.read(course[1] / "release" / "hw1" / "01_small.ipynb", 4)


@pytest.fixture(scope="module")
def rehearsal(course, handed_out):
    """All students sent something, and it was graded with the command: (students, folder of grades, gradebook)."""
    root, place = course
    book, key = place / "gradebook.db", place / "source" / "hw1" / "01_small.ipynb"
    sent = students(handed_out, key, book, root / "written")
    send(place / "submitted", sent)
    assert len(sent) == 26
    command = ["grade", str(place / "submitted"), "--name", "hw1", "--gradebook", str(book), *LIMIT]
    assert __main__.main(command) == 0
    return sent, place / "grades" / "hw1", book


def scores(folder):
    with open(folder / "scores.csv", encoding="utf-8") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def page(folder, student):
    return (folder / "feedback" / f"{student}.html").read_text("utf-8")


# the rehearsal -------------------------------------------------------------------------------------------------------


def test_everybody_gets_what_the_code_deserves(rehearsal):
    sent, folder, _ = rehearsal
    found = scores(folder)
    assert {name: float(found[name]["points"]) for name in sent} == {name: points for name, (_, points) in sent.items()}
    assert all(float(row["of"]) == 7 for row in found.values())


def test_what_was_attacked_is_as_before(rehearsal, course):
    root, place = course
    assert not (root / "written").exists()
    assert sorted(path.name for path in (place / "source" / "hw1").iterdir()) == ["01_small.ipynb"]


def test_feedback_says_why_and_hides_hidden_tests(rehearsal):
    sent, folder, _ = rehearsal
    for student in sent:
        html = page(folder, student)
        assert MARKER not in html and "1000" not in html and "isfinite" not in html and "FOUND" not in html, student
    assert "passes the check in the notebook, and 0 of 1 further tests" in page(folder, "s02_overflow")
    assert "Not written yet" in page(folder, "s03_empty")
    assert "SyntaxError" in page(folder, "s04_syntax")
    assert "took more memory" in page(folder, "s06_os_exit") or "ended its process" in page(folder, "s06_os_exit")
    assert "longer than 3 s" in page(folder, "s07_loop")
    assert "32 are taken" in page(folder, "n04_huge")
    notes = {name: row["notes"] for name, row in scores(folder).items()}
    assert "got a link" in notes["n03_link"] and "damaged file" in notes["n10_garbage"]
    assert "more than once" in notes["s14_duplicate"] and "lost" in notes["s15_lost"]
    assert "back as handed out" in notes["s13_deleted"] and "count as handed out" in notes["s12_points"]
    assert notes["s01_correct"] == notes["s16_colab"] == ""


def test_the_gradebook_of_nbgrader_has_the_scores(rehearsal):
    from nbgrader.api import Gradebook

    sent, _, book = rehearsal
    with Gradebook(f"sqlite:///{book}") as gradebook:
        for student, (_, points) in sent.items():
            if student not in ("n03_link", "n10_garbage"):
                submission = gradebook.find_submission("hw1", student)
                assert (submission.score, submission.max_score) == (points, 7), student


def test_grading_again_reads_what_is_known(rehearsal, course, capsys):
    """After a kill, too: what was judged is kept one by one."""
    sent, folder, _ = rehearsal
    before = (folder / "scores.csv").read_bytes()
    kept = sorted((folder / "results").glob("*.json"))
    assert __main__.main(["grade", str(course[1] / "submitted"), "--name", "hw1", *LIMIT]) == 0
    assert f"{len(sent) - 2} of them known" in capsys.readouterr().out
    assert (folder / "scores.csv").read_bytes() == before and sorted((folder / "results").glob("*.json")) == kept


# the jail ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warder(tmp_path_factory):
    return jail.Warder({"__name__": "lesson", "torch": torch, "nn": nn}, tmp_path_factory.mktemp("root"), 2**29)


@pytest.fixture
def inside(warder):
    """A function that puts code into a jail and gives its function f."""
    opened = []

    def put(code, seconds=5.0, stub=""):
        opened.append(jail.Jail(warder, seconds, stub))
        assert opened[-1].cell(code, "cell") == ""
        return opened[-1].function("f")

    yield put
    for one in opened:
        one.__exit__()


def same_value(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same_value, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_value, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 2.5, float("inf"), "word", [1, "a"], (1, (2.0,)), {"a": 1, ("b", 2): None}, {1, 2},
        frozenset("a"),
        torch.arange(6.0).view(2, 3).T, torch.tensor([True, False]), torch.tensor(7), torch.zeros(0, 4), 10**30,
    ],
    ids=repr,
)  # fmt: skip
def test_values_pass_both_ways(inside, value):
    assert same_value(inside("def f(x):\n    return x")(value), value)


def test_arrays_and_foreign_things(inside):
    f = inside("import numpy as np\ndef f(x):\n    return x + 1, np.float64(2), np.int64(3), object(), [iter(())]")
    import numpy as np

    array, two, three, other, (iterator,) = f(np.arange(3))
    assert array.tolist() == [1, 2, 3] and isinstance(array, np.ndarray) and (type(two), type(three)) == (float, int)
    assert (type(other).__name__, type(iterator).__name__) == ("object", "tuple_iterator") and other != object()


def test_gradients_pass_in_and_out(inside):
    x, y = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    f = inside("def f(x, y):\n    return {'a': (x * y.square()).sum()}, [x + 1], x.detach()")
    found, (shifted,), plain = f(x, y * 1)
    assert found["a"].requires_grad and not plain.requires_grad
    (3 * found["a"] + shifted.sum()).backward()
    assert torch.allclose(x.grad, 3 * y.detach() ** 2 + 1) and torch.allclose(y.grad, 6 * (x * y).detach())


def test_a_graph_outside_is_followed_inside(inside):
    """As `torch.autograd.grad(loss, module.parameters())` asks, also for weights that the loss does not reach."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    loss = net[0](torch.rand(5, 3)).square().sum()
    f = inside("def f(loss, parts):\n    return {name: [g if g is None else g.norm() for g in torch.autograd.grad("
               "loss, list(part.parameters()), allow_unused=True, retain_graph=True)] "
               "for name, part in parts.items()}")  # fmt: skip
    found = f(loss, {"first": net[0], "second": net[1]})
    truth = torch.autograd.grad(loss, [*net[0].parameters()])
    assert found["second"] == [None, None]
    assert torch.allclose(torch.stack(found["first"]), torch.stack([slope.norm() for slope in truth]))


def test_a_network_and_its_optimiser_stay_together(inside):
    torch.manual_seed(0)
    net, twin = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    twin.load_state_dict(net.state_dict())
    code = "def f(net, optimizer, x):\n    net[1].eval()\n    net(x).sum().backward()\n    optimizer.step()"
    names = {}
    exec(code, names)
    x = torch.rand(4, 3)
    names["f"](twin, torch.optim.SGD(twin.parameters(), 0.5), x)
    inside(code)(net, torch.optim.SGD(net.parameters(), 0.5), x)
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))
    assert (net[0].training, net[1].training) == (True, False)


def test_functions_are_asked_outside_and_their_errors_come_home(inside):
    asked = []

    def outer(value, *, times=1):
        asked.append(value)
        if value > 2:
            raise ZeroDivisionError("too much")
        return value * times

    f = inside(
        "def f(g, values):\n    try:\n        return [g(v, times=2) for v in values]\n    except KeyError:\n        0"
    )
    assert f(outer, [1, 2]) == [2, 4] and asked == [1, 2]
    with pytest.raises(ZeroDivisionError, match="too much"):
        f(outer, [3])
    assert f(torch.nn.functional.relu, []) == []
    assert inside("def f(g):\n    return g.__module__")(torch.nn.functional.cross_entropy) == "torch.nn.functional"


def test_what_is_printed_goes_nowhere_and_harms_nothing(inside):
    code = "import sys\ndef f():\n    print('y' * 10**8)\n    print('z', file=sys.stderr, flush=True)\n"
    code += "    return sys.stdin.read()"
    assert inside(code)() == ""


def test_changes_of_what_is_given_are_seen(inside):
    x = torch.zeros(3)
    inside("def f(x):\n    x += 1")(x)
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "code, sentence",
    [
        ("import os\ndef f():\n    os._exit(0)", "ended its process"),
        ("def f():\n    while True: pass", "longer than 1 s"),
        ("def f():\n    return torch.zeros(10**7)", "32 are taken"),
        ("import ctypes\ndef f():\n    ctypes.string_at(0)", "ended its process"),
        ("import os\ndef f():\n    os.write(3, b'0' * 100)\n    while True: pass", "taken|no answer"),
        ("import os\ndef f():\n    os.write(3, bytes(7) + bytes([8]) + bytes(8))\n    while True: pass", "no answer"),
        ("def f():\n    return [[]] * 3_000_000", "no answer|longer"),
    ],
)
def test_what_ends_an_inmate_is_a_sentence(inside, code, sentence):
    f = inside(code, seconds=1.0)
    for _ in range(2):  # and it stays ended
        with pytest.raises(jail.Halted, match=sentence):
            f()


def test_a_course_below_tmp_stays_in_sight(tmp_path, monkeypatch):
    """A checkout or an environment may lie there, and is asked for modules until the end."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        part = Path(folder) / "part.txt"
        part.write_text("here")
        shown = jail._visible()
        monkeypatch.setattr(jail, "_visible", lambda: [*shown, Path(folder)])
        code = (
            "def f(path):\n    import tempfile\n    with tempfile.TemporaryFile('w') as own:\n        own.write('x')\n"
        )
        warder = jail.Warder({"__name__": "lesson"}, tmp_path, 2**29)
        with jail.Jail(warder, 5.0) as one:
            assert one.cell(f"{code}    return open(path).read()", "cell") == ""
            assert one.function("f")(str(part)) == "here"


def test_an_error_shows_the_line_of_the_student(inside):
    with pytest.raises(ValueError, match="bad") as caught:
        inside("def f():\n    x = 1\n    raise ValueError('bad')")()
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1, last.name) == ("/answer/cell", 3, "f")


def test_nothing_runs_on_after_a_jail_is_left(warder):
    with jail.Jail(warder, 5.0) as one:
        one.cell("import time", "cell")
        keeper = one.keeper
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        assert len(children) == 1
    for _ in range(100):
        if not any(Path(f"/proc/{number}").exists() for number in [str(keeper), *children]):
            return
        time.sleep(0.02)
    pytest.fail("the inmate is still there")


def test_the_process_of_the_student_never_knew_an_expected_value(course, handed_out):
    """The whole memory of the process that inmates are forked from is searched for a word of the hidden tests."""
    lesson = grade.graded_lessons(course[0] / "notebooks" / "src")["01"].parts()
    with Court(lesson, [], 3.0, 2**29) as court:
        judge = court.process.pid
        (warder,) = Path(f"/proc/{judge}/task/{judge}/children").read_text().split()
        assert MARKER.encode() in memory_of(judge) and MARKER.encode() not in memory_of(warder)


def memory_of(process):
    found = []
    with open(f"/proc/{process}/maps") as maps, open(f"/proc/{process}/mem", "rb") as memory:
        for line in maps:
            (
                place,
                rights,
                *_,
            ) = line.split()
            if rights.startswith("rw"):
                start, end = (int(one, 16) for one in place.split("-"))
                try:
                    memory.seek(start)
                    found.append(memory.read(end - start))
                except (OSError, ValueError):
                    continue
    return b"".join(found)


# where there is no jail, and no root ---------------------------------------------------------------------------------


def command(course, *prefix):
    """The words and the surroundings that grade one submission, as a command of its own."""
    root, _ = course
    code = (f"from course_lib.course import update; from pathlib import Path\nroot = Path({str(root)!r})\n"
            "update.course_root = lambda: root\n"
            "import sys; from course_lib.__main__ import course; sys.exit(course())")  # fmt: skip
    surroundings = {**os.environ, "COURSE_WORK": str(root / "work"), "OMP_NUM_THREADS": "1", "HOME": "/tmp"}
    return [*prefix, sys.executable, "-c", code, "grade"], surroundings


def as_root():
    return os.geteuid() == 0 and shutil.which("setpriv") and shutil.which("unshare")


@pytest.mark.skipif(not as_root(), reason="takes root, to give its rights away")
def test_without_namespaces_nothing_is_graded(course, handed_out, tmp_path):
    send(tmp_path / "sent", {"eva": (answered(handed_out, OK), 3)})
    words, surroundings = command(course, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    ran = subprocess.run(
        [*words, tmp_path / "sent", "--name", "hw1", "--folder", tmp_path / "grades"],
        env=surroundings, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 1 and "cannot be isolated here" in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "grades" / "scores.csv").exists()


@pytest.mark.skipif(not as_root(), reason="who is not root tests this with everything else")
def test_without_root_it_takes_user_namespaces(handed_out):
    """A plain user grades: an attack earns what it earned from root's."""
    keep = {"s01_correct": 7, "s02_overflow": 2, "n01_fork_bomb": 3, "n06_key": 0, "n07_parent": 3}
    with tempfile.TemporaryDirectory() as own:  # the folders of pytest are root's alone
        root = checkout(Path(own) / "course")
        key = root / "work" / "teaching" / "source" / "hw1" / "01_small.ipynb"
        sent = students(handed_out, key, root / "book.db", root / "written")
        send(root / "sent", {name: sent[name] for name in keep})
        for place in (Path(own), *Path(own).rglob("*")):
            place.chmod(0o777)
        # Python in a home directory that others may not enter is shown to them, for this process alone
        base, script = sys.base_prefix, ""
        for home in [one for one in Path(base).parents if not one.stat().st_mode & 0o001][-1:]:
            script = f"mkdir {own}/py && mount --bind {base} {own}/py && mount -t tmpfs -o mode=755 tmpfs {home} && "
            script += f"mkdir -p {base} && mount --bind {own}/py {base} && "
        script += 'exec setpriv --reuid=1234 --regid=1234 --clear-groups "$@"'
        words, surroundings = command((root, None), "unshare", "--mount", "bash", "-c", script, "bash")
        ran = subprocess.run(
            [*words, root / "sent", "--folder", root / "grades", *LIMIT],
            env=surroundings, capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert {name: float(row["points"]) for name, row in scores(root / "grades").items()} == keep


# what goes wrong outside ---------------------------------------------------------------------------------------------


class Bailiff:
    """In the place of a court: gives full points, and stops at a given case."""

    stop_at, judged, error = 10**6, 0, KeyboardInterrupt

    def __init__(self, lesson, *limits):
        self.lesson = lesson

    def judge(self, answers, seconds):
        type(self).judged += 1
        if self.judged == self.stop_at:
            raise self.error
        return {
            number: {"points": part["points"], "max": part["points"], "verdict": "PASS", "message": "All right."}
            for number, part in self.lesson["key"].items()
        }

    def __exit__(self, *error):
        pass


@pytest.fixture
def bailiff(monkeypatch):
    monkeypatch.setattr(grade.court, "Court", type("Own", (Bailiff,), {}))
    return grade.court.Court


def some(handed_out, folder, count=5):
    """Students whose answers differ."""
    send(folder, {f"s{place}": (answered(handed_out, f"{OK}# {place}"), 3) for place in range(count)})
    return ["grade", str(folder), "--name", "hw1", "--folder", str(folder.parent / "grades"), "--workers", "1"]


def test_an_interrupt_keeps_what_was_judged(course, handed_out, tmp_path, bailiff, capsys):
    bailiff.stop_at = 4
    words = some(handed_out, tmp_path / "sent")
    assert __main__.main(words) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert len([*(tmp_path / "grades" / "results").iterdir()]) == 3
    assert __main__.main(words) == 0 and bailiff.judged == 4 + 2
    assert "3 of them known from before" in capsys.readouterr().out


def test_a_court_that_breaks_down_costs_one_submission(course, handed_out, tmp_path, bailiff, capsys):
    bailiff.stop_at, bailiff.error = 2, EOFError
    assert __main__.main(some(handed_out, tmp_path / "sent")) == 0
    found = scores(tmp_path / "grades")
    assert sorted(float(row["points"]) for row in found.values()) == [0, 7, 7, 7, 7]
    assert "1 could not be graded in full" in capsys.readouterr().out
    assert "Look at this one yourself" in "".join(row["notes"] for row in found.values())


def test_a_corrected_check_grades_anew(course, handed_out, tmp_path, bailiff):
    words = some(handed_out, tmp_path / "sent", 2)
    source = course[0] / "notebooks" / "src" / "01_small.py"
    assert __main__.main(words) == 0 and bailiff.judged == 2
    before = source.read_text()
    try:
        source.write_text(before.replace("assert expected", "assert 1 and expected"))
        assert __main__.main(words) == 0 and bailiff.judged == 4
    finally:
        source.write_text(before)


def test_whoever_sent_nothing_has_a_row(course, handed_out, tmp_path, bailiff):
    (tmp_path / "class.csv").write_text("student,mail\nada,a@b\nbob,b@b\n")
    assert __main__.main(["release", "--name", "hw2", "--students", str(tmp_path / "class.csv")]) == 0
    mine = answered(release.variant(handed_out, release.seed_of("hw2", "ada")), OK)
    send(tmp_path / "sent", {"ada": (mine, 3), "=cmd()": (answered(handed_out, OK), 3)})
    assert __main__.main(["grade", str(tmp_path / "sent"), "--name", "hw2", "--folder", str(tmp_path / "g")]) == 0
    found = scores(tmp_path / "g")
    assert found["bob"]["notes"] == "Nothing came." and found["bob"]["points"] == "0"
    assert found["ada"]["notes"] == "" and set(found) == {"ada", "bob", "'=cmd()"}
    send(tmp_path / "sent", {"bob": (mine, 3)})
    assert __main__.main(["grade", str(tmp_path / "sent"), "--name", "hw2", "--folder", str(tmp_path / "g")]) == 0
    assert "whose is it?" in scores(tmp_path / "g")["bob"]["notes"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nowhere"], "expected a folder or zip archive of submissions, got nothing"),
        (["empty"], "expected notebooks (*.ipynb) of students, got none"),
        (["empty", "--name", "hw9"], "expected an assignment 'hw9', got none"),
        (["broken.zip"], "expected a zip archive of notebooks, got a damaged file"),
    ],
)
def test_what_cannot_be_graded_is_a_sentence(course, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04broken")
    assert __main__.main(["grade", *words]) == 1
    assert sentence in capsys.readouterr().err


# what was sent -------------------------------------------------------------------------------------------------------


def test_folders_of_learning_platforms(tmp_path):
    names = {
        "Ada Lovelace_123_assignsubmission_file/01_small.ipynb": "Ada Lovelace_123",
        "bob/hw1/01_small.ipynb": "bob",
        "eva_01_small.ipynb": "eva",
        "lovelaceada_123_456_01_small-1.ipynb": "lovelaceada_123_456",
    }
    for name in (*names, "bob/.ipynb_checkpoints/01_small-checkpoint.ipynb", "bob/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert {path.relative_to(tmp_path).as_posix(): student for student, path in grade.sent(tmp_path)} == names


def test_an_archive_is_unpacked_inside_its_folder(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("eva/01_small.ipynb", "../out.ipynb", "/abs.ipynb", "eva/script.py"):
            archive.writestr(name, "{}")
    folder = grade.unpacked(tmp_path / "all.zip", tmp_path / "in")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found <= {"all.zip", "in/eva/01_small.ipynb"} and folder == tmp_path / "in" and len(found) == 2


def solved_cells(notebook, handed_out):
    found, notes = grade.answers(notebook, handed_out)
    return {number: "\n".join(source for _, source in cells) for number, cells in found.items()}, notes


def test_an_honest_submission_needs_no_healing(handed_out):
    found, notes = solved_cells(answered(handed_out, OK), handed_out)
    assert notes == [] and [*found] == ["01.1"] and found["01.1"] == OK
    assert solved_cells(handed_out, handed_out) == ({}, [])


def test_helpers_of_a_students_own_travel_and_experiments_do_not(handed_out):
    own = answered(handed_out, "def softened(x, t=1.0):\n    return helper(x / t, AXIS)")
    mine = (
        "import math\nAXIS = -1\nprint(1)\nt = train()\n@staticmethod\ndef helper(x, axis):\n    return x.softmax(axis)"
    )
    own.cells.insert(3, nbformat.v4.new_code_cell(mine))
    own.cells.insert(3, nbformat.v4.new_code_cell("%matplotlib inline\nthis is no Python"))
    text = solved_cells(own, handed_out)[0]["01.1"]
    assert "def helper" in text and "@staticmethod" in text and "AXIS = -1" in text and "import math" in text
    assert "train()" not in text and "print" not in text


def test_an_answer_in_a_cell_of_its_own_counts(handed_out):
    own = copy.deepcopy(handed_out)
    own.cells.append(nbformat.v4.new_code_cell(OK))
    found = grade.answers(own, handed_out)[0]["01.1"]
    assert found[-1][1].strip() == OK.strip() and "NotImplementedError" in found[-2][1]


def test_the_rest_of_an_answer_with_magics_is_python(handed_out):
    found, _ = solved_cells(answered(handed_out, f"%%time\n{OK}"), handed_out)
    assert found["01.1"] == f"\n{OK}"
    assert grade.without_magics("x = (5\n  % 2)") == "x = (5\n  % 2)"


def test_a_copy_from_an_earlier_release_keeps_its_answer(handed_out):
    mine, new = answered(handed_out, OK), copy.deepcopy(handed_out)
    cell(new, "exercise-01-1").source = cell(new, "exercise-01-1").source.replace("Probabilities", "Shares")
    cell(new, "check-01-1").source += "\n# corrected"
    update.mark(new)
    found, notes = solved_cells(mine, new)
    assert found == {"01.1": OK} and notes == []


def test_another_lesson_is_no_submission_of_this_one(handed_out):
    other = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"x = {place}") for place in range(20)])
    assert grade.lesson_of(other, "homework.ipynb") == "" and grade.lesson_of(other, "01_small.ipynb") == "01"
    with pytest.raises(ValueError, match="Expected a copy of the lesson"):
        grade.answers(other, handed_out)


# cases ---------------------------------------------------------------------------------------------------------------


def cases_of(check, own):
    passed = []
    exec(
        counted(check, own, "/check"),
        {"_passed": passed.append, "ask": lambda f, *x: f(*x), "f": abs, "same": lambda *x: 0},
    )
    return passed


def test_a_case_is_a_call_with_what_is_asserted_of_it():
    assert cases_of("a = ask(f, 1)\nassert a\nassert a > 0\nsame(a, 1)", ["f"]) == [True]
    assert cases_of("a = 3\nsame(ask(f, 1), 1)\nb = f(2)\nassert b", ["f"]) == [True, False]
    assert cases_of("for x in (1, 2):\n    same(f(x), x)\nassert f(0) == 0", ["f"]) == [True, True, False]
    assert cases_of("def tried(x):\n    return ask(f, x)\nsame(tried(1), 1)\nsame(tried(2), 2)", ["f"]) == [True, True]
    assert cases_of("def helper(x):\n    assert x\na = f(1)\n", ["f"]) == []


def test_hidden_tests_are_cases_each_by_itself():
    tests = "a = f(1)\nassert a\nfor x in (1, 2):\n    assert f(x)\nb = 1"
    assert len(hidden_cases(tests, "/hidden")) == 2
    assert hidden_cases("# nothing", "/hidden") == []


def test_functions_that_a_student_writes_are_those_with_a_solution():
    cell_ = "def a():\n    ### BEGIN SOLUTION\n    pass\n    ### END SOLUTION\n\ndef b():\n    pass\n"
    assert functions(cell_) == ["a"]
    with pytest.raises(ValueError, match="inside a function"):
        functions("### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n" + cell_)


def test_credit_ends_at_the_first_wrong_case_and_form_alone_earns_nothing(course, handed_out):
    """One court for: the second case wrong, the first one wrong, wrong beside a helper that was changed."""
    lesson = grade.graded_lessons(course[0] / "notebooks" / "src")["01"].parts()
    with Court(lesson, [], 3.0, 2**29) as court:

        def points(number, text):
            found = court.judge({number: [(number, text)]}, 60.0)[number]
            return found["points"], found["verdict"], found["message"]

        assert points("01.1", "def softened(x, t=1.0):\n    return x.softmax(-1)")[:2] == (1, "PART")
        assert points("01.1", "def softened(x, t=1.0):\n    return x.exp()") == (
            0,
            "FAIL",
            "You did not divide by the sum.",
        )
        assert points("01.1", "def softened(x, t=1.0):\n    x -= 1\n    return x.softmax(-1)")[2].startswith(
            "softened changes"
        )
        wild = points("01.2", "def zero_of(f, low, high):\n    return f(7.0)")
        assert wild == (0, "FAIL", "You measured at 7, outside of 0 to 2.")
        assert points("01.2", ROOT_ANSWER)[0] == 2
        assert points("01.3", ENERGY)[0] == 2
        assert points("01.3", ENERGY.replace("rule(model.eval()(x))", "rule(model.eval()(x)).detach()"))[0] == 0
        error = points("01.1", "def softened(x, t=1.0):\n    y = x / t\n    return y.no_such()")
        assert error[0] == 0 and "line 3 of softened: return y.no_such()" in error[2]


# the lessons ---------------------------------------------------------------------------------------------------------

LESSONS = build.sources(ROOT / "notebooks" / "src")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a GPU cannot be forked; courts see none")
# Each lesson starts a court of its own, up to a minute: two of them stand for all here, `-m slow` tries the rest.
@pytest.mark.parametrize(
    "source",
    [path if path.stem[:2] in ("01", "04") else pytest.param(path, marks=pytest.mark.slow) for path in LESSONS],
    ids=lambda path: path.stem,
)
def test_every_exercise_of_the_course_can_be_graded(source, tmp_path, monkeypatch, capsys):
    """All solutions pass in the jail, and near misses get the message there that they get outside."""
    for name, value in {"PROFILE": "smoke", "DEVICE": "cpu", "RESULTS": str(tmp_path)}.items():
        monkeypatch.setenv(f"COURSE_{name}", value)
    monkeypatch.setenv("NO_COLOR", "1")
    lesson = grade.graded_lessons(source.parent, [source.stem[:2]])[source.stem[:2]].parts()
    names = {"__name__": "lesson"}
    for text in lesson["setup"]:
        jail.run_cell(text, "/setup", names)
    warder = jail.Warder(names, tmp_path, 2**30)
    bench = Bench(names, lesson["stubs"], lesson["key"], warder, 20.0)
    assert bench.prove() == []
    misses = importlib.import_module(f"lessons.near_misses.{source.stem[:2]}").NEAR_MISSES
    for number, tried in misses.items():
        for _, code, fragment in tried[:2]:
            found = bench.judge({number: [(number, code)]})[number]
            assert fragment in found["message"] and found["points"] < found["max"], (number, found)
    warder.orders.close()
