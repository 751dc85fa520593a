"""Commands: every field is an option, the same thing has one spelling, what is wrong is a sentence before any work."""

import importlib

import pytest

from course_lib import __main__
from course_lib.course.commands import COMMANDS

RESEARCH = [name for name, (place, _) in COMMANDS.items() if ".experiments." in place]
SHARED = ("--data", "--device", "--folder", "--workers")  # of all of them, in one spelling
NEEDED = {"evaluate seeds": ["--checkpoint", "nowhere.safetensors"], "ablate": ["--table", "5"]}


def asked(name, *options):
    """The words of a command, with what it does not run without."""
    folder = [] if name.startswith("evaluate") else ["--folder", "out"]
    return [*name.split(), *folder, *NEEDED.get(name, []), *options]


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
    assert ("--weights" in said) if name.startswith("train") else ("--checkpoint" in said or name == "ablate")
    assert not {"--out", "--method,", "--config."} & set(said.split())


@pytest.mark.parametrize("name", RESEARCH)
@pytest.mark.parametrize(
    "wrong", [("--data", "nowhere"), ("--workers", "-1"), ("--device", "tpu9")], ids=lambda pair: pair[0][2:]
)
def test_a_wrong_value_or_path_is_a_sentence_before_any_work(name, wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "build" / "results"))
    try:
        code = __main__.main(asked(name, *wrong))
    except SystemExit as stop:  # tyro's own way to refuse
        code = stop.code
    said = capsys.readouterr()
    assert code in (1, 2) and said.err.strip() and "Traceback" not in said.err
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", RESEARCH)
def test_an_unknown_option_is_named(name, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(asked(name, "--colour", "red"))
    assert stop.value.code == 2 and "--colour" in capsys.readouterr().err


def test_debug_shows_where_it_went_wrong():
    with pytest.raises(FileNotFoundError):
        __main__.main(["train", "retrieval", "--data", "nowhere", "--folder", "out", "--debug"])
