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

SHIFT = """
def shifted(support, query):
    return {}
"""

JOIN = """
def joining(cosines, surest):
    mine = F.one_hot(cosines.argmax(1), cosines.shape[1]).mT.bool()
    {}
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
            "wrong sign",
            SHIFT.format("query - support.mean((1, 2))[:, None] + query.mean(1, keepdim=True)"),
            "The sign is wrong",
        ),
        (
            "one vector for all",
            SHIFT.format("query + support.mean((0, 1, 2)) - query.mean((0, 1))"),
            "each has its own means",
        ),
        (
            "scaled again",
            SHIFT.format("F.normalize(query + support.mean((1, 2))[:, None] - query.mean(1, keepdim=True), dim=-1)"),
            "they stay as they are",
        ),
        (
            "only the support",
            SHIFT.format("query + support.mean((1, 2))[:, None]"),
            "The mean of the queries is missing",
        ),
        ("only centred", SHIFT.format("query - query.mean(1, keepdim=True)"), "you only centred the queries"),
        (
            "the vector",
            SHIFT.format("(support.mean((1, 2))[:, None] - query.mean(1, keepdim=True)).expand_as(query)"),
            "add it to the queries",
        ),
    ],
    "04.4": [
        ("all of them", JOIN.format("return mine"), "Too many join"),
        (
            "nearest to each class",
            JOIN.format("return torch.zeros_like(mine).scatter(2, cosines.topk(surest, 2).indices, True)"),
            "whatever their pseudo-label",
        ),
        (
            "strangers",
            JOIN.format(
                "return torch.zeros_like(mine).scatter("
                "2, torch.where(mine, cosines, -torch.inf).topk(surest, 2).indices, True)"
            ),
            "took strangers",
        ),
        (
            "least sure",
            JOIN.format("""value, place = torch.where(mine, -cosines, -torch.inf).topk(surest, 2)
    return torch.zeros_like(mine).scatter(2, place, value > -torch.inf)"""),
            "least sure queries",
        ),
        (
            "the margin",
            JOIN.format("""best = cosines.topk(2, 1).values
    margin = (best[:, 0] - best[:, 1])[:, None].expand_as(cosines)
    value, place = torch.where(mine, margin, -torch.inf).topk(surest, 2)
    return torch.zeros_like(mine).scatter(2, place, value > -torch.inf)"""),
            "the lead over other classes",
        ),
        (
            "surest by softmax",
            JOIN.format("""value, place = (cosines.softmax(1) * mine).topk(surest, 2)
    return torch.zeros_like(mine).scatter(2, place, value > 0)"""),
            "the lead over other classes",
        ),
        (
            "surest of the episode",
            JOIN.format("""for episode, cosine in zip(mine, cosines):
        surest_ones = cosine.max(0).values.argsort(descending=True)[:surest]
        for q in range(cosine.shape[1]):
            if q not in surest_ones:
                episode[:, q] = False
    return mine"""),
            "Z surest of all queries",
        ),
        (
            "classes of a query",
            JOIN.format("return torch.zeros_like(mine).scatter(1, cosines.topk(surest, 1).indices, True)"),
            "Z best queries of each class",
        ),
        (
            "queries first",
            JOIN.format("""value, place = torch.where(mine, cosines, -torch.inf).topk(surest, 2)
    return torch.zeros_like(mine).scatter(2, place, value > -torch.inf).mT"""),
            "classes come before queries",
        ),
    ],
    "04.5": [
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
}
