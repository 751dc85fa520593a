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


WHICH = """
def which_part(measure, energy):
    whole = measure(())
    costs, gone = {{}}, []
    for part in energy:
        gone.append(part)
        costs[part] = {cost}
    order = sorted(costs, key=costs.get, reverse={reverse})
    pairs = [(a, b) for a in energy for b in energy if {real}[a] > {real}[b]]
    hits = sum(energy[a] > energy[b] for a, b in pairs)
    return {answer}
"""


def which(cost="whole - measure((part,))", reverse="True", real="costs", answer="costs, order, hits / len(pairs)"):
    return WHICH.format(cost=cost, reverse=reverse, real=real, answer=answer)


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
        (
            "divided by all images of the person",
            judge(average="(precision.sum() / (gallery_ids == query_id).sum()).item()"),
            "only the matches that are left: yours",
        ),
        (
            "ranks from 0",
            """
def judge(distances, query_id, query_camera, gallery_ids, gallery_cameras):
    order = distances.argsort().tolist()
    ranking = [j for j in order if gallery_ids[j] != -1
               and not (gallery_ids[j] == query_id and gallery_cameras[j] == query_camera)]
    ranks = [rank for rank, j in enumerate(ranking) if gallery_ids[j] == query_id]
    return ranks[0], sum(i / rank for i, rank in enumerate(ranks, 1)) / len(ranks)
""",
            "Ranks start from 1, yours from 0",
        ),
        (
            "the first rank from 0",
            """
def judge(distances, query_id, query_camera, gallery_ids, gallery_cameras):
    kept = (gallery_ids != -1) & ((gallery_ids != query_id) | (gallery_cameras != query_camera))
    hit = (gallery_ids == query_id)[kept][distances[kept].argsort()]
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    return int(hit.int().argmax()), float(precision[hit].mean())
""",
            "The first rank is counted from 1",
        ),
        (
            "exchanged",
            judge().replace("ranks[0].item(), precision.mean().item()", "precision.mean().item(), ranks[0].item()"),
            "The rank comes first",
        ),
        ("reciprocal rank", judge(average="1 / ranks[0].item()"), "not the first one alone"),
        (
            "one number",
            judge().replace("ranks[0].item(), precision", "precision"),
            "Return two numbers",
        ),
    ],
    "06.2": [
        ("what is left", which(cost="measure((part,))"), "This is the mAP that is left"),
        ("the sign", which(cost="measure((part,)) - whole"), "The sign is the other one"),
        (
            "all the others",
            which(cost="whole - measure(tuple(other for other in energy if other != part))"),
            "You hid all the other parts",
        ),
        ("one after the other", which(cost="whole - measure(tuple(gone))"), "All parts before it stayed hidden"),
        ("a share of mAP", which(cost="(whole - measure((part,))) / whole"), "This is a share of the mAP"),
        ("cheapest first", which(reverse="False"), "starts with the cheapest part"),
        ("alphabet", which(answer="costs, sorted(costs), hits / len(pairs)"), "does not follow your costs"),
        ("a count", which(answer="costs, order, hits"), "the number of pairs that agree"),
        ("the other share", which(answer="costs, order, 1 - hits / len(pairs)"), "the share that disagrees"),
        ("all pairs of names", which(answer="costs, order, hits / len(energy) ** 2"), "all pairs of names"),
        ("no comma", which(cost="whole - measure((part))"), "with its comma"),
        ("costs alone", which(answer="costs"), "Return three things"),
        ("a list", which(answer="list(costs.values()), order, hits / len(pairs)"), "an entry for each part"),
    ],
    "06.3": [
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
        (
            "the other direction",
            """
def reciprocal(distances, k):
    near = torch.zeros_like(distances, dtype=torch.bool)
    for i, row in enumerate(distances):
        near[row.argsort()[: k + 1], i] = True
    return near
""",
            "among those of i, too",
        ),
        (
            "neighbours in common",
            """
def reciprocal(distances, k):
    groups = [set(row.argsort()[: k + 1].tolist()) for row in distances]
    return torch.tensor([[bool(a & b) for b in groups] for a in groups])
""",
            "have a neighbour in common",
        ),
    ],
    "06.4": [
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
        (
            "sum of both rows",
            """
def jaccard(V):
    n = len(V)
    d = torch.zeros(n, n)
    for i in range(n):
        for j in range(n):
            d[i, j] = 1 - torch.minimum(V[i], V[j]).sum() / (V[i].sum() + V[j].sum())
    return d
""",
            "what is common counts twice",
        ),
        (
            "sum of one row",
            """
def jaccard(V):
    return torch.stack([1 - torch.minimum(row, V).sum(1) / row.sum() for row in V])
""",
            "the union belongs to both",
        ),
        (
            "members counted",
            """
def jaccard(V):
    inside = V > 0
    both = (inside[:, None] & inside[None]).sum(-1)
    return 1 - both / (inside[:, None] | inside[None]).sum(-1)
""",
            "who belongs at all",
        ),
    ],
}
