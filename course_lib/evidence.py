"""Evidence: tables of what was measured with several random seeds, committed in data/evidence, as lessons read them.

    NN.json           a lesson, once with each random seed: `seeds`, and `figures` by name
    methods.json      seeds of every method in both miniatures
    ablations.json    rows of Tables 5 to 7 of Du et al., CVPR 2022, on chimeras
    contrast.json     what the gain of contrast depends on
    chimeras.json     the same where parts are known, with true and shuffled labels

The last four hold `runs`, each with its "row", its "world", its random seeds, and figures for every split and reading.

All runs of one random seed start from the same weights and see the same batches, so what is compared are differences of
a run with its own partner: their mean, with the interval of Student's t over the random seeds. `course_lib.course`
measures them.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtrit  # quantiles of Student's t

from course_lib import paths
from course_lib.data.files import read_json

Table = dict[str, Any]


def table(name: str) -> Table | None:
    """The table data/evidence/NAME.json of a lesson ("01", ...) or a study ("methods", ...); None if there is none."""
    path = paths.shelf() / "evidence" / f"{name}.json"
    return read_json(path) if path.is_file() else None


def over_seeds(values: list[float]) -> str:
    """Mean and sample standard deviation, as "27.4 ± 1.6"."""
    spread = stdev(values) if len(values) > 1 else 0
    if not spread:
        return f"{mean(values):.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(spread))))
    return f"{mean(values):.{digits}f} ± {spread:.{digits}f}"


def values(
    table: Table, world: str, row: str, split: str, figure: str = "miou", reading: str | None = None
) -> list[float]:
    """A figure of all runs of a row (or method) in one world, in the order of their random seeds, which all rows share.

    Args:
        figure: "miou" of seeds, "miou_others" without the confounded class, "confounded" (IoU of that class),
            "precision", "recall", "track" (share of the track of that class that is taken for it), all in percent, or
            "threshold".
        reading: "with PCM" or "without PCM"; None: the published one of the method.
    """
    runs = [run["splits"][split] for run in table["runs"] if (run["world"], run["row"]) == (world, row)]
    return [run[reading or next(iter(run))][figure] for run in runs]


def t_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t. One value has an interval without ends."""
    centre, half, count = mean(differences), math.inf, len(differences)
    if count > 1:
        half = float(stdtrit(count - 1, 0.975)) * stdev(differences) / count**0.5
    return centre, centre - half, centre + half


def gains(split: str = "val", reading: str | None = None) -> dict[str, list[float]] | None:
    """mIoU of contrast on SEAM minus that of SEAM, run by run, on photographs; None if not measured.

    "as in the recipe" comes first, then every change of the study "contrast". Where a change leaves SEAM as it is, its
    partner is that of the recipe.

    Args:
        reading: of both, as in `values`.
    """
    plain, changed = table("methods"), table("contrast")
    if plain is None or changed is None:
        return None

    def measured(change, method):
        own = values(changed, "photographs", f"{change}: {method}", split, reading=reading)
        return own or values(plain, "photographs", method, split, reading=reading)

    changes = ["as in the recipe", *(run["row"].rpartition(": ")[0] for run in changed["runs"])]
    return {
        change: [after - before for before, after in zip(measured(change, "seam"), measured(change, "seam+p2p"))]
        for change in changes
    }
