"""A student who reads the check under an exercise does not read the answer: not its code, not under other names."""

import ast
import copy
import re
import textwrap

import pytest

from .test_near_misses import execute, parts, prepared, surroundings  # noqa: F401  (fixtures)

SIZE = 9  # nodes of an expression that is no longer a phrase of the language, such as `x.sum(1, keepdim=True)`


class Nameless(ast.NodeTransformer):
    """The same expression whatever its tensors are called."""

    def visit_Name(self, node):
        return ast.Name("_", ast.Load())


def expressions(source):
    """Long expressions in a source -> their form without names, and how they are written."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.expr) and not isinstance(node, ast.Constant | ast.Lambda | ast.Dict):
            nodes = [part for part in ast.walk(node) if not isinstance(part, ast.expr_context)]
            if len(nodes) >= SIZE:
                found[ast.dump(Nameless().visit(copy.deepcopy(node)))] = ast.unparse(node)
    return found


def patterns(source):
    """Patterns of einsum: the answer to "which axes meet"."""
    words = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    return {word for word in words if isinstance(word, str) and "->" in word and " " not in word}


def written(solution):
    """The lines of a solution that a student is to write."""
    return solution[solution.index("### BEGIN SOLUTION") : solution.index("### END SOLUTION")]


def given_away(solution, check):
    """What of a solution is written in a check."""
    body = "def answer():\n" + "\n".join(f"    {line}" for line in written(solution).splitlines())
    answer, shown = expressions(body), expressions(check)
    return [answer[form] for form in answer.keys() & shown.keys()] + sorted(patterns(body) & patterns(check))


@pytest.mark.parametrize(
    "check",
    [
        'right = torch.einsum("bkhw,ck->bchw", some, w)',
        "same(scaled(m), (m - m.amin((-2, -1), keepdim=True)) / 2)",
        "with check('x'):\n    low, high = a.amin((-2, -1), keepdim=True), b.amax((-2, -1), keepdim=True)",
    ],
)
def test_an_answer_in_a_check_is_found(check):
    solution = (
        '### BEGIN SOLUTION\nmap = torch.einsum("bkhw,ck->bchw", features, weight)\n'
        "low, high = map.amin((-2, -1), keepdim=True), map.amax((-2, -1), keepdim=True)\n"
        "return (map - map.amin((-2, -1), keepdim=True)) / high\n### END SOLUTION"
    )
    assert given_away(solution, check)


def test_a_visible_check_does_not_hold_the_answer(source):
    for number, (solution, visible, *_) in parts(source)[1].items():
        assert not given_away(solution, visible), (number, given_away(solution, visible))


def worked(notebook):
    """The worked examples in third hints: number of the exercise -> code, whose last line says what it gives."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (number := re.search(r"^### Exercise (\d\d\.\d)", cell.source, re.M)):
            hint = cell.source.partition("<summary>Hint 3</summary>")[2].partition("</details>")[0]
            if example := re.search(r"^```python\n(.*?)^```$", hint, re.M | re.S):
                found[number[1]] = example[1]
    return found


def test_worked_examples_of_hints_give_what_they_say_and_not_the_answer(source, notebook, prepared, capsys):  # noqa: F811
    """Also where a student types one into the stub: it runs there, fails, and no mistake in Python is blamed."""
    for number, example in worked(notebook).items():
        names, exercises = prepared(source)
        solution, visible, *_ = exercises[number]
        assert not given_away(solution, example), (number, given_away(solution, example))
        *lines, last = example.strip().splitlines()
        value, _, says = (part.strip() for part in last.partition("#"))
        execute("\n".join([*lines, f"found = {value}"]), "/notebook/hint", before := dict(names))
        assert " ".join(repr(before["found"]).split()) == says, (number, before["found"], says)

        head = solution[: solution.index("### BEGIN SOLUTION")]
        body = textwrap.indent("\n".join([*lines, f"return {value}"]), "    ")
        execute(head + body.lstrip(), "/notebook/answer", names)
        with pytest.raises(Exception):  # noqa: B017  (whatever a wrong answer raises)
            execute(visible, "/notebook/check", names)
        said = capsys.readouterr().out
        assert f"[FAIL] {number}: " in said and "stopped with" not in said, said
