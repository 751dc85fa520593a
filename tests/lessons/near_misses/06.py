"""Wrong answers that students give in lesson 06, and a fragment of the message that each of them must get."""

JUDGE = """
def judge(distances, query_id, query_camera, gallery_ids, gallery_cameras):
    same = (gallery_ids == query_id) & (gallery_cameras == query_camera)
    kept = {kept}
    order = distances[kept].argsort({descending})
    hit = {hit}
    ranks = hit.nonzero().flatten() + 1
    precision = torch.arange(1, len(ranks) + 1) / ranks
    return ranks[0].item(), {average}
"""


def judge(
    kept="(gallery_ids != -1) & ~same",
    hit="gallery_ids[kept][order] == query_id",
    descending="",
    average="precision.mean().item()",
):
    return JUDGE.format(kept=kept, hit=hit, descending=descending, average=average)


NEAR_MISSES = {
    "06.1": [
        ("same camera kept", judge(kept="gallery_ids != -1"), "same person from the same camera was still there"),
        ("junk kept", judge(kept="~same"), "Junk (identity -1) was still there"),
        ("nothing taken out", judge(kept="gallery_ids > -2"), "Nothing was taken out"),
        (
            "the whole camera taken out",
            judge(kept="(gallery_ids != -1) & (gallery_cameras != query_camera)"),
            "only the *same person* from it goes",
        ),
        ("distractors taken out", judge(kept="(gallery_ids > 0) & ~same"), "They are wrong answers and stay"),
        (
            "own camera as a wrong answer",
            judge(kept="gallery_ids != -1", hit="((gallery_ids == query_id) & ~same)[kept][order]"),
            "it leaves the ranking",
        ),
        ("from far to near", judge(descending="descending=True"), "sorted from far to near"),
        (
            "divided by the gallery",
            judge(average="(precision.sum() / kept.sum()).item()"),
            "by the number of matches R",
        ),
    ],
    "06.2": [
        (
            "one direction",
            """
def reciprocal(distances, k):
    order = distances.argsort(1)[:, : k + 1]
    return torch.zeros_like(distances, dtype=torch.bool).scatter(1, order, True)
""",
            "Reciprocal ones have i among theirs",
        ),
        (
            "or",
            """
def reciprocal(distances, k):
    order = distances.argsort(1)[:, : k + 1]
    near = torch.zeros_like(distances, dtype=torch.bool).scatter(1, order, True)
    return near | near.T
""",
            "both must hold",
        ),
        (
            "itself counted among the k",
            """
def reciprocal(distances, k):
    order = distances.argsort(1)[:, :k]
    near = torch.zeros_like(distances, dtype=torch.bool).scatter(1, order, True)
    return near & near.T
""",
            "One neighbour is missing",
        ),
        (
            "without itself",
            """
def reciprocal(distances, k):
    order = distances.argsort(1)[:, 1 : k + 1]
    near = torch.zeros_like(distances, dtype=torch.bool).scatter(1, order, True)
    return near & near.T
""",
            "The image itself is missing",
        ),
        (
            "farthest",
            """
def reciprocal(distances, k):
    order = distances.argsort(1, descending=True)[:, : k + 1]
    near = torch.zeros_like(distances, dtype=torch.bool).scatter(1, order, True)
    return near & near.T
""",
            "You took the farthest ones",
        ),
    ],
    "06.3": [
        (
            "likeness",
            """
def jaccard(V):
    return torch.minimum(V[:, None], V[None]).sum(-1) / torch.maximum(V[:, None], V[None]).sum(-1)
""",
            "This is the likeness",
        ),
        (
            "upside down",
            """
def jaccard(V):
    return 1 - torch.maximum(V[:, None], V[None]).sum(-1) / torch.minimum(V[:, None], V[None]).sum(-1)
""",
            "upside down",
        ),
        (
            "not divided",
            """
def jaccard(V):
    return 1 - torch.minimum(V[:, None], V[None]).sum(-1)
""",
            "did not divide",
        ),
        (
            "product",
            """
def jaccard(V):
    return 1 - (V[:, None] * V[None]).sum(-1) / torch.maximum(V[:, None], V[None]).sum(-1)
""",
            "You multiplied",
        ),
        (
            "element by element",
            """
def jaccard(V):
    low, high = torch.minimum(V[:, None], V[None]), torch.maximum(V[:, None], V[None])
    return 1 - (low / high.clamp_min(1e-12)).mean(-1)
""",
            "sum first, then divide once",
        ),
    ],
}
