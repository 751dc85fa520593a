"""Learners: a network with a loss on its pooled features, trained as a whole or from its last block on.

Shen et al. train "softmax-based models" and "distance-based metric learning models" (section 3) and say no more. Here
each loss stands on the pooled features that Dist-CAM compares, with no embedding layer after them. Metric losses see P
classes of K images in a batch (Hermans et al., 2017). BatchNorm keeps its statistics unless the weights start from
random ones: those of a small batch of few classes are not those of the data. Among several processes each one compares
the classes of its own share.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Sampler

from course_lib.backbones import Backbone
from course_lib.metric_learning.features import freeze_trunk, tail
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax, center_loss

SCALE = 128.0  # of a mean over channels, so that a distance means the same at 512 and 2048 channels
COSINE_SCALE = 30.0
CENTER_WEIGHT, CENTER_RATE = 5e-4, 0.5  # as in Luo et al., "Bag of Tricks", CVPR Workshops 2019

# Named loss terms of (learner, pooled features b k, labels b).
Terms = Callable[["Learner", Tensor, Tensor], dict[str, Tensor]]


def _prototype(metric):
    def terms(learner, query, labels):  # query b k, labels b
        scale = COSINE_SCALE if metric == "cosine" else SCALE / query.shape[1]
        return {"prototype": batch_prototype_softmax(query, labels, metric, scale)}

    return terms


LOSSES: dict[str, Terms] = {
    # Eq. 1 and 2 (Shen et al.)
    "softmax": lambda learner, query, labels: {"softmax": F.cross_entropy(learner.backbone.classifier(query), labels)},
    **{f"prototype-{metric}": _prototype(metric) for metric in ("l1", "l2", "cosine")},
    "triplet": lambda learner, query, labels: {"triplet": batch_hard_triplet(query, labels)},
    "center": lambda learner, query, labels: {
        **LOSSES["softmax"](learner, query, labels),
        "center": CENTER_WEIGHT * center_loss(query, labels, learner.centers),
    },
}
CLASSIFYING = ("softmax", "center")  # the losses that train the classifier
# Learning rates at which fine-tuning moves and no more: with triplets at 0.01 most channels die and the rest saturate.
RATES = dict.fromkeys(LOSSES, 1e-3) | {"softmax": 1e-2, "center": 1e-2, "triplet": 3e-4}
# Losses of (embeddings b d of length 1, labels b).
EMBEDDING_LOSSES = {
    "triplet": partial(batch_hard_triplet, margin=0.1),
    "prototype-cosine": partial(batch_prototype_softmax, metric="cosine", scale=COSINE_SCALE),
}


class Learner(nn.Module):
    """A backbone with its loss. `terms` may be a function of one's own, around a loss of pytorch-metric-learning, say.

    Args:
        terms: named loss terms of (learner, pooled features, labels), as in LOSSES.
        last_block: images are features of the `trunk`, and everything in front of `tail` is frozen.
        frozen_statistics: BatchNorm normalises by what it has learnt before.
    """

    def __init__(
        self,
        backbone: Backbone,
        terms: Terms,
        num_classes: int,
        last_block: bool = False,
        frozen_statistics: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.terms, self.last_block = backbone, terms, last_block
        self.frozen_statistics = frozen_statistics
        backbone.requires_grad_(True)
        if last_block:
            freeze_trunk(backbone)
        backbone.classifier.requires_grad_(terms in [LOSSES[name] for name in CLASSIFYING])
        if terms is LOSSES["center"]:
            self.centers = nn.Parameter(torch.zeros(num_classes, backbone.classifier.in_features))

    def train(self, mode: bool = True) -> "Learner":
        """Training mode, apart from statistics that are frozen."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d) and self.frozen_statistics:
                part.eval()
        return self

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss terms of one batch: uint8 images, or features of the trunk."""
        backbone = self.backbone
        features = tail(backbone, images) if self.last_block else backbone.features(backbone.normalise(images))
        return self.terms(self, features.mean((-2, -1)), labels)


class BalancedBatches(Sampler[list[int]]):
    """Batches of `classes` random classes with `images` random images of each, one class after the other.

    As many as make up the data set. No image comes twice in a batch, unless its class has fewer than `images`.

    Args:
        generator: the engine seeds it anew for each epoch.
    """

    def __init__(self, labels: Int[Tensor, " n"], classes: int, images: int, generator: Generator):
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        if classes > len(self.members):
            raise ValueError(
                f"Batches of {classes} classes were asked for, but the data has {len(self.members)}. "
                "Ask for fewer classes and more images of each."
            )
        self.classes, self.images, self.generator = classes, images, generator
        self.batches = max(1, len(labels) // (classes * images))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.batches):
            batch = []
            for label in torch.randperm(len(self.members), generator=self.generator)[: self.classes]:
                members = self.members[label]
                if len(members) < self.images:
                    pick = torch.randint(len(members), (self.images,), generator=self.generator)
                else:
                    pick = torch.randperm(len(members), generator=self.generator)[: self.images]
                batch += members[pick].tolist()
            yield batch


def linear_probe(
    features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], num_classes: int, decay: float = 1e-3
) -> tuple[Float32[Tensor, "c k"], Float32[Tensor, " c"]]:
    """Weight and bias of the classifier that minimises cross-entropy + decay / 2 |weight|^2.

    It gives CAM to networks without a classifier. The problem is convex, and L-BFGS in float64 finds its one solution.
    In it the weights of all classes sum to zero (else a row taken from all of them would shrink the penalty and change
    no prediction), so that CAM is centred as it stands.

    Args:
        decay: enough to leave CAM no free gauge.
    """
    features, labels = features.double(), labels.long()
    centre = features.mean(0)  # moves the bias only, and the solver is faster
    features = features - centre
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    weight, bias = weight.detach(), bias.detach()
    return weight.float(), (bias - weight @ centre).float()


def common_row(
    make: Callable[[Iterator[nn.Parameter]], Optimizer],
    features: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    steps: int = 30,
) -> float:
    """How far an optimiser drives the gauge of a CAM: |mean row| / mean |row| of a classifier trained from zero.

    The slopes of cross-entropy sum to zero over the classes, since probabilities sum to 1. What steps along them keeps
    the mean row of the weights at zero; what divides each slope by a size of its own does not.

    Args:
        make: the optimiser of the parameters, such as `lambda weights: torch.optim.SGD(weights, 0.1)`.
        steps: of all samples at once.
    """
    layer = nn.Linear(features.shape[1], num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = make(layer.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
    weight = layer.weight.detach()
    return (weight.mean(0).norm() / weight.norm(dim=1).mean()).item()


def embedding(model: Backbone, pooled: Float[Tensor, "n k"]) -> Float32[Tensor, "n d"]:
    """Embeddings of length 1 from pooled features, by the linear layer in the place of the classifier."""
    return F.normalize(model.classifier(pooled).float(), dim=1)  # fp32 island: a norm
