"""Few-shot episodes: N classes, K support samples each, and queries to be told apart; thousands of them at once.

    episodes = sample(labels, ways=5, shots=1, queries=15, episodes=10_000, generator=Generator().manual_seed(0))
    found = recalls(features, episodes, "cosine")                         # 10,000 episodes x 5 classes
    accuracy, margin = interval(found.mean(1))                            # mean and half of its 95% interval

Vinyals et al., NeurIPS 2016 (the task) and Snell et al., NeurIPS 2017 (nearest prototype). Features of all images are
made once; an episode is no more than rows of that table, so all of them are one index tensor and a few batched
products, cut into pieces that fit into a cache. The classes of an episode are numbered 0..N-1 in it.

A classifier is inductive if it answers each query for itself, and transductive if it sees all queries of the episode
before it answers one. The two do not compare: transductive ones learn from the queries how many there are of each
class, which is known in a benchmark (15 each) and hardly elsewhere. `queries=(15, 2, 2, 2, 2)` takes that away.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Generator, Tensor

from course_lib.prototypes import rectify, shift

CHUNK = 2**20  # numbers gathered at a time; what fits into a cache is faster (measured)


@dataclass(frozen=True)
class Episodes:
    """Which images make up each episode, as rows of the table of features."""

    support: Int[Tensor, "e n k"]  # K images of each of N classes
    query: Int[Tensor, "e q"]
    labels: Int[Tensor, "q"]

    def __len__(self) -> int:
        return len(self.query)


def sample(
    labels: Int[Tensor, " n"],
    ways: int,
    shots: int,
    queries: int | tuple[int, ...],
    episodes: int,
    generator: Generator,
) -> Episodes:
    """Episodes with random classes and random images of each, none twice in an episode.

    Args:
        labels: class of each image, on the CPU.
        queries: of each class; or of the first, second, ... class of an episode, which is any class of the data.
        generator: on the CPU. The same seed gives the same episodes.
    Raises:
        ValueError: too few classes, or a class with fewer images than an episode may ask of it.
    """
    counts = (queries,) * ways if isinstance(queries, int) else queries
    if len(counts) != ways or min(counts) < 0 or not sum(counts) or shots < 1:
        raise ValueError(
            f"Episodes have K > 0 support images and a number of queries for each of {ways} classes, but "
            f"K = {shots} and queries {counts} came. Give one number, or {ways} of them, such as 15,2,2,2,2."
        )
    classes, sizes = labels.unique(return_counts=True)
    if ways > len(classes):
        raise ValueError(
            f"Episodes of {ways} classes were asked for, but the data has {len(classes)}. Ask for fewer ways."
        )
    drawn = shots + max(counts)
    if (small := sizes < drawn).any():
        raise ValueError(
            f"An episode takes up to {drawn} images of a class ({shots} support, {max(counts)} queries), but class "
            f"{int(classes[small][0])} has {int(sizes[small][0])}, as have too few {int(small.sum())} of "
            f"{len(classes)} classes. Ask for fewer shots or queries, or leave these classes out."
        )
    members = labels.argsort(stable=True)  # the images of one class after those of another
    chosen = torch.rand(episodes, len(classes), generator=generator).topk(ways, 1).indices  # e n, in random order
    places = _distinct(sizes[chosen], drawn, generator)
    images = members[(sizes.cumsum(0) - sizes)[chosen][..., None] + places]  # e n drawn
    each = torch.tensor(counts)
    taken = torch.arange(max(counts)) < each[:, None]  # n drawn-k
    support, query = images[..., :shots].contiguous(), images[..., shots:][:, taken]
    return Episodes(support, query, torch.arange(ways).repeat_interleave(each))


def _distinct(sizes, drawn, generator):  # e n -> e n drawn
    """Different numbers below each of the sizes, in random order: Floyd's method, for all rows at once.

    Draw one of 0..j for j = size - drawn, ..., size - 1; what was drawn before becomes j. Six times faster than to
    shuffle the 600 images of each class in each episode (measured).
    """
    found = torch.empty(drawn, *sizes.shape, dtype=torch.long)
    for number, share in enumerate(torch.rand(drawn, *sizes.shape, dtype=torch.float64, generator=generator)):
        last = sizes - drawn + number
        pick = (share * (last + 1)).long()
        found[number] = torch.where((found[:number] == pick).any(0), last, pick)
    order = torch.rand(found.shape, generator=generator).argsort(0)  # Floyd's own order is not random
    return found.gather(0, order).movedim(0, -1)


# Scores e n q (the largest wins) of support e n k d and query e q d. Those of DIRECTIONS get features of length 1.
Scores = Callable[..., Tensor]


def _prototypes(support):
    return support.mean(2) if support.shape[2] > 1 else support[:, :, 0]  # a mean over one costs a seventh of it all


def _l2(support, query):
    prototypes = _prototypes(support)  # -|q - P|^2 / 2, without the |q|^2 of all classes
    return prototypes @ query.mT - prototypes.norm(dim=-1, keepdim=True).square() / 2


def _cosine(support, query):
    return F.normalize(_prototypes(support), dim=-1) @ query.mT  # the length of a query is the same for all classes


def _rectified(support, query, surest=8, epsilon=10.0):
    ways, shots = support.shape[1:3]
    labels = torch.arange(ways, device=support.device).repeat_interleave(shots)
    support = support.flatten(1, 2)
    query = shift(support, query)
    return F.normalize(rectify(support, labels, query, ways, surest, epsilon), dim=-1) @ query.mT


CLASSIFIERS: dict[str, Scores] = {
    "l1": lambda support, query: -torch.cdist(_prototypes(support), query, 1.0),
    "l2": _l2,
    "cosine": _cosine,
    "shift": lambda support, query: _cosine(support, shift(support.flatten(1, 2), query)),
    "rectified": _rectified,
}
DIRECTIONS = ("cosine", "shift", "rectified")
TRANSDUCTIVE = ("shift", "rectified")


def logistic(
    support: Float[Tensor, "e n k d"], query: Float[Tensor, "e q d"], penalty: float = 1.0, steps: int = 100
) -> Float[Tensor, "e n q"]:
    """Scores of a logistic regression fitted to the support samples of each episode: the simple inductive baseline.

    Tian et al., "Rethinking Few-Shot Image Classification", ECCV 2020: on frozen features of length 1 it is hard to
    beat. Without a bias, since every class has as many samples. It minimises the sum of the cross-entropies + penalty /
    2 |W|^2, as scikit-learn does with C = 1 / penalty. The rows of W are sums of support samples, so that accelerated
    gradient descent works on the products of the few samples, for all episodes at once.

    Args:
        support, query: scaled to length 1 before; pass this function to `recalls` with such a table.
        penalty: 1 is scikit-learn's default, and that of Tian et al.
        steps: of the descent; after 100 the scores differ from the solution by less than 1e-4 for penalties from 0.1.
    """
    if not penalty > 0:
        raise ValueError(f"Expected a penalty above 0, got {penalty}; without one the weights grow for ever.")
    ways, shots = support.shape[1:3]
    rows = support.flatten(1, 2)  # e s d
    inner = rows @ rows.mT  # e s s
    target = torch.eye(ways, device=rows.device).repeat_interleave(shots, 0)  # s n
    curvature = (inner.abs().sum(-1).amax(-1) / 2 + penalty)[:, None, None]  # the most that the slope may change
    root = (curvature / penalty).sqrt()
    share = ahead = rows.new_zeros(*rows.shape[:2], ways)  # of the support samples in the rows of W, e s n
    for _ in range(steps):
        slope = (inner @ ahead).softmax(-1) - target + penalty * ahead
        before, share = share, ahead - slope / curvature
        ahead = share + (root - 1) / (root + 1) * (share - before)
    return share.mT @ rows @ query.mT


def dirichlet_counts(
    ways: int, queries: int, number: int, generator: Generator, concentration: int = 2, most: int | None = None
) -> list[tuple[int, ...]]:
    """Numbers of queries of each class, `number` times: their shares are drawn from a Dirichlet distribution.

    Veilleux et al., "Realistic Evaluation of Transductive Few-Shot Learning", NeurIPS 2021, take a concentration of 2:
    classes of any share, most of them neither empty nor alone.

    Args:
        queries: in all, of an episode.
        concentration: a whole number; the larger the more even.
        most: draws with more queries of a class (than there are images, say) are drawn again; None: all are taken.
    Raises:
        ValueError: fewer queries allowed than asked for.
    """
    most = queries if most is None else most
    if most * ways < queries:
        raise ValueError(f"Expected {queries} queries of {ways} classes, got {most} of a class at most; ask for fewer.")
    found: list[tuple[int, ...]] = []
    while len(found) < number:
        gamma = torch.empty(ways, concentration).exponential_(generator=generator).sum(1)
        ends = (gamma.cumsum(0) / gamma.sum() * queries).round().long()
        counts = ends.diff(prepend=ends.new_zeros(1))
        if counts.max() <= most:
            found.append(tuple(counts.tolist()))
    return found


def uneven_gains(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], others: list[int], episodes: int = 200, **options: float
) -> tuple[list[float], int | None]:
    """What rectification gains over the cosine in 5-way 1-shot episodes of 15 queries of one class and fewer of others.

    Args:
        others: numbers of queries of each other class. Every one has its own episodes, from a generator that starts
            at 0.
        options: of "rectified", as in `recalls`.
    Returns:
        for each number the mean gain in points, of accuracies that weigh all classes equally; and the smallest number
        at which it gains, None if it does at none.
    """
    gains = []
    for count in others:
        drawn = sample(labels, 5, 1, (15, *[count] * 4), episodes, Generator().manual_seed(0))
        after, before = recalls(features, drawn, "rectified", **options), recalls(features, drawn, "cosine")
        gains.append(100 * (after - before).mean().item())
    return gains, min((count for count, gain in zip(others, gains) if gain > 0), default=None)


@torch.no_grad()
def recalls(
    features: Float[Tensor, "n d"], episodes: Episodes, method: str | Scores, **options: int | float
) -> Float32[Tensor, "e ways"]:
    """Share of the queries of each class that are classified correctly, in each episode; NaN for one without queries.

    Its mean over classes is the accuracy if all classes have as many queries, and the balanced accuracy otherwise; the
    share of all queries is `accuracies`. Scores that are equal count for the first of the classes.

    Args:
        features: pooled features of all images, on any device.
        method: a name of CLASSIFIERS, or a function of one's own from (support e n k d, query e q d) to scores e n q.
        options: of the method: "rectified" has `surest` and `epsilon`, as `prototypes.rectify`.
    """
    if isinstance(method, str) and method not in CLASSIFIERS:
        raise ValueError(f"There is no method {method!r}; there are: {', '.join(CLASSIFIERS)}.")
    scores = CLASSIFIERS.get(method, method)
    table = F.normalize(features.float(), dim=1) if method in DIRECTIONS else features.float()
    labels = episodes.labels.to(table.device)
    ways, shots = episodes.support.shape[1:]
    share = F.one_hot(labels, ways).float()
    share = share / share.sum(0)  # q n
    step = max(1, CHUNK // ((ways * shots + len(labels)) * table.shape[1]))
    rows = table.new_empty(step * len(labels), table.shape[1])  # the same place for each piece stays in the cache
    parts = []
    for support, query in zip(*(part.to(table.device).split(step) for part in (episodes.support, episodes.query))):
        gathered = torch.index_select(table, 0, query.flatten(), out=rows[: query.numel()]).view(*query.shape, -1)
        found = scores(F.embedding(support, table), gathered, **options)
        parts.append(found.max(1).indices)  # argmax: ten times slower
    right = torch.cat(parts) == labels  # e q
    return right.float() @ share


def accuracies(recalls: Float[Tensor, "e n"], labels: Int[Tensor, " q"]) -> Float32[Tensor, " e"]:
    """Share of all queries of each episode that are classified correctly, from the `recalls` of classes."""
    counts = labels.to(recalls.device).bincount(minlength=recalls.shape[1])
    return recalls.nan_to_num() @ (counts / counts.sum())


def interval(values: Float[Tensor, " e"]) -> tuple[float, float]:
    """Mean over episodes and half of its 95% interval, 1.96 std / sqrt(E).

    It covers the choice of episodes from these images by one model: no other training, no other classes.
    """
    values = values.double()
    spread = values.std() if len(values) > 1 else torch.tensor(torch.nan)
    return values.mean().item(), (1.96 * spread / len(values) ** 0.5).item()
