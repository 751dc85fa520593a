"""Ranking: how well a gallery is ordered for its queries, and k-reciprocal re-ranking, which orders it anew.

Person re-identification (Zheng et al., ICCV 2015, Market-1501). Junk (identity -1) and what shows the query's identity in the
query's own camera leave the gallery first; r_1 < ... < r_R are the ranks of a query's R matches in what is left:

    CMC(k) = mean over queries of [r_1 <= k]
    mAP    = mean over queries of 1/R sum_i i / r_i             (no interpolation; the first Matlab tool took trapezoids)
    mINP   = mean over queries of R / r_R                       Ye et al., TPAMI 2021

Image retrieval (Musgrave et al., ECCV 2020). Every image is a query for the R others of its class, among all others:

    Recall@K    = mean over queries of [r_1 <= K]               (not the recall of information retrieval)
    R-precision = mean over queries of 1/R |{i: r_i <= R}|
    MAP@R       = mean over queries of 1/R sum_{i: r_i <= R} i / r_i

Re-ranking (Zhong et al., CVPR 2017), over the images of query and gallery together, d being squared Euclidean distances, each
row divided by its largest:

    N(i, k)  = i and its k nearest others,   R(i, k) = {j in N(i, k): i in N(j, k)}
    R*(i)    = R(i, k1) and every R(c, k1/2), c in R(i, k1), of which more than 2/3 lie in R(i, k1)
    V_ij     = exp(-d_ij) for j in R*(i), else 0; divided by its sum, then averaged over the first k2 images of N(i, .)
    d*       = (1 - lam) (1 - sum_j min(V_ij, V_lj) / sum_j max(V_ij, V_lj)) + lam d_il

A query without a match has no rank: it is left out of the means, and counted. Of equal distances the lower index ranks first,
on every device. Released code of re-ranking holds several matrices of all images by all images, one of them in half precision,
and sorts them whole; here rows are made in chunks, k1 of them are kept, and V is sparse. The result is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

KS = (1, 2, 4, 8)  # of Recall@K, as usual on CUB-200-2011
JUNK = -1  # identity of gallery images that are neither right nor wrong
CHUNK = 2**20  # numbers in work at a time: rows enough for a matrix product near full speed
CACHED = 2**18  # and where nothing is multiplied: they stay in the cache (twice as fast, measured)
LAST = torch.iinfo(torch.int64).max  # ranks behind every distance
TINY = 1e-30


@dataclass(frozen=True)
class Ranking:
    """How well a gallery is ordered, as shares in 0..1: means over the queries that have a match."""

    cmc: Float64[Tensor, " ranks"]  # CMC(1), CMC(2), ...
    map: float
    minp: float
    queries: int  # that have a match
    without_match: int  # the others
    average_precision: Float64[Tensor, " q"]  # of every query; NaN without a match


@dataclass(frozen=True)
class Retrieval:
    """How well images find the others of their class, as shares in 0..1: means over the images that have such others."""

    recall: dict[int, float]  # Recall@K for each K
    r_precision: float
    map_at_r: float
    queries: int  # images that are not the only one of their class
    without_match: int  # the others
    average_precision: Float64[Tensor, " n"]  # at R, of every image; NaN without a match


@torch.no_grad()
def cmc_map(
    distances: Float[Tensor, "q g"],
    query_ids: Int[Tensor, " q"],
    gallery_ids: Int[Tensor, " g"],
    query_cameras: Int[Tensor, " q"],
    gallery_cameras: Int[Tensor, " g"],
    ranks: int = 50,
) -> Ranking:
    """CMC, mAP and mINP of person re-identification, as defined above.

    Args:
        distances: of queries to the gallery; only their order counts, in float32.
        query_ids, gallery_ids: identities. -1 is junk; one that no query has is a distractor and stays, as a wrong answer.
        ranks: length of the CMC curve, which stays flat behind the end of a gallery that is shorter.
    Raises:
        ValueError: no query has a match, or a distance is NaN.
    """
    device, parts = distances.device, [torch.zeros(3, 0, dtype=torch.float64, device=distances.device)]
    query_ids, query_cameras = query_ids.to(device)[:, None], query_cameras.to(device)[:, None]
    gallery_ids, gallery_cameras = gallery_ids.to(device), gallery_cameras.to(device)
    for rows in _chunks(*distances.shape, CACHED, device) if distances.numel() else ():
        same = query_ids[rows] == gallery_ids
        kept = ~(same & (query_cameras[rows] == gallery_cameras)) & (gallery_ids != JUNK)
        parts.append(_match_figures(_keys(distances[rows]), same & kept, kept))
    first, precision, inverse = torch.cat(parts, 1)
    valid = first > 0
    if not valid.any():
        raise ValueError(
            f"None of {len(distances)} queries has a match: a gallery image of its identity from another camera. "
            "Are all images from one camera, or do query and gallery number identities differently?"
        )
    cmc = (first[valid, None] <= torch.arange(1, ranks + 1, device=device)).double().mean(0)
    return Ranking(
        cmc.cpu(),
        float(precision[valid].mean()),
        float(inverse[valid].mean()),
        int(valid.sum()),
        int((~valid).sum()),
        torch.where(valid, precision, torch.nan).cpu(),
    )


def retrieval(features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], ks: Sequence[int] = KS) -> Retrieval:
    """Recall@K, R-precision and MAP@R of images that are query and gallery in one, as defined above; none finds itself.

    Args:
        features: compared by Euclidean distance: scale them to length 1 first if the model compares directions.
        labels: class of each image.
    Raises:
        ValueError: no class has two images, or a feature is NaN.
    """
    labels = labels.to(features.device)
    _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
    matches = sizes[number] - 1  # R of each image
    valid = matches > 0
    if not valid.any():
        raise ValueError(
            f"None of {len(labels)} images has another one of its class, so there is nothing to find. "
            "Retrieval is measured on classes of two images and more."
        )
    depth = min(max(*ks, int(matches.max())), len(labels) - 1)
    hit = labels[nearest(features, None, depth)] == labels[:, None]  # n depth
    rank = torch.arange(1, depth + 1, device=labels.device)
    counted = hit & (rank <= matches[:, None])
    precision = torch.where(counted, hit.cumsum(1) / rank, 0.0).double().sum(1) / matches
    recall = {k: float(hit[valid, :k].any(1).double().mean()) for k in ks}
    return Retrieval(
        recall,
        float((counted.sum(1) / matches)[valid].double().mean()),
        float(precision[valid].mean()),
        int(valid.sum()),
        int((~valid).sum()),
        torch.where(valid, precision, torch.nan).cpu(),
    )


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
    there = len(query) - 1 if gallery is None else len(gallery)
    if not 1 <= count <= there:
        raise ValueError(
            f"{count} nearest images were asked for, but there are {there} to search among. Ask for at least "
            "one and at most all of them."
        )
    parts = [torch.zeros(0, count, dtype=torch.long, device=query.device)]
    for rows, distance in _distances(query.float(), (query if gallery is None else gallery).float()):
        if gallery is None:
            distance[rows - rows[0], rows] = torch.inf
        parts.append(_lowest(distance, count))
    return torch.cat(parts)


@torch.no_grad()
def rerank(
    query: Float[Tensor, "q k"], gallery: Float[Tensor, "g k"], k1: int = 20, k2: int = 6, lam: float = 0.3
) -> Float32[Tensor, "q g"]:
    """Distances d* after k-reciprocal re-ranking  (Zhong et al., CVPR 2017), as defined above: exact, sparse and in chunks.

    It looks at all queries at once, so its figures are transductive: report them apart. It helps where k1 is about the number
    of true matches in the gallery; with far fewer of them, a neighbourhood fills with what only looks alike.

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
    images, queries, device = len(features), len(query), features.device
    count = min(max(k1 + 1, k2), images)
    neighbours = torch.empty(images, count, dtype=torch.long, device=device)
    largest = torch.empty(images, device=device)
    result = torch.empty(queries, len(gallery), device=device)
    for rows, distance in _distances(features, features):
        largest[rows] = distance.amax(1).clamp_min_(TINY)  # 0 if all images are the same
        probes = rows[rows < queries]  # queries come first
        result[probes] = distance[: len(probes), queries:] * (lam / largest[probes, None])
        distance[rows - rows[0], rows] = -1  # nothing is nearer than the image, not even its copy
        neighbours[rows] = _lowest(distance, count)
    near, close = (
        _mutual(neighbours[:, : k + 1]) for k in (k1, round(k1 / 2))
    )  # half of 25 is 12, as in released code
    encoding = _average(_encode(features, near, close, largest), neighbours[:, :k2])
    for rows, shared in _overlaps(encoding, queries):
        result[rows] += (1 - lam) * (1 - shared / (2 - shared))  # sum of maxima = 2 - sum of minima
    return result


def _chunks(count: int, size: int, most: int, device: torch.device) -> tuple[Int64[Tensor, " rows"], ...]:
    """The numbers 0..count - 1 in parts of at most `most` numbers in work, where each of them stands for a row of `size`."""
    return torch.arange(count, device=device).split(max(1, most // max(1, size)))


def _distances(
    query: Float32[Tensor, "q k"], gallery: Float32[Tensor, "g k"]
) -> Iterator[tuple[Int64[Tensor, " rows"], Float32[Tensor, "rows g"]]]:
    """Squared Euclidean distances, as numbers of some queries and their rows."""
    centre, same = gallery.mean(0), query is gallery  # |a|^2 - 2ab + |b|^2 loses least around zero
    gallery = gallery - centre
    query = gallery if same else query - centre
    lengths, far = query.square().sum(1), gallery.square().sum(1)
    for rows in _chunks(len(query), len(gallery), CHUNK, query.device):
        with torch.autocast(query.device.type, enabled=False):  # fp32 island: differences of large numbers
            products = torch.addmm(far, query[rows], gallery.T, alpha=-2)
        yield rows, products.add_(lengths[rows, None]).clamp_min_(0)


def _keys(distances: Float[Tensor, "q g"]) -> Int64[Tensor, "q g"]:
    """Numbers in the order of the distances in float32, all different in a row: of equal distances the first has the lowest.

    Upper half: a float's bits as an integer, which are in the order of the floats if those of negative ones are turned over.
    Lower half: the index.
    """
    if distances.numel() and distances.amax().isnan():
        raise ValueError(
            "Distances that are NaN have no order. Look at the features: a division by the norm of a zero vector, "
            "or a training that diverged, are the usual causes."
        )
    bits = (distances.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= bits >> 31 & 0x7FFFFFFF
    return bits.long().bitwise_left_shift_(32).add_(torch.arange(distances.shape[1], device=distances.device))


def _lowest(distances: Float[Tensor, "q g"], count: int) -> Int64[Tensor, "q count"]:
    """Indices of the smallest distances of each row in ascending order, the lower index first among equals."""
    return _keys(distances).topk(count, 1, largest=False).values & 0xFFFFFFFF


def _match_figures(
    keys: Int64[Tensor, "q g"], hit: Bool[Tensor, "q g"], kept: Bool[Tensor, "q g"]
) -> Float64[Tensor, "3 q"]:
    """Rank of the first match, average precision, and R / rank of the last match; zeros for a query without a match."""
    count = hit.sum(1, keepdim=True)
    most = max(1, int(count.max()))
    matches = torch.where(hit, keys, LAST).topk(most, 1, largest=False).values  # q most, ascending
    keys = torch.where(kept, keys, LAST)
    if keys.device.type == "cpu":  # numpy sorts with vector instructions: 8 times faster
        keys = torch.from_numpy(np.sort(keys.numpy(), 1))
    else:
        keys = keys.sort(1).values
    ranks = torch.searchsorted(keys, matches).double() + 1
    number = torch.arange(1, most + 1, device=keys.device)
    precision = torch.where(number <= count, number / ranks, 0.0)  # up to each match
    first, last = torch.where(count > 0, ranks, 0.0)[:, 0], torch.where(number == count, precision, 0.0).sum(1)
    return torch.stack((first, precision.sum(1) / count[:, 0].clamp_min(1), last))


class _Sparse(NamedTuple):
    """A sparse matrix: row i holds the entries start_i .. start_i + count_i - 1."""

    start: Int64[Tensor, " n"]
    count: Int64[Tensor, " n"]
    column: Int64[Tensor, " entries"]
    value: Float32[Tensor, " entries"]


def _sparse(
    row: Int64[Tensor, " entries"], column: Int64[Tensor, " entries"], value: Float32[Tensor, " entries"], n: int
) -> _Sparse:
    """The matrix of n rows with these entries, which come row by row."""
    count = row.bincount(minlength=n)
    return _Sparse(count.cumsum(0) - count, count, column, value)


def _entries(matrix: _Sparse, rows: Int64[Tensor, " r"]) -> tuple[Int64[Tensor, " entries"], Int64[Tensor, " entries"]]:
    """All entries of some rows, which may come more than once: the place in `rows`, and the number of the entry."""
    start, count = matrix.start[rows], matrix.count[rows]
    place = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    return place, torch.arange(len(place), device=rows.device) + (start - count.cumsum(0) + count)[place]


def _mutual(neighbours: Int64[Tensor, "n k"]) -> Int64[Tensor, "n k"]:
    """R(i, k): of the neighbours of each image, those that have it among theirs; -1 in the place of the others."""
    parts = []
    for rows in _chunks(len(neighbours), neighbours.shape[1] ** 2, CACHED, neighbours.device):
        mutual = (neighbours[neighbours[rows]] == rows[:, None, None]).any(2)
        parts.append(torch.where(mutual, neighbours[rows], -1))
    return torch.cat(parts)


def _encode(
    features: Float32[Tensor, "n k"],
    near: Int64[Tensor, "n j"],
    close: Int64[Tensor, "n h"],
    largest: Float32[Tensor, " n"],
) -> _Sparse:
    """V: exp(-d) of the members of R* of each image, divided by its sum. near is R(i, k1), close is R(i, k1/2)."""
    (images, channels), parts = features.shape, []
    for rows in _chunks(images, near.shape[1] ** 2 * close.shape[1], CHUNK, features.device):
        own = near[rows]  # b j
        theirs = torch.where(own[..., None] < 0, -1, close[own])  # b j h, of every candidate c
        real = theirs >= 0
        inside = (theirs[..., None] == own[:, None, None]).any(3) & real
        joins = 3 * inside.sum(2, keepdim=True) > 2 * real.sum(2, keepdim=True)
        members = torch.cat((own, torch.where(joins, theirs, -1).flatten(1)), 1)
        place, at = (members >= 0).nonzero(as_tuple=True)
        pairs = (rows[place] * images + members[place, at]).unique()
        row, column = pairs // images, pairs % images
        distance = torch.cat(
            [
                torch.linalg.vector_norm(
                    features.index_select(0, row[some]).sub_(features.index_select(0, column[some])), dim=1
                )
                for some in _chunks(len(pairs), channels, CACHED, features.device)
            ]
        )
        value = torch.exp(-distance.square() / largest[row])
        place = row - rows[0]
        total = value.new_zeros(len(rows)).index_add_(0, place, value)
        parts.append((row, column, value / total[place]))
    return _sparse(*map(torch.cat, zip(*parts)), images)


def _average(matrix: _Sparse, first: Int64[Tensor, "n k2"]) -> _Sparse:
    """The mean of the rows that `first` names for each row."""
    (images, k2), parts = first.shape, []
    for rows in _chunks(images, k2 * (1 + len(matrix.column) // images), CACHED, first.device):
        place, entry = _entries(matrix, first[rows].flatten())
        pairs, where = (rows[place // k2] * images + matrix.column[entry]).unique(return_inverse=True)
        value = matrix.value.new_zeros(len(pairs)).index_add_(0, where, matrix.value[entry] / k2)
        parts.append((pairs // images, pairs % images, value))
    return _sparse(*map(torch.cat, zip(*parts)), images)


def _overlaps(matrix: _Sparse, queries: int) -> Iterator[tuple[Int64[Tensor, " rows"], Float32[Tensor, "rows g"]]]:
    """Numbers of some queries, and sum_j min(V_ij, V_lj) with each image l of the gallery. Zeros are never looked at."""
    images, device = len(matrix.start), matrix.start.device
    gallery = images - queries
    place, entry = _entries(matrix, torch.arange(queries, images, device=device))
    order = matrix.column[entry].argsort(stable=True)
    entry = entry[order]
    columns = _sparse(matrix.column[entry], place[order], matrix.value[entry], images)  # the gallery's part, transposed
    place, entry = _entries(matrix, torch.arange(queries, device=device))
    cost = columns.count.new_full((queries,), gallery).index_add_(0, place, columns.count[matrix.column[entry]])
    sizes = (cost.cumsum(0) // CHUNK).unique_consecutive(return_counts=True)[1]
    for rows in torch.arange(queries, device=device).split(sizes.tolist()):
        query, entry = _entries(matrix, rows)
        pair, other = _entries(columns, matrix.column[entry])
        smaller = torch.minimum(matrix.value[entry][pair], columns.value[other])
        shared = smaller.new_zeros(len(rows) * gallery).index_add_(
            0, query[pair] * gallery + columns.column[other], smaller
        )
        yield rows, shared.view(len(rows), gallery)
