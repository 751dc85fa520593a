"""Losses that shape distances between pooled features. Pure functions, in float32 whatever the precision around them.

    prototype softmax   -log softmax_c(-s d(q, P_c))[y]                    Snell et al., NeurIPS 2017, Eq. 2
    batch-hard triplet  [m + max_p d(a, p) - min_n d(a, n)]+               Hermans et al., 2017, Eq. 5
    center loss         1/B sum_i |q_i - C_y_i|^2                    Wen et al., ECCV 2016, Eq. 2 (there 1/2, and a sum)

A batch in which nothing can be compared gives a zero that still has a graph, never a NaN. Nothing waits for the device.
Every other loss is to be had from pytorch-metric-learning, whose losses take (features, labels) as well.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor

Metric = Literal["l1", "l2", "cosine"]


def distances(
    query: Float[Tensor, "b k"], reference: Float[Tensor, "c k"], metric: Metric = "l1"
) -> Float32[Tensor, "b c"]:
    """Distances of all pairs: sum_k |q_k - r_k| ("l1", Shen et al., Eq. 4), |q - r|^2 ("l2") or 1 - cos ("cosine").

    The class of an image is that of its nearest prototype: `distances(query, prototypes).argmin(1)`.
    """
    query, reference = query.float(), reference.float()
    with torch.autocast(query.device.type, enabled=False):  # fp32 island: differences of large numbers
        if metric == "cosine":
            return 1 - F.normalize(query, dim=1) @ F.normalize(reference, dim=1).T
        if metric == "l1":
            return torch.cdist(query, reference, 1.0)  # the sum of Eq. 4 (Shen et al.)
        return _euclidean(query, reference).square()


def prototype_softmax(
    features: Float[Tensor, "b k"],
    labels: Int[Tensor, " b"],
    prototypes: Float[Tensor, "c k"],
    metric: Metric = "l2",
    scale: float = 1.0,
) -> Float32[Tensor, ""]:
    """Cross-entropy over negative distances to prototypes: -log softmax_c(-scale d(q, P_c))[y]  (Snell et al., Eq. 2).

    Args:
        prototypes: of all classes that compete: means of a support set, or parameters that learn along.
        scale: the inverse temperature. What a distance of 1 means depends on metric and network.
    """
    logits = -scale * distances(features, prototypes, metric)
    return F.cross_entropy(logits, labels.long()) if len(labels) else logits.sum()  # Eq. 2 (Snell et al.)


def batch_prototype_softmax(
    features: Float[Tensor, "b k"], labels: Int[Tensor, " b"], metric: Metric = "l2", scale: float = 1.0
) -> Float32[Tensor, ""]:
    """Prototype softmax against the class means of the batch itself, each sample left out of the mean of its own class.

    Were it part of that mean, it would attract itself, and a class of one sample would be perfect. Snell et al. split
    the batch into support and query for this reason; leaving one out lets every sample be both. A sample without
    another one of its class is no query; the class still competes for the others.
    """
    features = features.float()
    same = labels[:, None] == labels  # b b
    count = same.sum(1)
    with torch.autocast(features.device.type, enabled=False):  # fp32 island: prototypes
        means = same.float() @ features / count[:, None]  # b k: one for each sample, not for each class
        # q - mean of the others = n / (n - 1) (q - mean of all)
        others = features - (features - means) * (count / (count - 1).clamp_min(1))[:, None]
    own = _paired(features, others, metric)
    # A class stands in the sum as often as it has samples in the batch: log(count) makes it one.
    logits = -scale * torch.where(same, own[:, None], distances(features, means, metric)) - count.log()
    return _mean_where(count > 1, scale * own + logits.logsumexp(1))


def batch_hard_triplet(
    features: Float[Tensor, "b k"], labels: Int[Tensor, " b"], margin: float | None = 0.3
) -> Float32[Tensor, ""]:
    """Mean over anchors of [margin + farthest of its class - nearest of another one]+  (Hermans et al., 2017, Eq. 5).

    Euclidean distances. Anchors without a positive do not count. If all features collapse into a point,
    the loss is the margin and its gradient zero (not NaN): a value that stays there is the sign of it.

    Args:
        margin: in the unit of the features; None takes the soft margin, log(1 + exp(difference)).
    """
    if not len(labels):
        return features.float().sum()
    distance = _euclidean(features.float(), features.float())  # b b
    same = labels[:, None] == labels
    positive = same.clone().fill_diagonal_(False)
    valid = positive.any(1)  # without a negative, the difference is -inf: a zero
    difference = torch.where(positive, distance, -torch.inf).amax(1) - torch.where(same, torch.inf, distance).amin(1)
    hinge = F.softplus(difference) if margin is None else F.relu(margin + difference)  # Eq. 5 (Hermans et al.)
    return _mean_where(valid, hinge)


def center_loss(
    features: Float[Tensor, "b k"], labels: Int[Tensor, " b"], centers: Float[Tensor, "c k"]
) -> Float32[Tensor, ""]:
    """Mean squared distance of each sample to the center of its class  (Wen et al., Eq. 2, without the 1/2).

    Centers are parameters with plain gradient descent of their own: at rate 0.5 a step moves the center of class j by
    n_j / B of the way to the mean of its n_j samples in a batch of B. (Wen et al., Eq. 4, move it by rate n_j / (1 +
    n_j) instead, and so does not depend on B.) A factor before this loss must be divided out of that rate.
    """
    distance = features.float() - centers.float()[labels.long()]
    return distance.square().sum() / max(1, len(labels))  # Eq. 2 (Wen et al.)


def _euclidean(a, b):  # b k, c k -> b c
    # By differences, not by |a|^2 - 2ab + |b|^2: that is inexact for close pairs. The gradient at 0 is 0, not NaN.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _paired(a, b, metric):  # b k, b k -> b
    if metric == "cosine":
        return 1 - F.cosine_similarity(a, b)
    return (a - b).abs().sum(1) if metric == "l1" else (a - b).square().sum(1)


def _mean_where(valid, values):  # b, b -> a number
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)
