"""`python -m course_lib COMMAND`: everything that is done with the course outside its notebooks."""

import errno
import importlib
import inspect
import os
import re
import sys
import traceback
from pathlib import Path

from course_lib.experiments.options import options
from course_lib.paths import HERE

COMMANDS = {
    "data": ("course_lib.worlds.minis:main", "fetch the photographs and write the miniature data sets"),
    "build": ("course_lib.course.build:main", "build the notebooks from their reviewed sources"),
    "lab": ("course_lib.course.lab:main", "open the lessons in JupyterLab, as copies of your own in work/"),
    "update": ("course_lib.course.update:main", "bring your copies in work/ to a corrected release, answers kept"),
    "run": ("course_lib.course.run:main", "execute the notebooks and write the report"),
    "report": ("course_lib.course.report:main", "write build/report.html from what was measured"),
    "evidence": ("course_lib.course.evidence:main", "measure with several random seeds, or check a run against that"),
    "bench": ("course_lib.course.bench:main", "measure our speed beside that of other libraries"),
    "release": ("course_lib.course.release:main", "for instructors: make an assignment, or list the exercises"),
    "grade": ("course_lib.course.grade:main", "for instructors: grade what students sent, in a jail"),
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
    "run wsss": (
        "course_lib.experiments.pipeline:pipeline_command",
        "from tags to seeds, pseudo masks and a segmentation network; your own photographs, too",
    ),
    "explain": (
        "course_lib.experiments.explain:explain_command",
        "draw maps of photographs of your own: of classes, or of what they resemble",
    ),
    "submission": (
        "course_lib.experiments.pipeline:submission_command",
        "write or check the archive of predictions that VOC's test server takes",
    ),
    "ablate": (
        "course_lib.experiments.wsss:ablate_command",
        "measure rows of Tables 5 to 7 of pixel-to-prototype contrast, over random seeds",
    ),
}


RESUMED = {
    *(name for name in COMMANDS if "train" in name),
    "evaluate localise",
    "run wsss",
    "ablate",
    "evidence",
    "data",
    "grade",
}
FAULTS = (TypeError, AttributeError, NameError, LookupError, AssertionError, ZeroDivisionError, NotImplementedError)
REMEDIES = {
    errno.ENOENT: "name one that is there",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "ask for the right to it, or name another place"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "a file stands where a folder should, or the reverse"),
}


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code. What goes wrong is a sentence on stderr, with --debug a traceback.

    A command is a function. Its options are its parameters and, for a parameter that is a frozen dataclass, the fields
    of that: their help is the comment beside each field, what they refuse is in their types and `__post_init__`. A
    function of `argv` alone reads its options itself.
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
    try:
        module, _, function = COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), function)
        argv = argv[len(name.split()) :]
        alone = list(inspect.signature(command).parameters) == ["argv"]
        code = (command(argv) if alone else options(command, argv, name)) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        said, code = sentence(error, name), 130 if isinstance(error, KeyboardInterrupt) else 1
    # The error is gone, and with it the frames that held progress bars: these have ended their lines.
    print(said, file=sys.stderr)
    return code


def sentence(error: BaseException, name: str) -> str:
    """What to say about an error of a command: our own words, or the foreign ones with what they are about.

    Args:
        name: of the command.
    """
    text, kind = str(error).strip(), type(error).__name__
    remote = str(error.__cause__) if type(error.__cause__).__name__ == "_RemoteTraceback" else text
    if "Original Traceback" in text:  # of a process that reads images
        text = text.splitlines()[-1].partition(": ")[2]
    files = re.findall(r'File "(.+?)", line', remote) or [
        frame.filename for frame in traceback.extract_tb(error.__traceback__)
    ]
    first, look = text.partition("\n")[0], "--debug shows where"
    if isinstance(error, KeyboardInterrupt):
        return "Stopped." + (" The same command goes on from here." if name in RESUMED else "")
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"`{name}` found no memory left ({first or kind}); take smaller batches or close other programs."
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(error.errno, look)
        return f"{error.filename or name}: expected to read or write it, got: {error.strerror}; {remedy}."
    if isinstance(error, ImportError):
        return f"`{name}` needs a package that cannot be imported ({first}); install the course with all its extras."
    if isinstance(error, FAULTS):
        return f"`{name}` stopped by a fault of the course: {kind}: {first}. Please report it, with what --debug shows."
    if files and HERE in Path(files[-1]).parents:
        return text
    return f"`{name}` failed in {Path(files[-1]).name if files else 'Python'}: {kind}: {first}; {look}."
