"""Near misses of the miniature course: wrong answers, each with a piece of the message meant for it."""

NEAR_MISSES = {
    "00.1": [
        ("sum", "def pooled(features):\n    return features.sum((2, 3))", "divide by their number"),
        ("channels", "def pooled(features):\n    return features.mean(1)", "the positions are the last two axes"),
        ("no return", "def pooled(features):\n    features.mean((2, 3))", "does your function end with `return`"),
        (
            "keepdim",
            "def pooled(features):\n    return features.mean((2, 3), keepdim=True)",
            "Only axes of length 1 differ",
        ),
        ("typo", "def pooled(features):\n    return featurs.mean((2, 3))", "name 'featurs' is not defined"),
    ],
}
