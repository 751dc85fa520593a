"""`python -m course_lib COMMAND`: everything that is done with the course outside its notebooks."""

import importlib
import sys

COMMANDS = {
    "data": ("course_lib.worlds.minis", "fetch the photographs and write the miniature data sets"),
    "build": ("course_lib.course.build", "build the notebooks from their reviewed sources"),
    "run": ("course_lib.course.run", "execute the notebooks and write the report"),
    "report": ("course_lib.course.report", "write build/report.html from what was measured"),
    "evidence": ("course_lib.course.evidence", "measure lessons with several seeds, or check a run against that"),
    "bench": ("course_lib.course.bench", "measure our speed beside that of other libraries"),
    "train localise": ("course_lib.metric_learning.learner", "train a network by classification or metric learning"),
    "evaluate localise": ("course_lib.experiments.localise", "measure CAM, Dist-CAM and their relatives as in Table 1"),
    "train fewshot": (
        "course_lib.experiments.fewshot:train_main",
        "train a network on base classes, then on their episodes",
    ),
    "evaluate fewshot": (
        "course_lib.experiments.fewshot:evaluate_main",
        "measure prototypes on episodes of novel classes",
    ),
    "train retrieval": (
        "course_lib.experiments.retrieval:train_main",
        "train an embedding in which a class is near itself",
    ),
    "evaluate retrieval": (
        "course_lib.experiments.retrieval:evaluate_main",
        "measure Recall@K and MAP@R as on CUB-200-2011",
    ),
    "train reid": (
        "course_lib.experiments.reid:train_main",
        "train the strong baseline of re-identification, or ablate it",
    ),
    "evaluate reid": ("course_lib.experiments.reid:evaluate_main", "measure CMC and mAP, with and without re-ranking"),
    "train wsss": (
        "course_lib.wsss.learner",
        "train a network on image tags: CAM, SEAM, EPS, with or without contrast",
    ),
    "evaluate seeds": ("course_lib.wsss.seeds", "measure seeds of a network that was trained from image tags"),
    "ablate": (
        "course_lib.experiments.wsss",
        "measure rows of Tables 5 and 6 of pixel-to-prototype contrast, over seeds",
    ),
}


def main(argv: list[str]) -> int:
    """Hand the arguments to a command's own `main(argv)`, or to the function after the colon; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m course_lib COMMAND [--help] ...\n")
        print(*(f"  {name:18} {purpose}" for name, (_, purpose) in COMMANDS.items()), sep="\n")
        return 0 if argv else 2
    words = next((count for count in (2, 1) if " ".join(argv[:count]) in COMMANDS), 0)
    if not words:
        print(f"There is no command {argv[0]!r}; there are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[" ".join(argv[:words])][0].partition(":")
    return getattr(importlib.import_module(module), function or "main")(argv[words:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
