"""Wrong answers that students give in lesson 02, and a fragment of the message that each of them must get."""

WEIGHTS = """
def distance_weights(query, reference, eps=1e-6):
    distance = (query[:, None] - reference[None]).abs()
    floor = eps * distance.mean(-1, keepdim=True)
    weights = 1 / torch.maximum(distance, floor)
    return {}
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
            "takes the reciprocal",
        ),
        ("not normalised", WEIGHTS.format("weights"), "not normalised"),
        ("normalised over the classes", WEIGHTS.format("weights / weights.sum(1, keepdim=True)"), "over the classes"),
        (
            "squared",
            """
def distance_weights(query, reference, eps=1e-6):
    weights = 1 / (query[:, None] - reference[None]).square()
    return weights / weights.sum(-1, keepdim=True)
""",
            "Eq. 4 is an absolute value",
        ),
        ("softmax", WEIGHTS.format("weights.softmax(-1)"), "softmax of 1/D"),
        (
            "no floor",
            """
def distance_weights(query, reference, eps=1e-6):
    weights = 1 / (query[:, None] - reference[None]).abs()
    return weights / weights.sum(-1, keepdim=True)
""",
            "A distance of 0 gave 1/0",
        ),
        (
            "absolute floor",
            """
def distance_weights(query, reference, eps=1e-6):
    weights = 1 / (query[:, None] - reference[None]).abs().clamp_min(eps)
    return weights / weights.sum(-1, keepdim=True)
""",
            "you used eps itself",
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
    ],
}
