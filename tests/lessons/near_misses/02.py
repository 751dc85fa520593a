"""Wrong answers that students give in lesson 02, and a fragment of the message that each of them must get."""

WEIGHTS = """
def distance_weights(query, reference, eps=1e-6):
    distance = (query[:, None] - reference[None]).abs()
    floor = eps * distance.mean(-1, keepdim=True)
    weights = 1 / torch.maximum(distance, floor)
    return {}
"""

SHARED = WEIGHTS.format("weights / weights.sum(-1, keepdim=True)")

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
}
