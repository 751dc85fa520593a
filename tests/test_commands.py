"""Commands: every field is an option, the same thing has one spelling, what is wrong is a sentence before any work."""

import errno
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from course_lib import __main__
from course_lib.course.commands import COMMANDS
from course_lib.paths import HERE
from course_lib.worlds import minis

ROOT = Path(__file__).resolve().parents[1]
RESEARCH = [
    name for name, (place, _) in COMMANDS.items() if ".experiments." in place and name not in ("explain", "submission")
]
SHARED = ("--data", "--device", "--folder", "--workers")  # of all of them, in one spelling
NEEDED = {
    "evaluate seeds": ["--checkpoint", "nowhere.safetensors"],
    "ablate": ["--table", "5"],
    "submission": ["predictions", "--data", "voc"],
    "explain": ["photograph.jpg"],
}


def asked(name, *options):
    """The words of a command, with what it does not run without."""
    folder = ["--folder", "out"] if name in RESEARCH and not name.startswith("evaluate") else []
    return [*name.split(), *folder, *NEEDED.get(name, []), *options]


def code_of(words):
    """The exit code of a command, whoever ends it."""
    try:
        return __main__.main([str(word) for word in words])
    except SystemExit as stop:  # tyro's own way to refuse
        return stop.code


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    module, _, function = COMMANDS[name][0].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", RESEARCH)
def test_one_spelling_for_the_same_thing(name, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([*name.split(), "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"python -m course_lib {name}" in said
    assert all(option in said for option in SHARED)
    started = name.startswith(("train", "run"))
    assert ("--weights" in said) if started else ("--checkpoint" in said or name == "ablate")
    assert not {"--out", "--method,", "--config."} & set(said.split())


# Every option of every command with values that mean nothing --------------------------------------------------------

VALUES = ("0", "-1", "nan", "", "inf", "1e30", "nonsense")
# What may be asked for all the same, by option: 0 where nothing of a thing is something.
ZERO = (
    "seed random-seeds seeds workers weight-decay momentum power contrast-from dropout drop neck background threshold "
    "rotation translation cross-prototype cross-cam intra epsilon lam"
).split()
ALLOWED = {name: {"0"} for name in ZERO} | {
    "data": {""},  # the miniature
    "checkpoint": {""},  # none
    "at-once": {"0"},  # as many as fit
    "segmenter": {""},  # that of the seeds
    "architecture": {""},  # with a checkpoint only
    "rule": {""},  # the usual one
    "class": {*VALUES},  # the network says which it knows
    "pack": {*VALUES},  # a file that is yet to be made
    "root": {*VALUES},  # any name of a folder that is yet to be made, and so of the next two
    "folder": {*VALUES},
    "into": {*VALUES},
    # Names of parts of a network, which is built before it is trained; it says which parts it has.
    "frozen": {*VALUES},
    # The lessons say which of them and which exercises there are, and a file of students comes after them.
    **{f"release {option}": {*VALUES} for option in ("name", "lessons", "exercises", "about", "students")},
    **{f"release {option}": {"0"} for option in ("minutes", "points")},  # no limit
    "grade name": {""},  # all exercises of the lessons that came
    "gradebook": {*VALUES},  # a file that is yet to be made
}


class Began(Exception):
    """Work has begun."""


def options_of(name, capsys):
    """The options of a command that take a value, as its help shows them."""
    with pytest.raises(SystemExit):
        __main__.main([*name.split(), "--help"])
    return re.findall(r"^\W+--([\w-]+) +(?=INT|FLOAT|STR|PATH|\{|\[)", capsys.readouterr().out, re.MULTILINE)


@pytest.fixture
def nothing_is_done(monkeypatch, tmp_path):
    """All work in front of a command's checks is taken away, and the work after them is counted."""
    began = []

    def begin(config=None, folder=None, *_, **__):
        began.append(True)
        raise RuntimeError("Work has begun.")

    for place, _ in COMMANDS.values():
        module = importlib.import_module(place.partition(":")[0])
        for work in (
            "train evaluate ablate ablate_tricks load run execute collect _write_all run_pipeline as_voc "
            "check_submission write_submission explained_network graded_lessons"
        ).split():
            if hasattr(module, work):
                monkeypatch.setattr(module, work, begin)
    for module, works in {
        "course_lib.course.build": ("build_student", "build_solved"),
        "course_lib.course.report": ("write", "write_readme"),
        "course_lib.course.studies": ("measure",),
        "course_lib.course.bench": ("_measure",),
        "course_lib.worlds.minis": ("photographs",),
    }.items():
        for work in works:
            monkeypatch.setattr(importlib.import_module(module), work, begin)
    from course_lib.course import bench

    monkeypatch.setattr(bench, "ROWS", {"cam": begin})
    miniature = tmp_path / "miniature"
    miniature.mkdir()
    for mini in ("mini_ilsvrc", "mini_imagenet", "mini_cub", "mini_market", "mini_voc"):
        monkeypatch.setattr(minis, mini, lambda *_, **__: miniature)
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "build" / "results"))
    (tmp_path / "there.safetensors").touch()
    monkeypatch.setitem(NEEDED, "evaluate seeds", ["--checkpoint", str(tmp_path / "there.safetensors")])
    (tmp_path / "photograph.jpg").touch()
    monkeypatch.setitem(NEEDED, "explain", [str(tmp_path / "photograph.jpg")])
    monkeypatch.setitem(NEEDED, "grade", [str(miniature)])
    monkeypatch.setitem(NEEDED, "submission", [str(miniature), "--data", str(miniature)])
    monkeypatch.setitem(NEEDED, "train reid", ["--ablation"])  # it takes the options of an evaluation, too
    monkeypatch.chdir(tmp_path)
    return began


@pytest.mark.parametrize("values", [VALUES[:4], pytest.param(VALUES[4:], marks=pytest.mark.slow)], ids=",".join)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_means_nothing_is_refused_before_any_work(name, values, nothing_is_done, capsys, tmp_path, monkeypatch):
    wrong, options = [], options_of(name, capsys)
    assert len(options) >= (8 if name in RESEARCH else name not in ("build", "lab", "update", "bench"))
    if name == "ablate":
        options = [option for option in options if option not in options_of("train wsss", capsys)] + ["folder"]
    for option in options:
        for value in values:
            nothing_is_done.clear()
            (folder := tmp_path / f"{option}={value}").mkdir()
            monkeypatch.chdir(folder)
            code = code_of([*asked(name), f"--{option}", value])
            said = capsys.readouterr().err
            allowed = ALLOWED.get(f"{name} {option}", ALLOWED.get(option, ()))
            if "Traceback" in said or "fault of the course" in said or (code and not said.strip()):
                wrong.append(f"--{option} {value!r}: {said}")
            elif (not code or nothing_is_done) and value not in allowed:
                wrong.append(f"--{option} {value!r} was accepted")
            elif not nothing_is_done and value in allowed:
                wrong.append(f"--{option} {value!r} was refused: {said}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", RESEARCH)
@pytest.mark.parametrize(
    "wrong",
    [
        ("--data", "nowhere"),
        ("--data", "a file"),
        ("--folder", "a file"),
        ("--folder", "a file/below"),
        ("--workers", "-1"),
        ("--device", "tpu9"),
        ("--weights", "nowhere.pth"),
        ("--checkpoint", "a folder"),
        ("--backbone", "resnet5000"),
        ("--momentum", "2"),
        ("--contrast-from", "2"),
        ("--background", "nan"),
        ("--queries", "0"),
        ("--queries", "0 0 0 0 0"),
        ("--queries", "1 2 3"),
        ("--long-side", "512 256"),
        ("--shots", "1 1"),
        ("--loss", "NoSuchLoss"),
        ("--colour", "red"),
    ],
    ids="=".join,
)
def test_a_wrong_value_or_path_is_a_sentence_before_any_work(name, wrong, nothing_is_done, capsys, tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    option, values = wrong
    code = code_of(asked(name, option, *(values.split(" ") if values[0].isdigit() else [values])))
    said = capsys.readouterr()
    assert code in (1, 2) and said.err.strip() and "Traceback" not in said.err and not nothing_is_done
    assert not list(tmp_path.rglob("*.json"))
    assert (tmp_path / "a file").read_bytes() == b""


# The boundary --------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch, capsys):
    """What a command says, and its exit code, whose work raises an error."""

    def run(error, *words, name="report"):
        def command():
            for _ in tqdm(range(3), "a bar"):
                raise error

        monkeypatch.setattr(importlib.import_module("course_lib.course.report"), "main", command)
        monkeypatch.setitem(COMMANDS, name, ("course_lib.course.report:main", ""))
        code = __main__.main([*name.split(), *words])
        return capsys.readouterr().err, code

    return run


def raised(error, file="/elsewhere/theirs.py"):
    """An error that code in a file raises, somebody else's or ours."""
    try:
        exec(compile("raise error", file, "exec"), {"error": error})
    except type(error) as caught:
        return caught


OURS = str(HERE / "engine.py")


class SafetensorError(Exception):
    """As of safetensors, which derives from nothing else."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/x.pt"), "/full/x.pt: .* No space left .*free some"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: .* Not a directory; a file stands"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), "/root: .* Permission denied; ask for the right"),
        (MemoryError(), "found no memory left .MemoryError.; take smaller batches"),
        (RuntimeError("[enforce] can't allocate memory: 10 bytes\nframes"), r"no memory left \(\[enforce\] .*bytes\);"),
        (
            raised(SafetensorError("header too large\nmore")),
            "failed in theirs.py: SafetensorError: header too large;",
        ),
        (raised(ValueError("a foreign word")), "`report` failed in theirs.py: ValueError: a foreign word; --debug"),
        (raised(FloatingPointError("Loss is not finite."), OURS), "^Loss is not finite.$"),
        (TypeError("no len()"), "fault of the course: TypeError: no len.*report it"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "needs a package .*'x'"),
        (
            ValueError(f'x\nOriginal Traceback:\n  File "{OURS}", line 3\nValueError: b: broken: c'),
            "^b: broken: c$",
        ),
        (KeyboardInterrupt(), "^Stopped.$"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, BaseException) else "",
)
def test_every_error_is_a_sentence_on_a_line_of_its_own(failing, error, sentence):
    said, code = failing(error)
    *bar, last = said.splitlines()
    assert "a bar" in bar[-1] and re.search(sentence, last if "^" in sentence else said) and code
    assert "Traceback" not in said.replace("Original Traceback", "")


def test_what_goes_on_after_a_stop_says_so(failing):
    said, code = failing(KeyboardInterrupt(), name="evidence")
    assert said.endswith("\nStopped. The same command goes on from here.\n") and code == 130


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), TypeError("ours")], ids=repr)
def test_debug_shows_where_it_went_wrong(failing, error):
    with pytest.raises(type(error)):
        failing(error, "--debug")


def test_who_reads_the_first_lines_only_sees_no_error():
    script = "import sys; from course_lib.__main__ import main; sys.exit(main(['build', '--check']))"
    reader = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    reader.stdout.close()
    assert reader.stderr.read() == "" and reader.wait() == 1
