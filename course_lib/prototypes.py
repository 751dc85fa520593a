"""Prototypes: what a class looks like on average, as pooled features.

    P_c = 1/N_c sum_{i in c} s_i          Shen et al., "Distance-Based Class Activation Map for Metric Learning", Eq. 7

The paper averages feature maps and pools when it compares. Pooling and averaging commute, so k numbers for each class
are enough: 1000 classes of 2048 channels are 8 MB.

    p_c = sum_i m_ci v_i / sum_i m_ci          Du et al., "Weakly Supervised Semantic Segmentation by Pixel-to-Prototype
                                               Contrast", CVPR 2022, Eq. 5: of pixels, by confidence

    q  <- q + mean S - mean Q                  Liu et al., "Prototype Rectification for Few-Shot Learning" (BD-CSPN),
    P'_c = sum_i w_ic x_i                      ECCV 2020: the biases of few samples, across and within classes
    w_ic = softmax_i(epsilon cos(x_i, P_c))    over the support samples of class c and its Z surest queries

Both look at all queries of an episode together (transductive), and both lose where the queries are not spread evenly
over the classes: then the shift moves them towards a mean that is not theirs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from course_lib.processes import gathered


def class_prototypes(
    features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], num_classes: int
) -> Float32[Tensor, "c k"]:
    """Mean feature of each class  (Shen et al., Eq. 7), summed in float64; gradients pass.

    Args:
        features: pooled features, one row per sample; scaled to length 1 before, if the model compares directions.
        labels: class of each row, 0..num_classes - 1.
    Raises:
        ValueError: a label out of range or a class without samples (looked at on the CPU only: on a GPU the look would
            stall a training step, and the prototype of such a class is NaN).
    """
    _check_on_cpu(labels, num_classes)
    wide, labels = features.double(), labels.long()
    sums = wide.new_zeros(num_classes, features.shape[1]).index_add(0, labels, wide)
    counts = wide.new_zeros(num_classes).index_add(0, labels, wide.new_ones(len(labels)))
    return (sums / counts[:, None]).float()  # Eq. 7 (Shen et al.)


def shift(
    support: Float[Tensor, "*episodes s k"], query: Float[Tensor, "*episodes q k"]
) -> Float32[Tensor, "*episodes q k"]:
    """Queries moved by mean S - mean Q, so that both sets of an episode have one mean: cross-class bias  (Liu et al.).

    Args:
        support, query: pooled features, scaled to length 1 before; any number of episodes at once.
    """
    query = query.float()
    return query + (support.float().mean(-2, keepdim=True) - query.mean(-2, keepdim=True))


def rectify(
    support: Float[Tensor, "*episodes s k"],
    labels: Int[Tensor, " s"],
    query: Float[Tensor, "*episodes q k"],
    num_classes: int,
    surest: int = 8,
    epsilon: float = 10.0,
) -> Float32[Tensor, "*episodes c k"]:
    """Prototypes that the surest queries of each class join: P'_c = sum_i w_ic x_i, the intra-class bias  (Liu et al.).

    Each query gets the label of its nearest prototype in cosine, once; there are no further rounds. Implementations
    differ: easyfsl takes all queries, epsilon = 1, and classifies queries that were not shifted. For BD-CSPN itself:

        query = shift(support, query)
        prototypes = rectify(support, labels, query, num_classes)         # then the nearest in cosine

    Args:
        support: pooled features, scaled to length 1 before; any number of episodes at once.
        labels: class of each support sample, the same in all episodes, 0..num_classes - 1, each with a sample.
        query: shifted before, and then not scaled again.
        surest: Z, how many queries join a class; of a class that is the nearest to fewer, all. One that is nearest to
            none keeps its prototype. Sure is what has a large cosine (the paper does not say more).
        epsilon: scale of the weights: 0 weighs all samples of a class equally, 10 (as in other implementations; the
            published value could not be checked) favours those next to the prototype. Worth a look on validation
            classes: on frozen features of EfficientNet-Lite0, 1 gains more and 10 can lose.
    Raises:
        ValueError: a label out of range or a class without samples (looked at on the CPU only), or no queries to take.
    """
    _check_on_cpu(labels, num_classes)
    support, query = support.float(), query.float()
    with torch.autocast(query.device.type, enabled=False):  # fp32 island: cosines and prototypes
        member = F.one_hot(labels.long(), num_classes).T  # c s
        basic = (member / member.sum(1, keepdim=True)) @ support  # ... c k
        near, like = _cosine(basic, support), _cosine(basic, query)  # ... c s, ... c q
        joins = surest_queries(like, surest)
        pairs = (member.bool(), near), (joins, like)
        weights = torch.cat([torch.where(there, epsilon * cosine, -torch.inf) for there, cosine in pairs], -1)
        weights = weights.softmax(-1)  # ... c s+q
        of_support, of_query = weights.split((support.shape[-2], query.shape[-2]), -1)
        rectified = of_support @ support + of_query @ query
    return torch.where(joins.any(-1, keepdim=True), rectified, basic)


def surest_queries(cosines: Float[Tensor, "*episodes c q"], surest: int) -> Bool[Tensor, "*episodes c q"]:
    """Which queries join which class: of those nearest to it the `surest` with the largest cosine, or all if they are
    fewer. A query joins the class of its nearest prototype (its pseudo label) or none  (Liu et al.).

    Args:
        cosines: of the prototypes of all classes with all queries; the larger the surer.
        surest: Z.
    Raises:
        ValueError: no queries to take.
    """
    if surest < 1:
        raise ValueError(
            f"Expected at least one query to join a class, got surest = {surest}. Without any, the prototypes are the "
            "means of the support samples: class_prototypes."
        )
    mine = F.one_hot(cosines.max(-2).indices, cosines.shape[-2]).mT.bool()
    sure, where = torch.where(mine, cosines, -torch.inf).topk(min(surest, cosines.shape[-1]))  # ... c z
    return torch.zeros_like(mine).scatter(-1, where, sure > -torch.inf)


def _cosine(a, b):  # ... c k, ... n k -> ... c n
    length = b.norm(dim=-1).clamp_min(1e-12)  # the small result is divided, not the many features
    return F.normalize(a, dim=-1) @ b.mT / length[..., None, :]


def pixel_prototypes(
    cam: Float[Tensor, "n c h w"], embeddings: Float[Tensor, "n d h w"], top_k: int
) -> Float[Tensor, "c d"]:
    """Prototypes of pixels: the CAM-weighted mean embedding of the K most confident pixels of each class, of length 1.

        p_c = sum_{i in top K of c} m_ci v_i / sum_{i in top K of c} m_ci          Du et al., CVPR 2022, Eq. 5

    The pixels are those of the whole batch, and under torch.distributed of the batches of all processes (shares of one
    size). Pixels as confident as the K-th count too: their order means nothing. No gradient passes: a prototype is a
    target.

    Args:
        cam: confidences; -inf where a pixel is no candidate for a class. Negative ones weigh negatively.
        embeddings: on the same grid; not scaled here.
    Returns:
        in float32 or more. A class with fewer than K candidates takes what there is, and one without any is a row of
        zeros.
    """
    cam, embeddings = at_least_float32(cam.detach()).flatten(2), at_least_float32(embeddings.detach()).flatten(2)
    confidence = cam.transpose(0, 1).flatten(1)  # c m
    best = gathered(confidence.topk(min(top_k, confidence.shape[1]), 1).values.T)  # most c, of each process
    last = best.topk(min(top_k, len(best)), 0).values[-1, :, None]  # c 1
    weight = torch.where((cam >= last) & (cam > -torch.inf), cam, 0.0).to(embeddings.dtype)  # m_ci in the top K
    with torch.autocast(embeddings.device.type, enabled=False):  # fp32 island: sums of unlike confidences
        sums = torch.cat((weight @ embeddings.mT, weight.sum(2, keepdim=True)), 2).sum(0)
    sums = gathered(sums[None]).sum(0)  # c d+1
    total = sums[:, -1:]
    return F.normalize(sums[:, :-1] / torch.where(total == 0, 1.0, total), dim=1)  # Eq. 5 (Du et al.)


def at_least_float32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Values for an fp32 island: in float32, or in float64 if they come so."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_labels(labels: Int[Tensor, " n"], num_classes: int) -> None:
    """Raises a ValueError if a label lies outside 0..num_classes - 1."""
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f"Labels from 0 to {num_classes - 1} were expected, but {int(labels.min())} to {int(labels.max())} "
            "came. Number the classes from 0, or raise num_classes."
        )


def _check_on_cpu(labels, num_classes):
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, num_classes)
        check_counted(labels.bincount(minlength=num_classes))


def check_counted(counts: Int[Tensor, " c"]) -> None:
    """Raises a ValueError if a class has no sample."""
    if empty := (counts == 0).nonzero().flatten().tolist():
        some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise ValueError(
            f"{len(empty)} of {len(counts)} classes have no sample, and so no prototype: {some}. Add samples, or "
            "number only the classes that are there."
        )
