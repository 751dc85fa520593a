"""A student's work survives: a build, a corrected release, a split cell, Colab, damage; no update is done twice."""

import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from course_lib.course import build, commands, update

ROOT = Path(__file__).resolve().parents[1]
LESSON = ROOT / "notebooks" / "01_class_activation_maps.ipynb"
ANSWER = "def class_map(features, weight):\n    return my_own_way(features, weight)"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A checkout of one real lesson in an odd folder: (handed out, working copies)."""
    root = tmp_path / "Übung & more"
    (root / "notebooks").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    shutil.copy(LESSON, root / "notebooks")
    monkeypatch.setattr(update.paths, "HERE", root / "course_lib")
    monkeypatch.delenv("COURSE_WORK", raising=False)
    update.copy_lessons(root / "notebooks", root / "work")
    return root / "notebooks" / LESSON.name, root / "work" / LESSON.name


def load(path):
    return nbformat.reads(path.read_text("utf-8"), 4)


def edit(path, change):
    notebook = load(path)
    change(notebook.cells)
    path.write_text(nbformat.writes(notebook), "utf-8")


def release(path, change):
    """A corrected release: a change of cells, and new marks."""
    notebook = load(path)
    change(notebook.cells)
    update.mark(notebook)
    path.write_text(nbformat.writes(notebook), "utf-8")


def at(cells, wanted):
    """Number of the cell of a grade id, or that holds a text."""
    return next(
        number
        for number, cell in enumerate(cells)
        if cell.metadata.get("nbgrader", {}).get("grade_id") == wanted or wanted in cell.source
    )


def answer(cells):
    cell = cells[at(cells, "exercise-01-1")]
    cell.source, cell.execution_count = ANSWER, 7
    cell.outputs = [nbformat.v4.new_output("stream", text="mine")]


def code(source, **metadata):
    return nbformat.v4.new_code_cell(source, metadata=metadata)


def backups(copy_):
    return sorted((copy_.parent / "backup").glob("*")) if (copy_.parent / "backup").exists() else []


def sources(path):
    return [cell.source for cell in load(path).cells]


def test_a_corrected_release_keeps_answers_and_cells_of_ones_own(course, capsys):
    handed_out, mine = course

    def work(cells):
        answer(cells)
        cells[0].source += "\n\nMy prediction: warm noses."  # a text that the release leaves alone
        cells.insert(at(cells, "check-01-1"), code("my_own_way = maps.cam"))
        cells.insert(0, nbformat.v4.new_markdown_cell("My notes"))
        cells.append(code("print('my last cell')"))

    def correct(cells):
        cells[at(cells, "check-01-1")].source += "\nassert 'corrected'"
        text = cells[at(cells, "exercise-01-2") - 1]
        text.source = text.source.replace("minutes", "short minutes", 1)
        cells.insert(3, nbformat.v4.new_markdown_cell("## A new section"))
        del cells[-2]  # handed out, and gone

    edit(mine, work)
    before = mine.read_bytes()
    assert update.behind(handed_out.parent, mine.parent) == []
    release(handed_out, correct)
    assert update.behind(handed_out.parent, mine.parent) == [mine.stem]
    assert update.main() == 0 and update.behind(handed_out.parent, mine.parent) == []
    said = capsys.readouterr().out
    assert "1 answers kept" in said and "3 cells of your own kept" in said and "1 changes of yours kept" in said
    cells, now = load(mine).cells, load(handed_out).cells
    kept = cells[at(cells, "exercise-01-1")]
    assert (kept.source, kept.execution_count, kept.outputs[0].text) == (ANSWER, 7, "mine")
    assert cells[0].source == "My notes" and cells[-1].source == "print('my last cell')"
    assert cells[at(cells, "exercise-01-1") + 1].source == "my_own_way = maps.cam"
    assert "assert 'corrected'" in cells[at(cells, "check-01-1")].source
    assert "My prediction: warm noses." in cells[1].source and "## A new section" in sources(mine)
    own = {"My notes", "my_own_way = maps.cam", "print('my last cell')", ANSWER, cells[1].source}
    theirs = [cell.source for cell in now]
    theirs[0], theirs[at(now, "exercise-01-1")] = cells[1].source, ANSWER
    assert [s for s in sources(mine) if s not in own - {ANSWER, cells[1].source}] == theirs
    [backup] = backups(mine)
    assert backup.read_bytes() == before and re.match(r"01_.*-\d{4}-\d\d-\d\d-\d{6}\.ipynb", backup.name)
    nbformat.validate(load(mine))
    # again: nothing to do, nothing written
    stamp = mine.stat().st_mtime_ns
    assert update.main() == 0 and "up to date" in capsys.readouterr().out
    assert mine.stat().st_mtime_ns == stamp and backups(mine) == [backup]


def test_what_both_changed_stands_below_as_a_note_once(course):
    handed_out, mine = course

    def tinker(cells):
        cells[at(cells, "PROFILE = ")].source += "\nMINE = 1"
        cells[at(cells, "check-01-1")].source = "print('no check')"

    edit(mine, tinker)
    release(handed_out, lambda cells: cells[at(cells, "PROFILE = ")].update(source='PROFILE = "mini"  # new'))
    update.main()
    update.main()
    cells = load(mine).cells
    number = at(cells, "PROFILE = ")
    assert cells[number].source == 'PROFILE = "mini"  # new' and "MINE = 1" in cells[number + 1].source
    assert cells[number + 1].cell_type == "markdown"
    number = at(cells, "check-01-1")
    assert 'check("01.1"' in cells[number].source and "print('no check')" in cells[number + 1].source
    assert sum(cell.source.startswith(update.YOURS) for cell in cells) == 2


def test_a_change_of_the_profile_survives_a_release_that_left_the_cell_alone(course):
    handed_out, mine = course
    edit(mine, lambda cells: cells[at(cells, "PROFILE = ")].update(source='PROFILE = "smoke"'))
    release(handed_out, lambda cells: cells[0].update(source="# Another title"))
    update.main()
    assert 'PROFILE = "smoke"' in sources(mine) and "# Another title" in sources(mine)


def test_the_answer_to_a_vanished_exercise_stays_and_its_stub_goes(course):
    handed_out, mine = course
    edit(mine, answer)

    def drop(cells):
        for grade in ("exercise-01-1", "check-01-1", "exercise-01-2", "check-01-2"):
            del cells[at(cells, grade)]

    release(handed_out, drop)
    update.main()
    update.main()
    cells = load(mine).cells
    [kept] = [cell for cell in cells if ANSWER in cell.source]
    assert kept.source == update.GONE + ANSWER and "nbgrader" not in kept.metadata
    assert not any("def scaled" in cell.source and "NotImplementedError" in cell.source for cell in cells)


def colab(notebook):
    """As Colab writes it: version 4.0, ids in the metadata and others, its own fields."""
    for number, cell in enumerate(notebook.cells):
        cell.metadata["id"] = f"colab{number:04}"
        cell.metadata["colab"] = {"base_uri": "x"}
        cell.pop("id")
    notebook.nbformat_minor = 0


def without_metadata(notebook):
    colab(notebook)
    notebook.metadata = nbformat.from_dict({"kernelspec": notebook.metadata.kernelspec})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})


@pytest.mark.parametrize("spoil", [colab, without_metadata])
@pytest.mark.parametrize("copied_here", [True, False])
def test_notebooks_that_were_rewritten_elsewhere_are_healed(course, spoil, copied_here):
    handed_out, mine = course
    edit(mine, answer)
    edit(mine, lambda cells: cells.insert(4, code("mine = 1")))
    notebook = load(mine)
    spoil(notebook)
    mine.write_text(json.dumps(notebook), "utf-8")
    if not copied_here:
        shutil.rmtree(mine.parent / ".jupyter")
    release(handed_out, lambda cells: cells[at(cells, "check-01-2")].update(source="new = 1"))
    assert update.main() == 0
    cells, now = load(mine).cells, load(handed_out).cells
    assert cells[at(cells, "exercise-01-1")].source == ANSWER and cells[4].source == "mine = 1"
    assert {cell.id for cell in now} < {cell.id for cell in cells} and len(cells) >= len(now) + 1
    grades = [cell.metadata.nbgrader.grade_id for cell in cells if "nbgrader" in cell.metadata]
    assert grades == [cell.metadata.nbgrader.grade_id for cell in now if "nbgrader" in cell.metadata]
    assert cells[at(cells, "check-01-2")].source == "new = 1"
    nbformat.validate(load(mine))
    count = len(backups(mine))
    assert update.main() == 0 and len(backups(mine)) == count


def test_long_cells_of_ones_own_take_no_time(course):
    handed_out, mine = course
    long = "\n".join(f"x{number} = {number}" for number in range(100_000))
    edit(mine, lambda cells: cells.insert(4, code(long)))
    notebook = load(mine)
    without_metadata(notebook)
    shutil.rmtree(mine.parent / ".jupyter")
    mine.write_text(json.dumps(notebook), "utf-8")
    release(handed_out, lambda cells: [cell.update(source=cell.source + "\nnew") for cell in cells])
    assert update.main() == 0 and long in sources(mine)  # comparing it with every cell would take an hour


def test_halves_and_copies_of_an_exercise_become_one_cell(course):
    _, mine = course

    def split(cells):
        number = at(cells, "exercise-01-1")
        stub, half = cells[number], copy.deepcopy(cells[number])
        half.id, half.source, stub.source = (
            "half",
            "def class_map(f, w):\n    return twice(f, w)",
            "def twice(f, w):\n    1",
        )
        cells.insert(number + 1, half)
        number = at(cells, "exercise-01-2")
        twin = copy.deepcopy(cells[number])
        twin.id, twin.source = "twin", "def scaled(raw):\n    return raw"
        cells.insert(number + 3, twin)  # a copy further down; the stub stays above

    edit(mine, split)
    update.main()
    cells = load(mine).cells
    both = cells[at(cells, "exercise-01-1")].source
    assert both == "def twice(f, w):\n    1\n\ndef class_map(f, w):\n    return twice(f, w)"
    assert cells[at(cells, "exercise-01-2")].source == "def scaled(raw):\n    return raw"
    grades = Counter(cell.metadata.nbgrader.grade_id for cell in cells if "nbgrader" in cell.metadata)
    assert set(grades.values()) == {1}


DAMAGED = [b"", b"not a notebook", b"[]", b"null", b'{"cells": 3}', b'{"nbformat": 4, "cells": [{}]}', b"\xff\xfe\x00"]
DAMAGED += [b"[" * 99999, b'{"nbformat": 4, "nbformat_minor": 5, "metadata": [], "cells": []}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_copy_gets_a_sentence_and_is_left_alone(course, content, capsys):
    _, mine = course
    mine.write_bytes(content)
    assert update.main() == 1
    said = capsys.readouterr().out
    assert str(mine) in said and "left as it is" in said and "Move it away to get the lesson anew" in said
    assert mine.read_bytes() == content and not backups(mine)


def test_a_foreign_notebook_is_left_alone(course, capsys):
    _, mine = course
    mine.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=[code("x = 1"), code("y = 2")])))
    before = mine.read_bytes()
    assert update.main() == 1 and mine.read_bytes() == before and not backups(mine)
    assert re.search(r"Expected a copy of the lesson, got a notebook with 0 of its \d+ cells", capsys.readouterr().out)


def test_new_lessons_appear_copies_stay_and_lessons_that_are_gone_are_left(course, capsys):
    handed_out, mine = course
    edit(mine, answer)
    before = mine.read_bytes()
    shutil.copy(handed_out, handed_out.with_name("02_new.ipynb"))
    assert update.copy_lessons(handed_out.parent, mine.parent) == ["02_new"]
    assert mine.read_bytes() == before
    assert update.copy_lessons(handed_out.parent, mine.parent) == []
    handed_out.unlink()
    assert update.main() == 0
    assert "not in this release; left as it is" in capsys.readouterr().out and mine.read_bytes() == before


def test_a_copy_that_is_saved_meanwhile_is_not_overwritten(course, monkeypatch, capsys):
    handed_out, mine = course
    release(handed_out, lambda cells: cells[0].update(source="new"))
    real = update.merged
    monkeypatch.setattr(update, "merged", lambda *a: (real(*a), mine.write_text("saved"))[0])
    assert update.main() == 1 and mine.read_text() == "saved"
    assert "saved while it was updated" in capsys.readouterr().out


def test_a_folder_that_may_not_be_written_gets_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "file" / "work"))
    assert commands.main(["update"]) == 1
    said = capsys.readouterr().err
    assert "expected a folder that you may write" in said and "set COURSE_WORK to a folder of your own" in said


# ------------------------------------------------------------------------------------------------------- build


@pytest.fixture
def sources_of(tmp_path):
    shutil.copytree(ROOT / "tests" / "lessons" / "miniature", tmp_path / "src")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    build.build_student(tmp_path / "src", tmp_path)
    return tmp_path


def correct(folder):
    for source in (folder / "src").glob("*.py"):
        source.write_text(source.read_text().replace("lesson of the tests", "lesson of our tests"))


def work_in(cells):
    cells[at(cells, "exercise-00-1")].source = "def pooled(features):\n    return 1"
    cells.append(code("mine = 1"))


def test_build_refuses_a_notebook_that_somebody_worked_in_and_writes_the_others(sources_of):
    mine = sources_of / "00_shapes.ipynb"
    edit(mine, work_in)
    before = mine.read_bytes()
    correct(sources_of)
    (sources_of / "01_pictures.ipynb").unlink()
    with pytest.raises(ValueError, match=r"00_shapes.ipynb: expected .* changes: exercise-00-1, 'mine = 1'") as refused:
        build.build_student(sources_of / "src", sources_of)
    assert "move them to work/" in str(refused.value) and "--force" in str(refused.value)
    assert mine.read_bytes() == before and (sources_of / "01_pictures.ipynb").exists()


def test_force_keeps_the_notebook_beside_the_new_one(sources_of, capsys):
    mine = sources_of / "00_shapes.ipynb"
    for number in ("", "-2"):
        edit(mine, work_in)
        before = mine.read_bytes()
        assert build.build_student(sources_of / "src", sources_of, force=True) == ["00_shapes.ipynb"]
        assert (sources_of / f"00_shapes.mine{number}.ipynb").read_bytes() == before
        assert f"kept as 00_shapes.mine{number}.ipynb" in capsys.readouterr().out
    assert "NotImplementedError" in mine.read_text()
    assert update.copy_lessons(sources_of, sources_of / "work") == ["00_shapes", "01_pictures"]


def test_a_notebook_that_was_only_run_counts_as_unchanged(sources_of, capsys):
    edit(
        sources_of / "00_shapes.ipynb",
        lambda cells: cells[1].update(outputs=[nbformat.v4.new_output("stream", text="x")]),
    )
    correct(sources_of)
    assert "00_shapes.ipynb" in build.build_student(sources_of / "src", sources_of)
    assert "00_shapes.ipynb had been run; its outputs are gone." in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil", [lambda text: text[:200], lambda text: "", lambda text: text.replace("handed_out", "x")]
)
def test_damage_is_refused_and_lost_marks_are_not(sources_of, spoil):
    path = sources_of / "00_shapes.ipynb"
    path.write_text(spoiled := spoil(path.read_text()))
    if '"x"' in spoiled:
        assert build.build_student(sources_of / "src", sources_of) == ["00_shapes.ipynb"]
    else:
        with pytest.raises(ValueError, match="a damaged file"):
            build.build_student(sources_of / "src", sources_of)
        assert path.read_text() == spoiled
