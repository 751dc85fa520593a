"""Wrong answers that students give in lesson 02, and a fragment of the message that each of them must get."""

WEIGHTS = """
def distance_weights(query, reference, eps=1e-6):
    distance = (query[:, None] - reference[None]).abs()
    floor = eps * distance.mean(-1, keepdim=True)
    weights = 1 / torch.maximum(distance, floor)
    return {}
"""

SHARED = WEIGHTS.format("weights / weights.sum(-1, keepdim=True)")

AGREEMENT = """
def agreement(features, rules, own, other):
    found = {{}}
    for name, rule in rules.items():
        a, b = (maps.weighted_map(features, rule(classes))[:, 0] for classes in (own, other))
        found[name] = ({0}).mean().item()
    plain = dict(zip(rules, range(9)))
    return {{name: found[name] for name in sorted({1}, key={1}.get)}}
"""

SEARCH = """
def change_of_places(error_at, limit, low, high, tolerance):
    low, high = {start}
    while high - low > tolerance:
        middle = (low + high) / 2
        if error_at(middle) {op} limit:
            low = middle
        else:
            high = middle
    return {end}
"""

NEAR_MISSES = {
    "02.1": [
        (
            "sum",
            """
def mean_features(features, labels, num_classes):
    return torch.stack([features[labels == c].sum(0) for c in range(num_classes)])
""",
            "You summed",
        ),
        (
            "divided by all",
            """
def mean_features(features, labels, num_classes):
    return torch.stack([features[labels == c].sum(0) for c in range(num_classes)]) / len(features)
""",
            "number of all samples",
        ),
        (
            "mean of everything",
            """
def mean_features(features, labels, num_classes):
    return torch.stack([features.mean(0) for c in range(num_classes)])
""",
            "mean of everything",
        ),
        (
            "normalised",
            """
def mean_features(features, labels, num_classes):
    means = torch.stack([features[labels == c].mean(0) for c in range(num_classes)])
    return means / means.norm(dim=1, keepdim=True)
""",
            "length 1",
        ),
        (
            "first sample",
            """
def mean_features(features, labels, num_classes):
    return torch.stack([features[labels == c][0] for c in range(num_classes)])
""",
            "first sample of each class",
        ),
        (
            "the last one stays",
            """
def mean_features(features, labels, num_classes):
    prototypes = torch.zeros(num_classes, features.shape[1])
    for q, label in zip(features, labels):
        prototypes[label] = q
    return prototypes
""",
            "last sample of each class",
        ),
        (
            "divided by the classes",
            """
def mean_features(features, labels, num_classes):
    return torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features) / num_classes
""",
            "by the number of classes",
        ),
        (
            "channels first",
            """
def mean_features(features, labels, num_classes):
    return torch.stack([features[labels == c].mean(0) for c in range(num_classes)], 1)
""",
            "Classes belong along the first axis",
        ),
        (
            "a list",
            """
def mean_features(features, labels, num_classes):
    return [features[labels == c].mean(0) for c in range(num_classes)]
""",
            "should be a torch.Tensor, but a list came",
        ),
    ],
    "02.2": [
        (
            "the distances themselves",
            """
def distance_weights(query, reference, eps=1e-6):
    distance = (query[:, None] - reference[None]).abs()
    return distance / distance.sum(-1, keepdim=True)
""",
            "Eq. 5 takes 1/D",
        ),
        ("not normalised", WEIGHTS.format("weights"), "not normalised"),
        (
            "normalised over the classes",
            WEIGHTS.format("weights / weights.sum(1, keepdim=True)"),
            "normalised over the classes",
        ),
        (
            "L2",
            WEIGHTS.format("F.normalize(weights, dim=-1)").replace("F.", "torch.nn.functional."),
            "divided by the length",
        ),
        ("no abs", SHARED.replace(".abs()", ""), "Differences of -1 and +1"),
        (
            "no abs, the other way round",
            SHARED.replace("query[:, None] - reference[None]).abs()", "reference - query[:, None])"),
            "Differences of -1 and +1",
        ),
        ("floor of all pairs", SHARED.replace("mean(-1, keepdim=True)", "mean()"), "mean over all pairs"),
        ("plus eps", SHARED.replace("torch.maximum(distance, floor)", "(distance + eps)"), "You added eps"),
        (
            "plus the floor",
            SHARED.replace("torch.maximum(distance, floor)", "(distance + floor)"),
            "You added the floor",
        ),
        (
            "no abs, no floor",
            """
def distance_weights(query, reference, eps=1e-6):
    rows = []
    for q in query:
        weights = 1 / (reference - q + 1e-12)
        rows.append(weights / weights.sum(1, keepdim=True))
    return torch.stack(rows)
""",
            "Differences of -1 and +1",
        ),
        (
            "squared",
            """
def distance_weights(query, reference, eps=1e-6):
    weights = 1 / (query[:, None] - reference[None]).square()
    return weights / weights.sum(-1, keepdim=True)
""",
            "You squared",
        ),
        ("softmax", WEIGHTS.format("weights.softmax(-1)"), "softmax of 1/D"),
        (
            "no floor",
            """
def distance_weights(query, reference, eps=1e-6):
    weights = 1 / (query[:, None] - reference[None]).abs()
    return weights / weights.sum(-1, keepdim=True)
""",
            "D = 0 gave 1/0",
        ),
        (
            "absolute floor",
            """
def distance_weights(query, reference, eps=1e-6):
    weights = 1 / (query[:, None] - reference[None]).abs().clamp_min(eps)
    return weights / weights.sum(-1, keepdim=True)
""",
            "You used eps itself",
        ),
        (
            "classes first",
            WEIGHTS.format("(weights / weights.sum(-1, keepdim=True)).transpose(0, 1)"),
            "images come first",
        ),
    ],
    "02.3": [
        (
            "weights of the first image",
            """
def distance_map(features, weights):
    return torch.einsum("bkhw,ck->bchw", features, weights[0])
""",
            "weights of the first one",
        ),
        (
            "summed over the images",
            """
def distance_map(features, weights):
    return torch.einsum("bkhw,ack->bchw", features, weights)
""",
            "summed over the images",
        ),
        (
            "mean over the channels",
            """
def distance_map(features, weights):
    return (weights[:, :, :, None, None] * features[:, None]).mean(2)
""",
            "averaged over the channels",
        ),
        (
            "ReLU",
            """
def distance_map(features, weights):
    return torch.einsum("bkhw,bck->bchw", features, weights).relu()
""",
            "Eq. 6 has none",
        ),
        (
            "pooled features",
            """
def distance_map(features, weights):
    pooled = (weights @ features.mean((2, 3))[:, :, None]).squeeze(-1)
    return pooled[:, :, None, None].repeat(1, 1, *features.shape[-2:])
""",
            "You pooled the features first",
        ),
        (
            "mean weights",
            """
def distance_map(features, weights):
    return torch.einsum("bkhw,ck->bchw", features, weights.mean(0))
""",
            "the mean weights",
        ),
        (
            "stacked the wrong way",
            """
def distance_map(features, weights):
    maps = [torch.tensordot(w, f, dims=1) for w, f in zip(weights, features)]
    return torch.stack(maps, 1)
""",
            "images come first",
        ),
    ],
    "02.4": [
        (
            "differences of raw maps",
            AGREEMENT.format("(a - b).abs().mean((1, 2))", "found"),
            "their scale carries no meaning",
        ),
        (
            "weights",
            """
def agreement(features, rules, own, other):
    found = {name: controls.map_correlation(rule(own), rule(other)).mean().item() for name, rule in rules.items()}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))
""",
            "You compared the weights",
        ),
        (
            "all images at once",
            AGREEMENT.format("torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]", "found"),
            "correlation of all images at once",
        ),
        (
            "no mean taken off",
            AGREEMENT.format("torch.cosine_similarity(a.flatten(1), b.flatten(1))", "found"),
            "left out the mean of each map",
        ),
        (
            "size alone",
            AGREEMENT.format("controls.map_correlation(a, b).abs()", "found"),
            "size of each correlation",
        ),
        ("sum", AGREEMENT.format("controls.map_correlation(a, b).sum()", "found"), "You summed over the images"),
        ("first image", AGREEMENT.format("controls.map_correlation(a, b)[0]", "found"), "first image alone"),
        (
            "own class twice",
            AGREEMENT.format("controls.map_correlation(a, a)", "found"),
            "one and the same class",
        ),
        ("not sorted", AGREEMENT.format("controls.map_correlation(a, b)", "plain"), "their order is not"),
        (
            "most alike first",
            AGREEMENT.format("controls.map_correlation(a, b)", "found").replace(
                "key=found.get", "key=lambda n: -found[n]"
            ),
            "their order is not",
        ),
        (
            "names alone",
            AGREEMENT.format("controls.map_correlation(a, b)", "found").replace("return {", "return list({")[:-2]
            + "})\n",
            "Expected a dictionary",
        ),
    ],
    "02.5": [
        (
            "a fine grid",
            """
def change_of_places(error_at, limit, low, high, tolerance):
    for factor in torch.arange(low, high, tolerance).tolist():
        if error_at(factor) <= limit:
            return factor
""",
            "You measured more than 12 times",
        ),
        ("the wrong half", SEARCH.format(op="<", start="low, high", end="(low + high) / 2"), "You kept the wrong half"),
        (
            "not below",
            SEARCH.format(op=">=", start="low, high", end="(low + high) / 2"),
            "You went on where the error equals",
        ),
        ("error", SEARCH.format(op=">", start="low, high", end="error_at(high)"), "That is the error at the place"),
        ("error before", SEARCH.format(op=">", start="low, high", end="error_at(low)"), "error before the place"),
        ("length", SEARCH.format(op=">", start="low, high", end="high - low"), "the last interval's length"),
        (
            "one halving",
            """
def change_of_places(error_at, limit, low, high, tolerance):
    middle = (low + high) / 2
    if error_at(middle) > limit:
        low = middle
    else:
        high = middle
    return middle
""",
            "That is the first middle",
        ),
        (
            "fixed ends",
            SEARCH.format(op=">", start="-1.0, 1.0", end="(low + high) / 2"),
            "as they are given",
        ),
        (
            "outside",
            """
def change_of_places(error_at, limit, low, high, tolerance):
    factor = low - tolerance
    while error_at(factor) > limit:
        factor += tolerance
    return factor
""",
            "outside of low",
        ),
        (
            "nothing measured",
            """
def change_of_places(error_at, limit, low, high, tolerance):
    return -0.637
""",
            "You never called error_at",
        ),
    ],
}
