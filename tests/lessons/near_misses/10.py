"""Wrong answers that students give in lesson 10, and a fragment of the message that each of them must get."""

LOST = """
def lost_parts(confusion):
    counts = confusion.double()
    hits = counts.diagonal()
    wrong = {wrong}
    union = {union}
    confused = {confused}
    return {result} / union[1:, None]{floor}
"""
PARTS = {
    "wrong": "counts - hits.diag()",
    "union": "counts.sum(0) + counts.sum(1) - hits",
    "confused": "wrong[1:, 1:].sum(0) + wrong[1:, 1:].sum(1)",
    "result": "torch.stack((wrong[1:, 0], wrong[0, 1:], confused), 1)",
    "floor": ".clamp_min(1)",
}

FATES = """
def fates(truth, labels, predicted):
    known = {known}
    wrong, right = known & (labels != truth), known & (labels == truth)
    fixed, copied = predicted == truth, predicted == labels
    counts = {{"corrected": (fixed & wrong).sum(), "repeated": (copied & wrong).sum(),
               "changed": (~fixed & ~copied & wrong).sum(), "spoiled": (~fixed & right).sum()}}
    below = {below}
    return {result}
"""
FATE = {
    "known": "truth != 255",
    "below": '{name: right.sum() if name == "spoiled" else wrong.sum() for name in counts}',
    "result": "{name: (count / below[name]).item() for name, count in counts.items()}",
}
CONCLUSION = """
def conclusion():
    return {{"30 %": "{}", "70 %": "{}", "tags missing": "{}", "track": "{}"}}
"""

SURE = """
def sure_enough(probability, tags, precision):
    ranked, order = probability.flatten().sort(descending={down})
    hits = tags.flatten()[order].cumsum(0)
    reached = {share} >= precision
    return {result}
"""
ENOUGH = {
    "down": "True",
    "share": "hits / torch.arange(1, len(hits) + 1)",
    "result": "torch.where(reached, ranked, torch.inf).min()",
}

NEAR_MISSES = {
    "10.1": [
        (
            "exchanged",
            LOST.format(**PARTS | {"result": "torch.stack((wrong[0, 1:], wrong[1:, 0], confused), 1)"}),
            "Missed and spilled are exchanged",
        ),
        ("over the truth", LOST.format(**PARTS | {"union": "counts.sum(1)"}), "You divided by the true pixels"),
        (
            "hits twice",
            LOST.format(**PARTS | {"union": "counts.sum(0) + counts.sum(1)"}),
            "You divided by true and predicted pixels together",
        ),
        (
            "over all pixels",
            LOST.format(**PARTS | {"union": "counts.sum().expand(len(counts))"}),
            "You divided by all pixels",
        ),
        (
            "one direction",
            LOST.format(**PARTS | {"confused": "wrong[1:, 1:].sum(1)"}),
            "Confusion goes both ways",
        ),
        (
            "with the diagonal",
            LOST.format(**PARTS | {"confused": "counts[1:, 1:].sum(0) + counts[1:, 1:].sum(1)"}),
            "The diagonal is in your confusions",
        ),
        (
            "with the background",
            LOST.format(**PARTS | {"confused": "wrong[:, 1:].sum(0) + wrong[1:].sum(1)"}),
            "The background is in your confusions",
        ),
        (
            "counts",
            LOST.format(**PARTS).replace(" / union[1:, None].clamp_min(1)", ""),
            "These are counts: divide them by the union",
        ),
        ("0 / 0", LOST.format(**PARTS | {"floor": ""}), "A class without a union is NaN"),
        (
            "classes along the second axis",
            LOST.format(**PARTS | {"result": "torch.stack((wrong[1:, 0], wrong[0, 1:], confused))"}).replace(
                "union[1:, None]", "union[1:]"
            ),
            "has the shape (3, 4)",
        ),
    ],
    "10.2": [
        ("void counts", FATES.format(**FATE | {"known": "truth >= 0"}), "Void pixels count as errors"),
        (
            "counts",
            FATES.format(**FATE | {"result": "{name: count.item() for name, count in counts.items()}"}),
            "These are counts: divide by the wrong or",
        ),
        (
            "of all pixels",
            FATES.format(**FATE | {"below": "dict.fromkeys(counts, truth.numel())"}),
            "These are shares of all pixels",
        ),
        (
            "of known pixels",
            FATES.format(**FATE | {"below": "dict.fromkeys(counts, known.sum())"}),
            "These are shares of the known pixels",
        ),
        (
            "exchanged",
            FATES.format(**FATE).replace("truth, labels, predicted", "truth, predicted, labels"),
            "Labels and prediction are exchanged",
        ),
        (
            "spoiled of the wrong",
            FATES.format(**FATE | {"below": "dict.fromkeys(counts, wrong.sum())"}),
            "Spoiled is a share of the right labels",
        ),
        ("a list", FATES.format(**FATE | {"result": "list(counts.values())"}), "Return a dict with the names"),
        ("coins stay", CONCLUSION.format("repeated", "repeated", "corrected", "repeated"), "30 %: it is not so"),
        ("majority", CONCLUSION.format("corrected", "corrected", "corrected", "repeated"), "70 %: it is not so"),
        ("tags", CONCLUSION.format("corrected", "repeated", "repeated", "repeated"), "tags missing: it is not so"),
        ("track", CONCLUSION.format("corrected", "repeated", "corrected", "corrected"), "track: it is not so"),
    ],
    "10.3": [
        (
            "the highest",
            SURE.format(**ENOUGH | {"result": "ranked[reached][0] if reached.any() else torch.inf"}),
            "This is the highest threshold",
        ),
        (
            "the first fall",
            SURE.format(**ENOUGH | {"result": "ranked[reached.long().cumprod(0).sum() - 1]"}),
            "You stopped where the precision falls short",
        ),
        (
            "recall",
            SURE.format(**ENOUGH | {"share": "hits / tags.sum()", "result": "ranked[reached].max()"}),
            "This is recall",
        ),
        (
            "accuracy",
            """
def sure_enough(probability, tags, precision):
    levels = probability.flatten().sort().values
    right = [((probability >= level) == tags).float().mean() for level in levels]
    return next(level for level, share in zip(levels, right) if share >= precision)
""",
            "Tags that are rightly not given count",
        ),
        ("from the least likely", SURE.format(**ENOUGH | {"down": "False"}), "You sorted from the least likely"),
        (
            "a number of tags",
            SURE.format(**ENOUGH | {"result": "reached.nonzero().max() + 1"}),
            "This is the number of tags",
        ),
        (
            "stops without one",
            SURE.format(**ENOUGH | {"result": "ranked[reached].min()"}),
            "Return infinity where no tag is sure enough",
        ),
        (
            "something anyway",
            SURE.format(**ENOUGH | {"result": "ranked[reached].min() if reached.any() else ranked[0]"}),
            "Where no threshold reaches the precision, return infinity.",
        ),
    ],
}
