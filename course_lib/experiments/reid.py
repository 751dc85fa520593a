"""Person re-identification: the protocol of Market-1501, and what each trick of the strong baseline brings.

    python -m course_lib train reid --backbone resnet50 --data /data/market1501 --folder runs/market
    python -m course_lib evaluate reid --checkpoint runs/market/model.safetensors --data /data/market1501
    python -m course_lib train reid --ablation --folder runs/ablation          one training and one row for each trick
    python -m course_lib train reid --last-block --loss prototype-cosine --tricks none --classes 8 --epochs 20 \
        --folder runs/dolls

Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPR Workshops 2019: one global
feature, and six tricks that add up. CMC, mAP and k-reciprocal re-ranking are in `evaluate.ranking`.

    f_t = GAP(F)                    compared in training: triplet and center loss, Euclidean
    f_i = BN(f_t), its bias         "BNNeck": classified, logits = W f_i without a bias;
          frozen at zero            compared in tests, by cosine
    L   = L_ID + L_triplet + 5e-4 L_center

    warmup        the learning rate grows over 10 epochs; it falls to 1/10 at epoch 40 and at 70 of 120
    smoothing     L_ID with targets 0.9 one-hot + 0.1 / C
    bnneck        as above; without it, f_i is f_t
    center        L_center on f_t; centers learn at a rate of their own
    photographs   resize to 256 x 128, flip, pad 10 (black) and crop, normalise, erase           section 3.2
    erasing       in half of them, one rectangle of 2-40 % of the area                           Zhong et al., AAAI 2020
    stride        the last stride is 1: a map of 16 x 8 cells, not 8 x 4

Followed is the released code where it differs from the paper: the learning rate falls at the start of epochs 40 and
70, not after them. Different here: the stem keeps its ReLU, which the released network lost (its authors found no
difference); batches draw identities anew instead of using every image once an epoch. A training of other than 120
epochs stretches the schedule.

Batch-hard triplets can collapse a pretrained network into one point where identities differ in little.
"prototype-cosine", the class means of the batch as prototypes of f_i, does not; it has no classifier, so smoothing and
center loss do not take part.

Rectangles follow the baseline's released code: an aspect ratio (height over width) uniform in 0.3..3.33, at most 100
tries until one is smaller than the image in both directions, filled with the pixel mean *after* normalisation: about
half a standard deviation brighter than the mean colour, which would be 0. torchvision's `v2.RandomErasing` draws the
logarithm of the aspect ratio uniformly and gives up after 10 tries, which no option changes; its defaults are an area
of 2-33 % and a fill of 0. Workers draw the rectangle, the device fills it, so that images travel as bytes.

Compared are f_i of length 1. Where there is a neck, a row of f_t stands beside it: on a few hundred dolls the neck made
f_t better, and f_i compared worse than f_t (one random seed). Rows without a neck compare by cosine too, so that a row
differs from the one before by its trick alone. Shen et al. give 94.5 and 85.9 for "center loss and reranking"; these
are the figures of Luo et al. for the center loss *before* re-ranking. Re-ranking looks at the other queries as well: it
is a row of its own. Its k1 is to be about the number of images of a person, of which queries and the query's own camera
are a part: 22 on Market-1501, where 20 is usual. The number is printed beside it.
"""

import hashlib
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Float32, Int, UInt8
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.v2.functional import crop, resize

from course_lib import checkpoints, engine
from course_lib.backbones import Backbone
from course_lib.data.market1501 import Market1501
from course_lib.data.miniature import fingerprint
from course_lib.data.wrappers import Changed, Images
from course_lib.evaluate.ranking import cosine_distances, rerank
from course_lib.experiments import shared
from course_lib.lesson import versions
from course_lib.metric_learning.features import extract, freeze_trunk, tail, trunk
from course_lib.metric_learning.learner import CENTER_RATE, CENTER_WEIGHT, BalancedBatches
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax, center_loss
from course_lib.metric_learning.pedestrians import market_scores
from course_lib.published import REID_TRICKS
from course_lib.settings import Count, NotNegative, Positive, RandomSeed, Several, Share, Side, Workers, check_settings
from course_lib.worlds import minis

TRICKS = ("warmup", "erasing", "smoothing", "stride", "bnneck", "center")  # in the order of the paper's ablation
REID_RATES = {"id+triplet": 3.5e-4, "prototype-cosine": 1e-3}  # losses and their learning rates
MARGIN, SMOOTHING, PROTOTYPE_SCALE = 0.3, 0.1, 16.0
SCHEDULE, WARMUP, DROPS = 120, 10, (40, 70)  # epochs, and the first ones of a tenth of the rate (counted from 1)
PADDING = 10
PROBABILITY, AREA, ASPECT, TRIES = 0.5, (0.02, 0.4), (0.3, 1 / 0.3), 100  # of random erasing
BEFORE = "before the neck"  # row of f_t


def named_tricks(tricks: tuple[str, ...]) -> tuple[str, ...]:
    """What is meant by "none", "all", "stride" (it and all in front of it), or "erasing center" (just these)."""
    known = {"none": (), "all": TRICKS} | {trick: TRICKS[:count] for count, trick in enumerate(TRICKS, 1)}
    return known.get(" ".join(tricks), tricks)


@dataclass(frozen=True)
class ReidTraining:
    """What is trained, and how. The paper's figures are of resnet50 with all tricks."""

    data: str = ""  # folder in Market-1501's layout; "": the miniature mini-market-clothes
    backbone: str = "tf_efficientnet_lite0"  # or "resnet50", or another ResNet or EfficientNet of timm's
    weights: Literal["pretrained", "random"] = "pretrained"  # to start from
    # none, all, one of warmup erasing smoothing stride bnneck center (with those in front of it), or just some of them
    tricks: Annotated[tuple[str, ...], TRICKS, tyro.conf.arg(constructor=named_tricks)] = TRICKS
    loss: Annotated[str, tuple(REID_RATES)] = "id+triplet"  # or "prototype-cosine"
    last_block: bool = False  # train the last block only, on features of those before it, made once (for a CPU)
    epochs: Count = SCHEDULE  # others than 120 stretch the schedule
    classes: Several = 16  # P identities ...
    images: Count = 4  # ... of K images make a batch
    learning_rate: Positive | None = None  # None: the loss's own
    weight_decay: NotNegative = 5e-4
    size: tuple[Side, Side] = (256, 128)  # height and width of the images, pixels
    workers: Workers = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    device: str = "auto"  # or "cpu", "cuda"
    seed: RandomSeed = 0  # of weights that are new, and of the training

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Comparison:
    """How images are compared."""

    flip: bool = False  # add the mirror image's features
    k1: Count = 20  # re-ranking: size of a k-reciprocal neighbourhood, about as many as images of a person
    k2: Count = 6  # re-ranking: images whose neighbourhoods are averaged
    lam: Share = 0.3  # re-ranking: share of the original distance
    batch_size: Count = 8  # of the evaluation; on a CPU larger ones are slower, on a GPU take 64 or more

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ReidEvaluation(Comparison):
    """What is evaluated, on what, and how."""

    data: str = ""  # folder in Market-1501's layout; "": the miniature mini-market-clothes
    checkpoint: str = ""  # a model.safetensors of `train reid`; "": a network that has seen no pedestrian
    backbone: str = "tf_efficientnet_lite0"  # without a checkpoint
    weights: Literal["pretrained", "random"] = "pretrained"  # without a checkpoint
    workers: Workers = 0  # processes that read images
    device: str = "auto"  # or "cpu", "cuda"


class Baseline(nn.Module):
    """A backbone with neck, classifier and centers.

    Inputs are photographs (uint8) or, as floats, features of the `trunk` of an EfficientNet.

    Args:
        backbone: gets a new classifier. If the last block alone is trained, everything in front of `tail` is frozen,
            and so are statistics of BatchNorm, apart from the neck's.
    """

    def __init__(self, backbone: Backbone, num_classes: int, config: ReidTraining) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        channels, classifying = backbone.classifier.in_features, config.loss == "id+triplet"
        if config.last_block:
            freeze_trunk(backbone)
        neck = "bnneck" in config.tricks
        self.neck = nn.BatchNorm1d(channels) if neck else nn.Identity()
        backbone.classifier = nn.Linear(channels, num_classes, bias=not neck)
        if neck:
            self.neck.bias.requires_grad_(False)  # at zero; the optimiser does not get it
            nn.init.normal_(backbone.classifier.weight, std=0.001)
        backbone.classifier.requires_grad_(classifying)
        pulled = classifying and "center" in config.tricks
        self.centers = nn.Parameter(torch.randn(num_classes, channels)) if pulled else None

    def train(self, mode: bool = True) -> "Baseline":
        """Training mode, apart from statistics that are frozen."""
        super().train(mode)
        self.backbone.train(mode and not self.config.last_block)
        return self

    def feature_map(self, inputs: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b j H W"]) -> Float[Tensor, "b k h w"]:
        """The map F that is pooled: 8 x 4 cells for images of 256 x 128, 16 x 8 if the last stride is 1."""
        if inputs.dtype == torch.uint8:
            return self.backbone.features(self.backbone.normalise(inputs))
        return tail(self.backbone, inputs)

    def pool(self, inputs: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b j H W"]) -> Float32[Tensor, "b k"]:
        """f_t, the mean of the map. Behind the `neck` it is f_i."""
        return self.feature_map(inputs).float().mean((-2, -1))  # fp32 island: a mean, and distances of it

    def terms(self, pooled: Float32[Tensor, "b k"], labels: Int[Tensor, " b"]) -> dict[str, Float32[Tensor, ""]]:
        """Named loss terms of one batch, from f_t."""
        compared = self.neck(pooled)  # b k, f_i
        if self.config.loss == "prototype-cosine":
            return {"prototype": batch_prototype_softmax(compared, labels, "cosine", PROTOTYPE_SCALE)}
        logits = self.backbone.classifier(compared).float()  # b c
        smoothing = SMOOTHING if "smoothing" in self.config.tricks else 0.0
        terms = {
            "id": F.cross_entropy(logits, labels, label_smoothing=smoothing),
            "triplet": batch_hard_triplet(pooled, labels, MARGIN),
        }
        if self.centers is not None:
            terms["center"] = CENTER_WEIGHT * center_loss(pooled, labels, self.centers)
        return terms

    def step(self, batch: list[Tensor]) -> dict[str, Float32[Tensor, ""]]:
        """Named loss terms of one batch: inputs and labels."""
        inputs, labels = batch
        return self.terms(self.pool(inputs), labels)


def mirrored_features(model: Baseline, data: Market1501, progress: bool = True) -> Changed:
    """What the last block is trained on: features in front of it, of each image or of its mirror image by chance.

    Both are made once, where the model is: 49 KB an image for Lite0, 197 KB if its last stride is 1.
    """
    model.to(memory_format=torch.channels_last).eval()

    def both(images: Tensor) -> Tensor:  # b 2 j h w
        return torch.stack([trunk(model.backbone, one).contiguous() for one in (images, images.flip(-1))], 1)

    features = extract(both, data, model.config.size, device=model.backbone.mean.device, progress=progress)
    return Changed(TensorDataset(features, data.labels), _either)


def _either(pair: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return pair[int(torch.randint(2, ()))], label


def learning_rate_factor(config: ReidTraining, epoch: int) -> float:
    """The factor of the learning rate in an epoch, counted from 0.

    For the 120 epochs of the paper: 0.01 + 0.99 e/10 in the e-th epoch, e < 10, with warm-up, then 1, from the 40th on
    0.1, from the 70th on 0.01. Others are stretched to it; below 24 epochs hardly anything is left of the warm-up.
    """
    stretched = (epoch + 1) * SCHEDULE / config.epochs
    if "warmup" in config.tricks and stretched < WARMUP:
        return 0.01 + 0.99 * stretched / WARMUP
    return 0.1 ** sum(stretched >= drop for drop in DROPS)


def fit_baseline(
    model: Baseline,
    dataset: Dataset,
    labels: Int[Tensor, " n"],
    config: ReidTraining,
    folder: Path | None = None,
    progress: bool = True,
    step: engine.Step = Baseline.step,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch; the model is trained in place.

    Args:
        dataset: of (input of the model, label), such as `mirrored_features`; of something else if `step` takes that.
    """
    batches = BalancedBatches(labels, config.classes, config.images, Generator())
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=config.workers, pin_memory=torch.cuda.is_available()
    )
    trained = [weight for name, weight in model.named_parameters() if weight.requires_grad and name != "centers"]
    groups = [{"params": trained}]
    factors = [lambda step: learning_rate_factor(config, step // len(batches))]  # one for all steps of an epoch
    if model.centers is not None:
        # Adam without memory and with an epsilon that swallows the gradient is plain gradient descent of rate lr / eps:
        # the second optimiser of the released code. The factor before the loss is divided out again.
        rate = CENTER_RATE / CENTER_WEIGHT * 1e8
        groups.append({"params": [model.centers], "lr": rate, "eps": 1e8, "betas": (0.0, 0.0), "weight_decay": 0.0})
        factors.append(lambda step: 1.0)
    rate = config.learning_rate or REID_RATES[config.loss]
    optimizer = torch.optim.Adam(groups, rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed, device=config.device)
    return engine.train(model, step, loader, optimizer, plan, scheduler=scheduler, folder=folder, progress=progress)


@shared.owner("train reid")
def train(config: ReidTraining, folder: Path, progress: bool = True) -> list[dict[str, float]]:
    """Mean loss terms of each epoch; writes `model.safetensors`, see `load`. What was interrupted goes on.

    Warns if triplets have collapsed the features into one point.
    """
    process, data = engine.this_process(config.device), Market1501(config.data, "train")
    model = build(config, len(data.classes)).to(process.device)
    if config.last_block:
        dataset, step = mirrored_features(model, data, progress), Baseline.step
    else:
        erasing = PROBABILITY if "erasing" in config.tricks else 0.0
        dataset, step = Changed(data, partial(_augmented, size=config.size, erasing=erasing)), _photograph_step
    before = _spread(model, dataset)
    history = fit_baseline(model, dataset, data.labels, config, folder, progress, step)
    if config.loss == "id+triplet" and (after := _spread(model, dataset)) < min(MARGIN / 3, before / 10):
        warnings.warn(
            f"The features have collapsed: of 64 images, the two most different ones were {before:.2g} apart before "
            f"the training and are {after:.2g} now, while the triplet loss wants a margin of {MARGIN}. Take the loss "
            '"prototype-cosine", or a smaller learning rate.',
            stacklevel=2,
        )
    if process.is_main_process:
        about = {name: getattr(config, name) for name in ("backbone", "tricks", "loss", "size")}
        checkpoints.write(folder / "model.safetensors", model, about)
    process.wait_for_everyone()  # who comes next may load it
    return history


def build(config: ReidTraining, num_classes: int) -> Baseline:
    """The network of a configuration, at its start."""
    backbone, _ = shared.network(config.backbone, config.weights, [], config.seed)  # seeds torch for what is new, too
    if "stride" in config.tricks:
        last_stride_one(backbone)
    return Baseline(backbone, num_classes, config)


def load(path: str | Path) -> Baseline:
    """A model that `train` has written, in evaluation mode.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: nothing is there, or the file is of another system.
    """
    state, about = checkpoints.read(path)
    if "tricks" not in about:
        raise ValueError(f"Expected a model.safetensors of `train reid`, got {path}, which names no tricks; train one.")
    about = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
    model = build(ReidTraining(weights="random", **about), len(state["backbone.classifier.weight"]))
    checkpoints.fill(model, state, str(path))
    return model.eval()


def last_stride_one(backbone: Backbone) -> None:
    """Set the last stride of a ResNet or EfficientNet of timm to 1, in convolution and shortcut.

    Raises:
        ValueError: a network in which it is not known where that is.
    """
    for stage in reversed(getattr(backbone.network, "layer4", getattr(backbone.network, "blocks", []))):
        kinds = (nn.Conv2d, nn.AvgPool2d)
        halving = [part for part in stage.modules() if isinstance(part, kinds) and part.stride in (2, (2, 2))]
        for part in halving:
            part.stride = (1, 1)
            if isinstance(part, nn.AvgPool2d):  # in the shortcut of a ResNet-D: the mean of one cell is the cell
                part.kernel_size = (1, 1)
        if halving:
            return
    raise ValueError(
        "The last stride is known in ResNets (layer4) and EfficientNets (blocks) of timm, and this network is "
        'neither. Leave out the trick "stride", or take resnet50 or tf_efficientnet_lite0.'
    )


def _augmented(image: Tensor, label: int, size: tuple[int, int], erasing: float) -> tuple[Tensor, int, Tensor]:
    """An image 3 h w as it is trained on, its label, and a rectangle to erase, with the probability `erasing`."""
    image = resize(image, list(size))
    flip, top, left = (int(torch.randint(n, ())) for n in (2, 2 * PADDING + 1, 2 * PADDING + 1))
    image = crop(image.flip(-1) if flip else image, top - PADDING, left - PADDING, *size)  # black outside
    return image, label, _rectangle(*size, erasing)


def _rectangle(height: int, width: int, probability: float) -> Tensor:
    """A random rectangle x0 y0 x1 y1, x1 and y1 one past its last pixel, of less than the image's height and width.

    It is empty, all zeros, unless one is drawn.
    """
    share, aspect = (low + (high - low) * torch.rand(TRIES) for low, high in (AREA, ASPECT))
    area = height * width * share
    sides = torch.stack((area * aspect, area / aspect), 1).sqrt().round()  # tries 2
    fitting = sides[(sides < torch.tensor((height, width))).all(1)]
    if torch.rand(()) >= probability or not len(fitting):
        return torch.zeros(4, dtype=torch.long)
    h, w = map(int, fitting[0])
    top, left = (int(torch.randint(n, ())) for n in (height - h + 1, width - w + 1))
    return torch.tensor([left, top, left + w, top + h])


def _erase(images: Tensor, rectangles: Tensor, fill: Tensor) -> Tensor:
    """Images b c h w with one rectangle each filled, as `_rectangle` draws it; an empty one changes nothing."""
    x0, y0, x1, y1 = rectangles[:, :, None, None].unbind(1)  # b 1 1
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    inside = (x >= x0) & (x < x1) & (y[:, None] >= y0) & (y[:, None] < y1)  # b h w
    return torch.where(inside[:, None], fill, images)


def _photograph_step(model: Baseline, batch: list[Tensor]) -> dict[str, Tensor]:
    """Named loss terms of one batch: photographs, labels and rectangles to erase."""
    images, labels, rectangles = batch
    erased = _erase(model.backbone.normalise(images), rectangles, model.backbone.mean)
    return model.terms(model.backbone.features(erased).float().mean((-2, -1)), labels)


@torch.inference_mode()
def _spread(model: Baseline, dataset: Changed) -> float:
    """The largest distance between pooled features of up to 64 images."""
    inputs = torch.stack([dataset[index][0] for index in range(0, len(dataset), 1 + len(dataset) // 64)])
    pooled = model.eval().pool(inputs.to(model.backbone.mean.device))
    return float(torch.pdist(pooled).max())


def idle_tricks(config: ReidTraining) -> dict[str, str]:
    """Tricks that were asked for and cannot take part, each with the reason."""
    reasons = {}
    if config.last_block:
        reasons["erasing"] = "the features of the first blocks are made once, of the whole image and its mirror image"
    if config.loss == "prototype-cosine":
        reasons |= dict.fromkeys(("smoothing", "center"), "prototypes of the batch take the place of the classifier")
    return {name: reason for name, reason in reasons.items() if name in config.tricks}


def _note(config: ReidTraining) -> str:
    idle = "; ".join(f"{name} ({reason})" for name, reason in idle_tricks(config).items())
    return f"Does not take part: {idle}." if idle else ""


def _features(model: Baseline, data: Images, config: ReidEvaluation, progress: bool) -> Tensor:
    """f_i and f_t, n 2 k, of every image in order, of length 1; with `flip` the mean with its mirror image's."""

    def both(images: Tensor) -> Tensor:  # b 2 k
        pooled = [model.pool(one) for one in ([images, images.flip(-1)] if config.flip else [images])]
        return F.normalize(sum(F.normalize(torch.stack((model.neck(f), f), 1), dim=2) for f in pooled), dim=2)

    device = engine.this_process(config.device).device
    model.eval().to(device, memory_format=torch.channels_last)
    return extract(
        both,
        data,
        model.config.size,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        progress=progress,
    )


def _rows(model: Baseline, config: ReidEvaluation, progress: bool) -> dict[str, dict[str, float]]:
    """Scores by cosine distance, the same of f_t if there is a neck, and re-ranked."""
    query, gallery = Market1501(config.data, "query"), Market1501(config.data, "gallery")
    compared, before = zip(*(_features(model, data, config, progress).unbind(1) for data in (query, gallery)))
    scores = partial(market_scores, query=query, gallery=gallery)
    rows = {"cosine": scores(cosine_distances(*compared))}
    if "bnneck" in model.config.tricks:
        rows[BEFORE] = scores(cosine_distances(*before))
    reranking = {name: getattr(config, name) for name in ("k1", "k2", "lam")}
    same = query.identities[:, None] == torch.cat((query.identities, gallery.identities))
    images = same.sum(1).double().mean().item()
    rows["re-ranked"] = scores(rerank(*compared, **reranking)) | reranking | {"images of a person": images}
    return rows


@shared.owner("evaluate reid")
def evaluate(config: ReidEvaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Ranks and mAP, with and without re-ranking; writes `reid.json` and `reid.md`, returns the former."""
    path, weights = Path(config.checkpoint), config.weights
    if config.checkpoint:
        model, name = load(path), path.parent.name
        weights = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        model = build(ReidTraining(backbone=config.backbone, weights=weights, tricks=()), 1)
        name = f"{config.backbone}, which has seen no pedestrian,"
    return _written(folder / "reid", name, replace(config, checkpoint=weights), _rows(model, config, progress))


@shared.owner("train reid --ablation", "comparison")
def ablate_tricks(config: ReidTraining, comparison: Comparison, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Train and evaluate with no trick, one, two, ...; writes `ablation.json` and `ablation.md`, returns the former.

    Each training has a folder of its own and goes on where it was interrupted. A trick that cannot take part has no
    row.
    """
    evaluation = ReidEvaluation(**vars(comparison), data=config.data, workers=config.workers, device=config.device)
    tricks, rows = tuple(name for name in config.tricks if name not in idle_tricks(config)), {}
    for count, name in enumerate(("none", *tricks)):
        train(replace(config, tricks=tricks[:count]), folder / name, progress)
        found = _rows(load(folder / name / "model.safetensors"), evaluation, progress)
        row = f"+ {name}" if count else name
        rows[row] = found["cosine"]
        if BEFORE in found:
            rows[f"{row}, {BEFORE}"] = found[BEFORE]
    rows["+ re-ranking"] = found["re-ranked"]
    return _written(folder / "ablation", f"One trick a row: {config.backbone}", config, rows, _note(config))


def _written(path: Path, name: str, config: Any, rows: dict[str, dict], note: str = "") -> dict[str, Any]:
    same = {"cosine": "center", "re-ranked": "re-ranking"}  # rows of an evaluation -> rows of the paper
    tricks = {row: same.get(row, row.removeprefix("+ ")) for row in rows}
    data = Path(config.data)
    result = {
        "title": f"{name} on {data.name}",
        "settings": vars(config) | {"data": data.name, "world": fingerprint(data)},
        "versions": versions(),
        "note": note,
        "rows": rows,
        "paper": {row: REID_TRICKS[trick] for row, trick in tricks.items() if trick in REID_TRICKS},
    }
    return shared.write(result, table(result), path)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, in percent, the paper's figures (ResNet-50, Market-1501) beside it."""
    names = ("rank-1", "rank-5", "rank-10", "mAP")
    cells = [
        [row, *(f"{found[name]:.1f}" for name in names), *map(str, result["paper"].get(row, ("", "")))]
        for row, found in result["rows"].items()
    ]
    *_, last = result["rows"].values()
    lines = [
        f"# {result['title']}",
        "",
        *shared.markdown(["features", *names, "paper: rank-1", "paper: mAP"], cells),
        "",
        f"Re-ranked with k1 = {last['k1']}, k2 = {last['k2']}, lambda = {last['lam']}; query and gallery show a "
        f"person in {last['images of a person']:.1f} images on average. Paper: Luo et al., ResNet-50, Market-1501.",
        result["note"],
    ]
    return "\n".join(lines).rstrip() + "\n"


def train_command(config: ReidTraining, comparison: Comparison, folder: Path, ablation: bool = False) -> None:
    """Train the strong baseline of re-identification, or ablate its tricks.

    Args:
        config: what is trained, and how.
        comparison: how images are compared, with --ablation.
        folder: of checkpoints and of the trained model.safetensors.
        ablation: train and evaluate with none of the tricks, one, two, ...
    """
    if comparison != Comparison() and not ablation:
        raise ValueError(
            "--flip, --k1, --k2, --lam and --batch-size are of an evaluation, which a training has with --ablation "
            "only; add it, or leave them to `evaluate reid`."
        )
    config = shared.prepared(config, folder, minis.mini_market)
    if ablation:
        shared.say(table(ablate_tricks(config, comparison, folder)))
    else:
        history = train(config, folder)
        if note := _note(config):
            shared.say(note)
        shared.tell(history, folder, "reid")


def evaluate_command(config: ReidEvaluation, folder: Path | None = None) -> None:
    """Measure CMC and mAP of a trained network, or of one that has seen no pedestrian.

    Args:
        config: what is evaluated, on what, and how.
        folder: of the results; if none is named, one in build/reid.
    """
    config = shared.prepared(config, folder, minis.mini_market)
    name = Path(config.checkpoint).parent.name or config.backbone
    shared.say(table(evaluate(config, folder or shared.build_folder("reid", config, name))))
