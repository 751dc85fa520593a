"""Ranking: how well a gallery is ordered for its queries, and k-reciprocal re-ranking, which orders it anew.

Person re-identification (Zheng et al., ICCV 2015, Market-1501). Junk (identity -1) and what shows the query's identity
in the query's own camera leave the gallery first; r_1 < ... < r_R are the ranks of a query's R matches in what is left:

    CMC(k) = mean over queries of [r_1 <= k]
    mAP    = mean over queries of 1/R sum_i i / r_i           (no interpolation)
    mINP   = mean over queries of R / r_R                     Ye et al., TPAMI 2021

The first Matlab tool of Market-1501 took trapezoids: in place of i / r_i the mean of i / r_i and (i - 1) / (r_i - 1),
which is 1 for r_i = 1. Its mAP is never higher.

Image retrieval (Musgrave et al., ECCV 2020). Every image is a query for the R others of its class, among all others:

    Recall@K    = mean over queries of [r_1 <= K]             (not the recall of information retrieval)
    R-precision = mean over queries of 1/R |{i: r_i <= R}|
    MAP@R       = mean over queries of 1/R sum_{i: r_i <= R} i / r_i
    N_k         = how many queries have an image among their k nearest, its mean is k; of a hub it is far more
                                                              Radovanovic et al., JMLR 2010, section 2

Re-ranking (Zhong et al., CVPR 2017), over the images of query and gallery together, d being squared Euclidean
distances, each row divided by its largest:

    N(i, k)  = i and its k nearest others,   R(i, k) = {j in N(i, k): i in N(j, k)}
    R*(i)    = R(i, k1) and every R(c, k1/2), c in R(i, k1), of which more than 2/3 lie in R(i, k1)
    V_ij     = exp(-d_ij) for j in R*(i), else 0; divided by its sum, then averaged over the first k2 images of N(i, .)
    d*       = (1 - lam) (1 - sum_j min(V_ij, V_lj) / sum_j max(V_ij, V_lj)) + lam d_il

A query without a match has no rank: it is left out of the means, and counted. Of equal distances the lower index ranks
first, on every device. Released code of re-ranking holds several matrices of all images by all images, one of them in
half precision, and sorts them whole; here rows are made in chunks, only the nearest images of each are kept, and V is
sparse. The result is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

KS = (1, 2, 4, 8)  # of Recall@K, as usual on CUB-200-2011
JUNK = -1  # identity of gallery images that are neither right nor wrong
CHUNK = 2**20  # numbers in work at a time: rows enough for a matrix product near full speed
CACHED = 2**18  # and where nothing is multiplied: they stay in the cache (twice as fast, measured)
Array = Tensor | np.ndarray
LAST = torch.iinfo(torch.int64).max  # ranks behind every distance


@dataclass(frozen=True)
class Ranking:
    """How well a gallery is ordered, as shares in 0..1: means over the queries that have a match."""

    cmc: Float64[Tensor, " ranks"]  # CMC(1), CMC(2), ...
    map: float
    minp: float
    queries: int  # that have a match
    without_match: int  # the others
    average_precision: Float64[Tensor, " q"]  # of every query; NaN without a match
    map_trapezoid: float  # as the first Matlab tool had it


@dataclass(frozen=True)
class Retrieval:
    """How well images find the others of their class, as shares in 0..1: means over the images that have others."""

    recall: dict[int, float]  # Recall@K for each K
    r_precision: float
    map_at_r: float
    queries: int  # images that are not the only one of their class
    without_match: int  # the others
    average_precision: Float64[Tensor, " n"]  # at R, of every image; NaN without a match


@torch.no_grad()
def cmc_map(
    distances: Float[Array, "q g"],
    query_ids: Int[Array, " q"],
    gallery_ids: Int[Array, " g"],
    query_cameras: Int[Array, " q"],
    gallery_cameras: Int[Array, " g"],
    ranks: int = 50,
) -> Ranking:
    """CMC, mAP and mINP of person re-identification, as defined above; of tensors, or of numpy's arrays.

    Args:
        distances: of queries to the gallery; only their order counts, in float32.
        query_ids, gallery_ids: identities. -1 is junk; one that no query has is a distractor, which stays: it is wrong.
        ranks: length of the CMC curve, which stays flat behind the end of a gallery that is shorter.
    Raises:
        ValueError: no query has a match, or a distance is NaN.
    """
    distances = torch.as_tensor(distances)
    device = distances.device
    labels = query_ids, gallery_ids, query_cameras, gallery_cameras
    query_ids, gallery_ids, query_cameras, gallery_cameras = (torch.as_tensor(part, device=device) for part in labels)
    figures = torch.full((4, len(distances)), torch.nan, dtype=torch.float64, device=device)
    for rows in _chunks(distances, distances.shape[1], CACHED) if distances.numel() else ():
        same, keys = query_ids[rows, None] == gallery_ids, _keys(distances[rows])
        kept = ~(same & (query_cameras[rows, None] == gallery_cameras)) & (gallery_ids != JUNK)
        count = (same & kept).sum(1, keepdim=True)  # R
        most = max(1, int(count.max()))
        matches = torch.where(same & kept, keys, LAST).topk(most, 1, largest=False).values  # q most, ascending
        keys = torch.where(kept, keys, LAST)
        # On a CPU numpy sorts, with vector instructions: 8 times faster.
        keys = torch.from_numpy(np.sort(keys.numpy(), 1)) if device.type == "cpu" else keys.sort(1).values
        rank = torch.searchsorted(keys, matches).double() + 1  # r_i
        number = torch.arange(1, most + 1, device=device)  # i
        precision = torch.where(number <= count, number / rank, 0.0)
        last = torch.where(number == count, precision, 0.0)  # R / r_R
        before = torch.where(rank > 1, (number - 1) / (rank - 1), 1.0)  # precision one place earlier
        slant = torch.where(number <= count, (before + precision) / 2, 0.0)
        averages = (part.sum(1) / count[:, 0] for part in (precision, slant))
        figures[:, rows] = torch.stack((rank[:, 0], *averages, last.sum(1)))
    valid = ~figures[1].isnan()  # 0 / 0 without a match
    if not valid.any():
        raise ValueError(
            f"None of {len(distances)} queries has a match: a gallery image of its identity from another camera. "
            "Are all images from one camera, or do query and gallery number identities differently?"
        )
    first, precision, slant, penalty = figures[:, valid]
    return Ranking(
        (first[:, None] <= torch.arange(1, ranks + 1, device=device)).double().mean(0).cpu(),
        float(precision.mean()),
        float(penalty.mean()),
        int(valid.sum()),
        int((~valid).sum()),
        figures[1].cpu(),
        float(slant.mean()),
    )


def retrieval(features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], ks: Sequence[int] = KS) -> Retrieval:
    """Recall@K, R-precision and MAP@R of images that are query and gallery in one, as defined above; none finds itself.

    Args:
        features: compared by Euclidean distance: scale them to length 1 first if the model compares directions.
        labels: class of each image.
    Raises:
        ValueError: no class has two images, or a feature is NaN.
    """
    return _retrieved(lambda depth: nearest(features, None, depth), labels.to(features.device), ks)


def retrieval_by_distance(
    distances: Float[Tensor, "n n"], labels: Int[Tensor, " n"], ks: Sequence[int] = KS
) -> Retrieval:
    """`retrieval` from the distances of all pairs, of any kind; what stands on the diagonal does not count.

    Raises:
        ValueError: no class has two images, or a distance is NaN.
    """
    itself = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    others = distances.masked_fill(itself, torch.inf)
    return _retrieved(lambda depth: _lowest(others, depth), labels.to(distances.device), ks)


def _retrieved(neighbours, labels, ks):
    """Figures of retrieval from a function that gives the `depth` nearest others of all images, n depth."""
    _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
    matches = sizes[number] - 1  # R of each image
    valid = matches > 0
    if not valid.any():
        raise ValueError(
            f"None of {len(labels)} images has another one of its class, so there is nothing to find. "
            "Retrieval is measured on classes of two images and more."
        )
    depth = min(max(*ks, int(matches.max())), len(labels) - 1)
    hit = labels[neighbours(depth)] == labels[:, None]  # n depth
    rank = torch.arange(1, depth + 1, device=labels.device)
    counted = hit & (rank <= matches[:, None])
    precision = torch.where(counted, hit.cumsum(1) / rank, 0.0).double().sum(1) / matches  # 0 / 0 = NaN without
    return Retrieval(
        {k: float(hit[valid, :k].any(1).double().mean()) for k in ks},
        float((counted.sum(1) / matches)[valid].double().mean()),
        float(precision[valid].mean()),
        int(valid.sum()),
        int((~valid).sum()),
        precision.cpu(),
    )


def k_occurrence(features: Float[Tensor, "n d"], k: int) -> Int64[Tensor, " n"]:
    """N_k of each image: how many others have it among their k nearest (Euclidean); the mean over images is k."""
    return nearest(features, None, k).flatten().bincount(minlength=len(features))


def largest_hubs(features: Float[Tensor, "n d"], k: int) -> dict[str, int]:
    """The largest N_k by three distances: Euclidean, cosine, and cosine of features whose mean was taken away.

    Hubs come with many dimensions, where what lies near the centre of the data is near to everything; a direction has
    no distance from the centre (Radovanovic et al., JMLR 2010, sections 4 and 6).
    """
    centred = features - features.mean(0)
    views = {
        "Euclidean": features,
        "cosine": F.normalize(features, dim=1),
        "cosine, centred": F.normalize(centred, dim=1),
    }
    return {name: int(k_occurrence(view, k).max()) for name, view in views.items()}


def cosine_distances(query: Float[Tensor, "q k"], gallery: Float[Tensor, "g k"]) -> Float[Tensor, "q g"]:
    """Distances 1 - cos of features of length 1."""
    return 1 - query @ gallery.T


@torch.no_grad()
def nearest(query: Float[Tensor, "q k"], gallery: Float[Tensor, "g k"] | None, count: int) -> Int64[Tensor, "q count"]:
    """Indices of the gallery images nearest to each query, in Euclidean distance, nearest first.

    The distances are made in chunks: never all of them are there at once.

    Args:
        gallery: None searches among the queries, where none finds itself (by its index: it does find its copies).
    Raises:
        ValueError: fewer images than asked for, or a feature that is NaN.
    """
    among_queries = gallery is None
    if among_queries:
        gallery = query
    there = len(gallery) - among_queries
    if not 1 <= count <= there:
        raise ValueError(
            f"{count} nearest images were asked for, but there are {there} to search among. Ask for at least "
            "one and at most all of them."
        )
    found = torch.empty(len(query), count, dtype=torch.long, device=query.device)
    for rows, distance in _distances(query.float(), gallery.float()):
        if among_queries:
            distance[rows - rows[0], rows] = torch.inf
        found[rows] = _lowest(distance, count)
    return found


@torch.no_grad()
def rerank(
    query: Float[Tensor, "q k"], gallery: Float[Tensor, "g k"], k1: int = 20, k2: int = 6, lam: float = 0.3
) -> Float32[Tensor, "q g"]:
    """Distances d* after k-reciprocal re-ranking (Zhong et al., CVPR 2017), as defined above: exact, sparse, in chunks.

    It looks at all queries at once, so its figures are transductive: report them apart. It helps where k1 is about the
    number of true matches in the gallery; with far fewer of them, a neighbourhood fills with what only looks alike.

    Args:
        query, gallery: features, as they are compared: scale them to length 1 first if the model compares directions.
        k1: size of the neighbourhoods, k2: how many images an encoding is averaged over; 1 leaves it as it is.
        lam: share of the distance there was before; 1 leaves its order.
    Raises:
        ValueError: k1 or k2 below 1, lam outside 0..1, or a feature that is NaN.
    """
    if k1 < 1 or k2 < 1 or not 0 <= lam <= 1:
        raise ValueError(
            f"k1 and k2 are numbers of images from 1 on and lam is a share in 0..1, but k1 = {k1}, k2 = {k2}, "
            f"lam = {lam} came. The paper takes 20, 6 and 0.3."
        )
    features = torch.cat((query, gallery)).float()
    images, queries = len(features), len(query)
    count = min(max(k1 + 1, k2), images)
    neighbours = torch.empty(images, count, dtype=torch.long, device=features.device)
    largest, result = features.new_empty(images), features.new_empty(queries, len(gallery))
    for rows, distance in _distances(features, features):
        largest[rows] = distance.amax(1).clamp_min_(1e-30)  # 0 if all images are the same
        probes = rows[rows < queries]  # queries come first
        result[probes] = distance[: len(probes), queries:] * (lam / largest[probes, None])
        distance[rows - rows[0], rows] = -1  # nothing is nearer than the image, not even its copy
        neighbours[rows] = _lowest(distance, count)
    # Half of 25 is 12, as in released code.
    near, close = (_mutual(neighbours[:, : k + 1]) for k in (k1, round(k1 / 2)))
    encoding = _average(*_encode(features, near, close, largest), neighbours[:, :k2])
    for rows, shared in _overlaps(*encoding, images, queries):
        result[rows] += (1 - lam) * (1 - shared / (2 - shared))  # sum of maxima = 2 - sum of minima
    return result


def reciprocal_neighbours(distances: Float[Tensor, "n n"], k: int) -> Bool[Tensor, "n n"]:
    """R(i, k) as a mask: which images are among the k nearest of each other; each image is among its own.

    The whole matrix at once, where `rerank` works on the nearest alone: for some hundred images.
    """
    order = _keys(distances).argsort(1)[:, : k + 1]
    among = torch.zeros_like(distances, dtype=torch.bool).scatter(1, order, True)  # N(i, k)
    return among & among.T


def jaccard_distances(memberships: Float[Tensor, "n m"]) -> Float[Tensor, "n n"]:
    """1 - sum of minima / sum of maxima of all pairs of rows V: the distance of two neighbourhoods, in 0..1."""
    pairs = memberships[:, None], memberships[None]  # n 1 m and 1 n m
    return 1 - torch.minimum(*pairs).sum(-1) / torch.maximum(*pairs).sum(-1)


def _chunks(table, size, most):
    """The numbers of the rows of a table, in parts with at most `most` numbers in work: `size` of them for each row."""
    return torch.arange(len(table), device=table.device).split(max(1, most // size))


def _distances(query, gallery):  # q k, g k -> rows, rows g
    """Squared Euclidean distances, as numbers of some queries and their rows."""
    centre = gallery.mean(0)  # |a|^2 - 2ab + |b|^2 loses least around zero
    gallery = gallery - centre
    lengths = gallery.square().sum(1)
    for rows in _chunks(query, len(gallery), CHUNK):
        own = query[rows] - centre
        with torch.autocast(query.device.type, enabled=False):  # fp32 island: differences of large numbers
            products = torch.addmm(lengths, own, gallery.T, alpha=-2)
        yield rows, products.add_(own.square().sum(1, keepdim=True)).clamp_min_(0)


def _keys(distances):  # q g -> q g
    """Numbers in the order of the distances in float32, all different in a row: of equal ones the first has the lowest.

    Upper half: a float's bits as an integer, which are in the order of the floats if those of negative ones are turned
    over. Lower half: the index.
    """
    if distances.numel() and distances.amax().isnan():
        raise ValueError(
            "Distances that are NaN have no order. Look at the features: a division by the norm of a zero vector, "
            "or a training that diverged, are the usual causes."
        )
    bits = (distances.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= bits >> 31 & 0x7FFFFFFF
    return bits.long().bitwise_left_shift_(32).add_(torch.arange(distances.shape[1], device=distances.device))


def _lowest(distances, count):  # q g -> q count
    """Indices of the smallest distances of each row in ascending order, the lower index first among equals."""
    return _keys(distances).topk(count, 1, largest=False).values & 0xFFFFFFFF


def _mutual(neighbours):  # n k -> n k
    """R(i, k): of the neighbours of each image, those that have it among theirs; -1 in the place of the others."""
    parts = _chunks(neighbours, neighbours.shape[1] ** 2, CACHED)
    mutual = torch.cat([(neighbours[neighbours[rows]] == rows[:, None, None]).any(2) for rows in parts])
    return torch.where(mutual, neighbours, -1)


# A sparse matrix is the row, the column and the value of its entries, which come row by row, and in a row by column.


def _encode(features, near, close, largest):
    """V, sparse: exp(-d) of the members of R* of each image, divided by its sum.

    Args:
        features: n k.
        near, close: R(i, k1) and R(i, k1/2), n j and n h.
        largest: squared distance of each image from the farthest one, n.
    """
    (images, channels), parts = features.shape, []
    for rows in _chunks(near, near.shape[1] ** 2 * close.shape[1], CHUNK):
        own = near[rows]  # b j
        theirs = torch.where(own[..., None] < 0, -1, close[own])  # b j h, of every candidate c
        real = theirs >= 0
        inside = (theirs[..., None] == own[:, None, None]).any(3) & real
        joins = 3 * inside.sum(2, keepdim=True) > 2 * real.sum(2, keepdim=True)
        members = torch.cat((own, torch.where(joins, theirs, -1).flatten(1)), 1)
        parts.append((rows[:, None] * images + members)[members >= 0].unique())
    pairs = torch.cat(parts)
    row, column, value = pairs // images, pairs % images, features.new_empty(len(pairs))
    for some in _chunks(pairs, channels, CACHED):
        apart = features.index_select(0, row[some]).sub_(features.index_select(0, column[some]))
        value[some] = torch.exp(-torch.linalg.vector_norm(apart, dim=1).square() / largest[row[some]])
    return row, column, value / value.new_zeros(images).index_add_(0, row, value)[row]


def _average(row, column, value, first):
    """The mean of the rows of a sparse matrix that `first` names for each row (n k2)."""
    (images, k2), parts = first.shape, []
    for rows in _chunks(first, k2 * (1 + len(row) // images), CACHED):
        place, entry = _entries(row, first[rows].flatten())
        pairs, where = (rows[place // k2] * images + column[entry]).unique(return_inverse=True)
        parts.append((pairs, value.new_zeros(len(pairs)).index_add_(0, where, value[entry] / k2)))
    pairs, value = map(torch.cat, zip(*parts))
    return pairs // images, pairs % images, value


def _overlaps(row, column, value, images, queries):  # rows, rows g
    """Numbers of some queries, and sum_j min(V_ij, V_lj) with each image l of the gallery. Zeros are not looked at."""
    gallery, own = images - queries, int((row < queries).sum())
    columns, order = column[own:].sort(stable=True)  # the gallery's part, transposed
    others, weights = row[own:][order] - queries, value[own:][order]
    sizes = columns.bincount(minlength=images)[column[:own]]  # pairs of each entry
    cost = sizes.new_full((queries,), gallery).index_add_(0, row[:own], sizes)
    counts = (cost.cumsum(0) // CHUNK).unique_consecutive(return_counts=True)[1]
    for rows in torch.arange(queries, device=row.device).split(counts.tolist()):
        query, entry = _entries(row, rows)
        pair, other = _entries(columns, column[entry])
        smaller = torch.minimum(value[entry][pair], weights[other])
        shared = smaller.new_zeros(len(rows), gallery)
        shared.view(-1).index_add_(0, query[pair] * gallery + others[other], smaller)
        yield rows, shared


def _entries(keys, wanted):
    """Where numbers stand in the ascending `keys`, once or more: their place in `wanted`, and that in `keys`."""
    start = torch.searchsorted(keys, wanted)
    count = torch.searchsorted(keys, wanted, right=True) - start
    place = torch.repeat_interleave(count)
    return place, torch.arange(len(place), device=keys.device) + (start - count.cumsum(0) + count)[place]
