"""Wrong answers that students give in lesson 04, and a fragment of the message that each of them must get."""

SCORES = """
def episode_scores(support, query, metric="cosine"):
    if metric == "cosine":
        {}
    difference = {}[:, :, None] - query[:, None]
    return {}
"""
COSINE = "return F.normalize(F.normalize(support, dim=-1).mean(2), dim=-1) @ F.normalize(query, dim=-1).mT"
MINUS = '-(difference.abs() if metric == "l1" else difference.square()).sum(-1)'

INTERVAL = """
def accuracy_interval(correct):
    each = 100 * correct.float().mean(1)
    return each.mean(), {}
"""

RECTIFIED = """
def rectified(support, query, joins, epsilon):
    prototype = support.mean(2)
    near = {near}
    like = {like}
    weights = torch.cat((near, torch.where({joins}, like, -torch.inf)), -1).softmax(-1)
    shots = support.shape[2]
    sums = torch.einsum("enk,enkd->end", weights[..., :shots], support) + weights[..., shots:] @ query
    return {end}
"""
PARTS = {
    "near": "epsilon * F.cosine_similarity(prototype[:, :, None], support, dim=-1)",
    "like": "epsilon * F.cosine_similarity(prototype[:, :, None], query[:, None], dim=-1)",
    "joins": "joins",
    "end": "torch.where(joins.any(-1, keepdim=True), sums, prototype)",
}

TURNING = """
def turning_point(features, labels, others):
    gains = []
    for count in others:
        queries = {queries}
        chosen = episodes.sample(labels, 5, {shots}, queries, 200, Generator().manual_seed(0))
        after = episodes.recalls(features, chosen, {method!r})
        before = episodes.recalls(features, chosen, {base!r})
        gains.append({gain})
    {end}
"""
END = "return gains, min((n for n, v in zip(others, gains) if v > 0), default=None)"


def turning(
    queries="(15, count, count, count, count)",
    shots=1,
    method="rectified",
    base="cosine",
    gain="100 * (after - before).mean().item()",
    end=END,
):
    return TURNING.format(queries=queries, shots=shots, method=method, base=base, gain=gain, end=end)


NEAR_MISSES = {
    "04.1": [
        ("a distance as a score", SCORES.format(COSINE, "support.mean(2)", MINUS[1:]), "A sign is missing"),
        (
            "a root",
            SCORES.format(COSINE, "support.mean(2)", '-difference.norm(dim=-1, p=1 if metric == "l1" else 2)'),
            "L2 is squared here",
        ),
        ("sum over the shots", SCORES.format(COSINE, "support.sum(2)", MINUS), "You summed the support features"),
        ("first shot", SCORES.format(COSINE, "support[:, :, 0]", MINUS), "Only the first support image"),
        (
            "mean of raw features",
            SCORES.format(
                "return F.normalize(support.mean(2), dim=-1) @ F.normalize(query, dim=-1).mT", "support.mean(2)", MINUS
            ),
            "scale each to length 1 before the mean",
        ),
        (
            "prototype not scaled",
            SCORES.format(
                "return F.normalize(support, dim=-1).mean(2) @ F.normalize(query, dim=-1).mT", "support.mean(2)", MINUS
            ),
            "scale the prototype to length 1, too",
        ),
        ("queries first", SCORES.format(COSINE, "support.mean(2)", f"({MINUS}).mT"), "classes come before queries"),
    ],
    "04.2": [
        (
            "a share",
            """
def accuracy_interval(correct):
    each = correct.float().mean(1)
    return each.mean(), 1.96 * each.std() / len(each) ** 0.5
""",
            "multiply by 100",
        ),
        ("standard error", INTERVAL.format("each.std() / len(each) ** 0.5"), "This is the standard error"),
        ("whole width", INTERVAL.format("2 * 1.96 * each.std() / len(each) ** 0.5"), "This is the whole width"),
        (
            "independent queries",
            INTERVAL.format("196 * correct.float().std() / correct.numel() ** 0.5"),
            "the spread of single answers",
        ),
        (
            "textbook, plain numbers",
            """
def accuracy_interval(correct):
    p, n = correct.float().mean().item(), correct.numel()
    return 100 * p, 100 * 1.96 * (p * (1 - p) / n) ** 0.5
""",
            "The textbook's sqrt(p(1 - p)/N)",
        ),
        (
            "textbook of episodes",
            """
def accuracy_interval(correct):
    p = correct.float().mean()
    return [100 * p, 196 * torch.sqrt(p * (1 - p) / len(correct))]
""",
            "sqrt(p(1 - p)/E)",
        ),
        (
            "queries in place of episodes",
            """
def accuracy_interval(correct):
    each = 100 * correct.float().mean(0)
    return torch.stack((each.mean(), 1.96 * each.std() / len(each) ** 0.5))
""",
            "averaged over the episodes first",
        ),
        ("no root", INTERVAL.format("1.96 * each.std() / len(each)"), "falls with its root"),
        ("spread of episodes", INTERVAL.format("1.96 * each.std()"), "spread of single episodes"),
        (
            "number of queries",
            INTERVAL.format("1.96 * each.std() / correct.shape[1] ** 0.5"),
            "not of that of episodes",
        ),
        ("divided by E", INTERVAL.format("1.96 * each.std(correction=0) / len(each) ** 0.5"), "divides by E - 1"),
        (
            "the mean alone",
            """
def accuracy_interval(correct):
    return 100 * correct.float().mean()
""",
            "Two numbers are expected",
        ),
    ],
    "04.3": [
        (
            "no epsilon",
            RECTIFIED.format(**{name: text.replace("epsilon * ", "") for name, text in PARTS.items()}),
            "epsilon is missing",
        ),
        (
            "equal weights",
            RECTIFIED.format(**{name: text.replace("epsilon * ", "0 * ") for name, text in PARTS.items()}),
            "All samples weigh the same",
        ),
        (
            "everyone joins",
            RECTIFIED.format(**PARTS | {"joins": "torch.ones_like(joins)", "end": "sums"}),
            "did not join count",
        ),
        (
            "queries alone",
            RECTIFIED.format(**PARTS | {"near": PARTS["near"] + " - torch.inf"}),
            "The support samples are missing",
        ),
        (
            "products, not cosines",
            RECTIFIED.format(**PARTS | {"like": "epsilon * prototype @ query.mT"}),
            "not of length 1",
        ),
        ("lonely class", RECTIFIED.format(**PARTS | {"end": "sums"}), "keeps its prototype"),
        (
            "scaled",
            RECTIFIED.format(**PARTS | {"end": "F.normalize(" + PARTS["end"] + ", dim=-1)"}),
            "scaled the result",
        ),
    ],
    "04.4": [
        ("shares", turning(gain="(after - before).mean().item()"), "multiply by 100"),
        ("wrong sign", turning(gain="100 * (before - after).mean().item()"), "The sign is wrong"),
        (
            "all queries alike",
            turning(gain="100 * episodes.accuracies(after - before, chosen.labels).mean().item()"),
            "the mean of all queries",
        ),
        ("shift alone", turning(method="shift"), "the shift alone"),
        ("even after all", turning(queries="count"), "as many queries as the others"),
        ("against L2", turning(base="l2"), "You compare with L2"),
        ("five shots", turning(shots=5), "This is 5-shot"),
        ("gains alone", turning(end="return gains"), "Two things are expected"),
        (
            "the first of the list that gains",
            turning(end="return gains, next((n for n, v in zip(others, gains) if v > 0), None)"),
            "the smallest that gains is",
        ),
        (
            "the largest that loses",
            turning(end="return gains, max((n for n, v in zip(others, gains) if v <= 0), default=None)"),
            "the smallest that gains is",
        ),
    ],
}
