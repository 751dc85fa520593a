"""`python -m course_lib COMMAND`: everything that is done with the course outside its notebooks."""

import importlib
import inspect
import sys

from course_lib.experiments.options import options

COMMANDS = {
    "data": ("course_lib.worlds.minis:main", "fetch the photographs and write the miniature data sets"),
    "build": ("course_lib.course.build:main", "build the notebooks from their reviewed sources"),
    "lab": ("course_lib.course.lab:main", "open the lessons in JupyterLab, as copies of your own in work/"),
    "update": ("course_lib.course.update:main", "bring your copies in work/ to a corrected release, answers kept"),
    "run": ("course_lib.course.run:main", "execute the notebooks and write the report"),
    "report": ("course_lib.course.report:main", "write build/report.html from what was measured"),
    "evidence": ("course_lib.course.evidence:main", "measure with several random seeds, or check a run against that"),
    "bench": ("course_lib.course.bench:main", "measure our speed beside that of other libraries"),
    "train localise": (
        "course_lib.experiments.localise:train_command",
        "train a network by classification or metric learning",
    ),
    "evaluate localise": (
        "course_lib.experiments.localise:evaluate_command",
        "measure CAM, Dist-CAM and their relatives as in Table 1",
    ),
    "train fewshot": (
        "course_lib.experiments.fewshot:train_command",
        "train a network on base classes, then on their episodes",
    ),
    "evaluate fewshot": (
        "course_lib.experiments.fewshot:evaluate_command",
        "measure prototypes on episodes of novel classes",
    ),
    "train retrieval": (
        "course_lib.experiments.retrieval:train_command",
        "train an embedding in which a class is near itself",
    ),
    "evaluate retrieval": (
        "course_lib.experiments.retrieval:evaluate_command",
        "measure Recall@K and MAP@R as on CUB-200-2011",
    ),
    "train reid": (
        "course_lib.experiments.reid:train_command",
        "train the strong baseline of re-identification, or ablate it",
    ),
    "evaluate reid": (
        "course_lib.experiments.reid:evaluate_command",
        "measure CMC and mAP, with and without re-ranking",
    ),
    "train wsss": (
        "course_lib.experiments.wsss:train_command",
        "train a network on image tags: CAM, SEAM, EPS, with or without contrast",
    ),
    "evaluate seeds": (
        "course_lib.experiments.wsss:evaluate_command",
        "measure seeds of a network that was trained from image tags",
    ),
    "ablate": (
        "course_lib.experiments.wsss:ablate_command",
        "measure rows of Tables 5 to 7 of pixel-to-prototype contrast, over random seeds",
    ),
}


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code. What goes wrong is a sentence on stderr, with --debug a traceback.

    A command is a function. Its options are its parameters and, for a parameter that is a frozen dataclass, the fields
    of that: their help is the comment beside each field, what they refuse is said by `__post_init__`. A function of
    `argv` alone reads its options itself.
    """
    debug, argv = "--debug" in argv, [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m course_lib COMMAND [--help] ...\n")
        print(*(f"  {name:18} {purpose}" for name, (_, purpose) in COMMANDS.items()), sep="\n")
        return 0 if argv else 2
    name = next((" ".join(argv[:count]) for count in (2, 1) if " ".join(argv[:count]) in COMMANDS), None)
    if name is None:
        print(f"There is no command {argv[0]!r}; there are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), function)
    argv = argv[len(name.split()) :]
    try:
        if list(inspect.signature(command).parameters) == ["argv"]:
            return command(argv) or 0
        return options(command, argv, name) or 0
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        if debug:
            raise
        print(error, file=sys.stderr)
        return 1
