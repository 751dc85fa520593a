"""Wrong answers that students give in lesson 05, and a fragment of the message that each of them must get."""

RECALL = """
def recall_at_k(distance, labels, k):
    itself = torch.eye(len(labels), dtype=torch.bool)
    nearest = distance.masked_fill(itself, torch.inf).topk(k, largest=False).indices
    hit = labels[nearest] == labels[:, None]
    valid = (labels[:, None] == labels).sum(1) > 1
    return {}
"""

PRECISION = """
def map_at_r(distance, labels):
    itself = torch.eye(len(labels), dtype=torch.bool)
    order = distance.masked_fill(itself, torch.inf).argsort(1)[:, :-1]
    right = labels[order] == labels[:, None]
    R = (labels[:, None] == labels).sum(1, keepdim=True) - 1
    rank = torch.arange(1, len(labels))
    precision = right.cumsum(1) / rank
    among = right & (rank <= R)
    return {}
"""

HUBS = """
def hub_trial(features, k):
    def spread(x):
        return x / x.norm(dim=1, keepdim=True)
    mean = features.mean(0)
    views = {{"Euclidean": features, "cosine": spread(features), "cosine, centred": {centred}}}
    largest = {{}}
    for name, view in views.items():
        distance = torch.cdist(view, view)
        {mask}
        near = distance.topk({k}, largest=False).indices
        largest[name] = {count}
    return {answer}
"""


def hubs(
    centred="spread(features - mean)",
    mask="distance.fill_diagonal_(torch.inf)",
    k="k",
    count="int(near.flatten().bincount().max())",
    answer="largest, min(largest, key=largest.get)",
):
    return HUBS.format(centred=centred, mask=mask, k=k, count=count, answer=answer)


NEAR_MISSES = {
    "05.1": [
        (
            "itself",
            """
def recall_at_k(distance, labels, k):
    nearest = distance.topk(k, largest=False).indices
    return (labels[nearest] == labels[:, None]).any(1)[(labels[:, None] == labels).sum(1) > 1].float().mean()
""",
            "Every image found itself",
        ),
        (
            "the first one dropped",
            """
def recall_at_k(distance, labels, k):
    nearest = distance.argsort(dim=1, stable=True)[:, 1:k + 1]
    return (labels[nearest] == labels[:, None]).any(1)[(labels[:, None] == labels).sum(1) > 1].float().mean()
""",
            "You dropped the first",
        ),
        ("all images", RECALL.format("hit.any(1).float().mean()"), "You averaged over all images"),
        ("share of the first K", RECALL.format("hit[valid].float().mean()"), "share of right ones among the first K"),
        (
            "share of the matches",
            RECALL.format("(hit.sum(1) / ((labels[:, None] == labels).sum(1) - 1))[valid].mean()"),
            "share of the matches",
        ),
        (
            "farthest",
            """
def recall_at_k(distance, labels, k):
    nearest = distance.topk(k).indices
    return (labels[nearest] == labels[:, None]).any(1)[(labels[:, None] == labels).sum(1) > 1].float().mean()
""",
            "the farthest images",
        ),
        ("the K-th only", RECALL.format("hit[valid, -1].float().mean()"), "Only the K-th neighbour"),
        ("percent", RECALL.format("100 * hit.any(1)[valid].float().mean()"), "in percent"),
        (
            "one more",
            """
def recall_at_k(distance, labels, k):
    copy = distance.clone()
    copy.fill_diagonal_(float("inf"))
    hits = []
    for i in range(len(labels)):
        if (labels == labels[i]).sum() > 1:
            nearest = copy[i].argsort()[: k + 1]
            hits.append(float((labels[nearest] == labels[i]).any()))
    return sum(hits) / len(hits)
""",
            "You looked at K + 1 images",
        ),
        (
            "excluded twice",
            """
def recall_at_k(distance, labels, k):
    found = total = 0
    for i, row in enumerate(distance):
        others = row.clone()
        others[i] = torch.inf
        if (labels == labels[i]).sum() > 1:
            total += 1
            found += (labels[others.argsort()[1 : k + 1]] == labels[i]).any().item()
    return found / total
""",
            "You excluded twice",
        ),
        ("all right", RECALL.format("hit.all(1)[valid].float().mean()"), "one is enough"),
        ("a count", RECALL.format("hit.any(1)[valid].sum()"), "You counted the hits"),
        (
            "in place",
            """
def recall_at_k(distance, labels, k):
    nearest = distance.fill_diagonal_(torch.inf).topk(k, largest=False).indices
    return (labels[nearest] == labels[:, None]).any(1)[(labels[:, None] == labels).sum(1) > 1].float().mean()
""",
            "changes what it is given",
        ),
    ],
    "05.2": [
        ("R-precision", PRECISION.format("(among.sum(1, keepdim=True) / R)[R > 0].mean()"), "This is R-precision"),
        (
            "divided by the hits",
            PRECISION.format(
                "((among * precision).sum(1, keepdim=True) / among.sum(1, keepdim=True).clamp_min(1))[R > 0].mean()"
            ),
            "the number of right ones among the first R",
        ),
        (
            "the whole list",
            PRECISION.format("((right * precision).sum(1, keepdim=True) / R)[R > 0].mean()"),
            "went through the whole list",
        ),
        (
            "precision everywhere",
            PRECISION.format("(((rank <= R) * precision).sum(1, keepdim=True) / R)[R > 0].mean()"),
            "precision over all R spots: it",
        ),
        (
            "itself",
            """
def map_at_r(distance, labels):
    right = labels[distance.argsort(1)] == labels[:, None]
    R = (labels[:, None] == labels).sum(1, keepdim=True) - 1
    rank = torch.arange(1, len(labels) + 1)
    return ((right & (rank <= R)) * right.cumsum(1) / rank).sum(1, keepdim=True).div(R)[R > 0].mean()
""",
            "Every image found itself",
        ),
        (
            "one R for all",
            PRECISION.format("((right & (rank <= R.max())) * precision)[R[:, 0] > 0].sum(1).mean() / R.max()"),
            "the same R for all",
        ),
        (
            "R with itself",
            PRECISION.format("(((right & (rank <= R + 1)) * precision).sum(1, keepdim=True) / (R + 1))[R > 0].mean()"),
            "R counts the image itself",
        ),
        (
            "all images",
            PRECISION.format("((among * precision).sum(1) / R[:, 0].clamp_min(1)).mean()"),
            "You averaged over all images",
        ),
        (
            "the first one dropped",
            """
def map_at_r(distance, labels):
    scores = []
    for i in range(len(labels)):
        R = int((labels == labels[i]).sum()) - 1
        if R == 0:
            continue
        hit = (labels[distance[i].argsort()[1 : R + 1]] == labels[i]).float()
        scores.append(float((hit * hit.cumsum(0) / torch.arange(1, R + 1)).sum() / R))
    return sum(scores) / len(scores)
""",
            "You dropped the first",
        ),
        ("all pairs alike", PRECISION.format("(among * precision).sum() / R.sum()"), "by the sum of all R"),
        (
            "reciprocal rank",
            """
def map_at_r(distance, labels):
    scores = []
    for i in range(len(labels)):
        others = [j for j in distance[i].argsort().tolist() if j != i]
        R = sum(labels[j] == labels[i] for j in others)
        if R > 0:
            first = next((rank for rank, j in enumerate(others[:R], 1) if labels[j] == labels[i]), None)
            scores.append(1 / first if first else 0.0)
    return sum(scores) / len(scores)
""",
            "looks at the first right answer only",
        ),
        (
            "ranks one too large",
            PRECISION.replace("right.cumsum(1) / rank", "right.cumsum(1) / (rank + 1)").format(
                "((among * precision).sum(1) / R[:, 0])[R[:, 0] > 0].mean()"
            ),
            "one too large",
        ),
        ("a NaN", PRECISION.format("((among * precision).sum(1) / R[:, 0]).mean()"), "something divided by 0"),
    ],
    "05.3": [
        ("itself", hubs(mask="pass"), "stands in its own list"),
        ("one more", hubs(k="k + 1"), "You looked at k + 1 images"),
        ("places of a list", hubs(count="max(len(row) for row in near)"), "You counted the places of each list"),
        (
            "scaled first",
            hubs(centred="spread(features) - spread(features).mean(0)"),
            "after scaling, the mean is another one",
        ),
        (
            "the mean of each image",
            hubs(centred="spread(features - features.mean(1, keepdim=True))"),
            "it is the mean over images",
        ),
        ("not scaled again", hubs(centred="features - mean"), "it is a cosine again"),
        (
            "the largest",
            hubs(answer="largest, max(largest, key=largest.get)"),
            "with the largest hub, not the smallest",
        ),
        ("a name", hubs(answer='largest, "centred"'), "your own numbers name another distance"),
        ("numbers alone", hubs(answer="largest"), "Return two things"),
        ("keys", hubs(answer='{"L2": largest["Euclidean"]}, "L2"'), "Return two things"),
    ],
}
