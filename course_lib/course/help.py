"""HELP.md: what to do about an error, found by its exact words. `build` writes it, a test holds it to the code.

The first part is written by hand, below. The second lists every sentence with which the library stops, taken from its
`raise` statements; what changes from case to case stands there as "…".
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from course_lib import paths

HELP_PARTS = {  # parts of course_lib, by what a reader was doing
    "Lessons, checks and pictures": ("lesson", "checks", "cache", "evidence", "paths", "settings", "show"),
    "Photographs and data": ("data", "worlds"),
    "Networks, weights and trainings": ("backbones", "checkpoints", "engine", "processes"),
    "Maps, prototypes and measures": ("maps", "prototypes", "components", "evaluate", "metric_learning"),
    "Segmentation from tags": ("wsss",),
}
INTRODUCTION = """\
# Help, I get ...

Search this page for the words of your message: press Ctrl-F, and leave out numbers and names of files, for which "…"
stands here.

| you see | why, and what to do |
|---|---|
"""
BY_HAND = {  # what is seen: why, and what to do
    "`ModuleNotFoundError: No module named 'course_lib'`": (
        "The kernel is another Python than that of the course. Start it with `make lab`, or on Colab run the "
        "set-up cell first."
    ),
    "`Expected the library course_lib in …, found none`": (
        "The same, said by the set-up cell. Get the course, run `make lab`, and open the lesson in the page that opens."
    ),
    "`The course could not be installed from …`": (
        "Colab or Kaggle did not reach the address of the course. On Kaggle switch Internet on (Settings), "
        "then run all."
    ),
    "`NameError: name '…' is not defined`": (
        "A cell above was not run, or stopped. Choose *Run > Run All Above Selected Cell*."
    ),
    "`[TODO] …: not written yet.`": (
        "The stub of the exercise is still there. Replace both of its lines by your answer, and run the cell "
        "and its check again."
    ),
    "`[FAIL] …: your code stopped with …`": (
        "The line of your code that stopped stands at the end of the message. Print the shapes of what that line takes."
    ),
    "`[FAIL] …: … changes what it is given`": (
        "Your answer writes into its input. Clone it first, or make a new tensor."
    ),
    '`[PASS]`, but a later figure says "With the library\'s …"': ("You ran the figure before the check. Run it again."),
    "`NotImplementedError: this exercise is not written yet`": (
        "You called an answer that is still a stub. Write it, or go on: later figures use the library's "
        "function until then."
    ),
    "`Kernel died` or `The kernel appears to have died`": (
        "The memory was full. Close other lessons (*Kernel > Shut Down All Kernels*), then run all."
    ),
    "`torch.OutOfMemoryError: CUDA out of memory`": (
        'Another lesson holds the GPU: shut its kernel down. Or set `DEVICE = "cpu"` in the parameters cell.'
    ),
    "`✗ Not so in this run: …`": (
        "No error. What the lesson says of its own figures did not come out so here, with this processor, "
        "seed or profile."
    ),
    "`(too little data to say: …)`": (
        'The profile is "smoke". Set `PROFILE = "mini"` in the parameters cell, and run all.'
    ),
    "`No space left on device`": (
        "The disk is full. `make clean` removes what the course computed; your own notebooks and data stay."
    ),
    "`Address already in use`": ('Another JupyterLab runs. Close it, or start with `make lab LAB="--port=8890"`.'),
    "A slider moves, the picture does not": (
        "The kernel is busy or was restarted. Wait, or run the cell with the slider again."
    ),
    "No slider at all": (
        "The page is static (GitHub, a viewer). Open the lesson in JupyterLab or Colab; flipbooks work everywhere."
    ),
    "`expected a notebook as it was built, got changes`": (
        "You worked in `notebooks/`. Move the file to `work/`, where `make lab` opens it, and build again."
    ),
}


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """The kind and the sentence of every error that a file of Python raises, in its order; "…" is what varies.

    What has no words of its own, such as a sentence that is handed on, is left out.
    """
    raised = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Raise))
    for node in sorted(raised, key=lambda node: node.lineno):
        if isinstance(node.exc, ast.Call) and node.exc.args and isinstance(node.exc.func, ast.Name):
            for sentence in _texts(node.exc.args[0]):
                words = " ".join(sentence.split())
                if sum(map(str.isalpha, words)) > 12:
                    yield node.exc.func.id, words


def help_page(package: Path = paths.HERE) -> str:
    """The text of HELP.md."""
    rows = [f"| {seen} | {what} |" for seen, what in BY_HAND.items()]
    lines = [INTRODUCTION + "\n".join(rows) + "\n\n## Every sentence of the library\n"]
    for title, parts in HELP_PARTS.items():
        lines.append(f"### {title}\n")
        for part in parts:
            single = package / f"{part}.py"
            for path in [single] if single.is_file() else sorted((package / part).rglob("*.py")):
                name = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
                found = dict.fromkeys(messages(path))
                lines += [f"- `{kind}` ({name.removesuffix('.__init__')}): {_plain(words)}" for kind, words in found]
        lines.append("")
    return "\n".join(lines)


def _texts(node: ast.expr) -> list[str]:
    """What an expression of text can be, with … for what is only known when it runs."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _texts(node.left) for b in _texts(node.right)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    return ["…"]


def _plain(words):
    """As text of Markdown: nothing of it is mark-up."""
    return "".join(f"\\{letter}" if letter in "\\`*_<>[]|#$" else letter for letter in words)
