"""Training from image tags: CAM, SEAM, EPS, and pixel-to-prototype contrast (P2P) on the latter two, by one learner.

    net, history = train(recipe("seam+p2p", data=folder), Path("runs/p2p"))     about three minutes on a CPU

    method       the sum of                                                                                       views
    cam          tags                                                                                             1
    seam         tags, min-pool, equivariance, cross-equivariance                       (`seam`, on images)       2
    eps          tags, saliency                                                         (`eps`)                   1
    seam+p2p     those of seam, cross-prototype, cross-cam, intra                       (`contrast`)              2
    eps+p2p      those of seam (on the grids of features), saliency of maps and refined maps, and of contrast     2

The second view is the first one made smaller, and on request turned or shifted besides (`views`). With two views all
terms are means over both, as released. What is trained how says a `TagTraining`, see `recipes`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from course_lib import engine
from course_lib.backbones.dense import Maps, parameter_groups
from course_lib.cache import cached
from course_lib.data.miniature import fingerprint
from course_lib.data.voc import IGNORE, Voc
from course_lib.wsss import View, tag_loss
from course_lib.wsss.cam_net import CamNet, build, kept_maps, save
from course_lib.wsss.contrast import contrast_loss
from course_lib.wsss.eps import saliency_loss
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.recipes import TagTraining
from course_lib.wsss.seam import seam_loss
from course_lib.wsss.views import Warp, resize


def loss_terms(
    config: TagTraining,
    views: Sequence[View],
    tags: Float[Tensor, "n t"],
    saliency: Float[Tensor, "n 1 H W"] | None,
    noise: Float[Tensor, "2 n h w"],
    warp: Warp | None = None,
    counts: Float[Tensor, ""] | float = 1.0,
    masks: UInt8[Tensor, "n H W"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Named terms of a method, whose sum is the loss.

    Args:
        views: one or two, as the method wants.
        saliency: 0..1, of the first view; None for a method without.
        noise: see `contrast_loss`.
        warp: if the second view is more than a smaller copy.
        counts: factor of the terms of contrast, 0 before it counts.
        masks: of the first view, for contrast with true labels.
    """
    method = TAG_METHODS[config.method]
    if method.views == 1:
        terms = {"tags": tag_loss(views[0].cam.mean((2, 3))[:, 1:], tags)}  # Eq. 2 (Du et al.)
    else:
        sizes = [tuple(view.cam.shape[2:]) for view in views] if config.on_features else (config.size, config.small)
        terms = seam_loss(*views, tags, *sizes, warp)
    if method.saliency:
        of_views = saliency, *((warp or resize)(saliency, config.small) for _ in views[1:])
        pairs = ((maps, salient) for view, salient in zip(views, of_views) for maps in view[: 1 + method.correlated])
        terms["saliency"] = sum(saliency_loss(maps, salient, tags) for maps, salient in pairs) / len(views)
    if method.contrast:
        contrast = contrast_loss(*views, tags, config.contrast, noise, warp, masks)
        terms |= {name: counts * term for name, term in contrast.items()}
    return terms


class TagLearner(nn.Module):
    """A network with what its training needs.

    Attributes:
        start: the step from which contrast counts.
    """

    def __init__(self, net: CamNet, config: TagTraining) -> None:
        super().__init__()
        self.net, self.config, self.start = net, config, 0
        self.norms = [(part, part.momentum) for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # done so far; it outlives an interruption

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss terms of a batch of TaggedImages or of KeptImages."""
        config, tags, kept, views = self.config, batch["tags"], batch.get("views"), []
        warp = config.transformation.draw(len(tags), tags.device)
        if kept and warp:
            raise ValueError(
                "Expected TaggedImages for second views with a transformation, got KeptImages, which have none."
            )
        for number, size in enumerate((None, config.small)[: self.net.method.views]):
            prepared = kept[number] if kept else self.net.prepare(batch["image"], batch["inside"], size, warp)
            for norm, momentum in self.norms:
                # Only the first view leaves statistics for evaluation, where images have its size.
                norm.momentum = 0.0 if number else momentum
            views.append(self.net(prepared))
        saliency = batch["saliency"] / 255 if self.net.method.saliency else None
        noise = torch.rand(2, len(tags), *views[-1].cam.shape[2:], device=tags.device)
        counts = (self.steps >= self.start).to(tags.dtype)
        self.steps += 1
        return loss_terms(config, views, tags, saliency, noise, warp, counts, batch.get("mask"))


class TaggedImages(Dataset):
    """Training images with tags, and what else is wanted of saliency and masks, by torch's generator (see the engine).

    In the published order: longer side, flip, jitter, crop. Where an image is smaller than the crop, it lies anywhere
    in it, and `inside` says where. Without a crop an image is squashed to a square.
    """

    def __init__(self, data: Voc, config: TagTraining) -> None:
        self.data, self.config = data, config
        self.jitter = ColorJitter(0.3, 0.3, 0.3, 0.1) if config.jitter else nn.Identity()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        config, salient = self.config, TAG_METHODS[self.config.method].saliency
        image, tags = self.data[index]
        mask = [self.data.mask(index)[None]] if config.contrast.labels == "true" else []
        layers = torch.cat((image, self.data.saliency(index)[None])) if salient else image  # 3 or 4 h w
        size = [config.size] * 2
        if config.long_side is not None:
            low, high = config.long_side
            scale = int(torch.randint(low, high + 1, ())) / max(image.shape[1:])
            size = [round(side * scale) for side in image.shape[1:]]
        layers = transforms.resize(layers, size, InterpolationMode.BICUBIC)
        layers = torch.cat((layers, *(transforms.resize(own, size, InterpolationMode.NEAREST_EXACT) for own in mask)))
        if torch.rand(()) < 0.5:
            layers = layers.flip(-1)
        layers = torch.cat((self.jitter(layers[:3]), layers[3:], torch.ones_like(layers[:1])))
        if config.long_side is not None:
            layers = window(layers, config.size)
        item = {"image": layers[:3], "inside": layers[-1].bool(), "tags": tags}
        item |= {"saliency": layers[3:4]} if salient else {}
        return item | ({"mask": torch.where(item["inside"], layers[-2], IGNORE)} if mask else {})


def window(image: UInt8[Tensor, "k h w"], size: int) -> UInt8[Tensor, "k size size"]:
    """A random crop; an image that is too small lies at a random place among zeros."""
    spare = [side - size for side in image.shape[1:]]
    top, left = (int(torch.randint(abs(room) + 1, ())) * (1 if room > 0 else -1) for room in spare)
    return transforms.crop(image, top, left, size, size)


class KeptImages(Dataset):
    """What the frozen part of a network makes of both views of all images and of their mirror images, with the rest.

    An item is that of one of both, by torch's generator. One serves all methods: it depends on data, trunk and sizes
    only. The frozen part runs when the first item is asked for.
    """

    def __init__(self, net: CamNet, data: Voc, config: TagTraining, progress: bool = True) -> None:
        self.data, self.trunk, self.sizes, self.progress = data, net.trunk, (config.size, config.small), progress
        self.tags, self.masks, numbers = data.tags.float(), None, range(len(data))
        self.saliency = None
        if TAG_METHODS[config.method].saliency or data.saliencies.is_dir():  # photographs of one's own have none
            self.saliency = self._squares(data.saliency(i)[None] for i in numbers)
        if config.contrast.labels == "true":
            masks = (data.mask(i)[None] for i in numbers)
            self.masks = self._squares(masks, InterpolationMode.NEAREST_EXACT)[:, 0]

    def _squares(self, parts, mode=InterpolationMode.BICUBIC):
        return torch.stack([transforms.resize(part, [self.sizes[0]] * 2, mode) for part in parts])

    @cached_property
    def views(self) -> list[list[Maps]]:
        """Maps of all images by flip, then by view."""
        images = self._squares(self.data[i][0] for i in range(len(self)))

        return [
            [kept_maps(self.trunk, turned, size, self.progress) for size in (None, self.sizes[1])]
            for turned in (images, images.flip(-1))
        ]

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        flip = int(torch.randint(2, ()))
        item = recursively_apply(lambda maps: maps[index], {"views": self.views[flip], "tags": self.tags})
        kept = {name: maps for name, maps in (("saliency", self.saliency), ("mask", self.masks)) if maps is not None}
        return item | {name: maps[index].flip(-1) if flip else maps[index] for name, maps in kept.items()}


def training_images(config: TagTraining, progress: bool = True) -> Dataset:
    """The images of split trainaug as `train` wants them: read one by one, or kept with what frozen parts make of them.

    What is kept serves every training on the same data with the same trunk and sizes, whatever its method and seed; one
    with true labels (`ContrastConfig.labels`) needs images that were made for such, which have masks.
    """
    data = Voc(config.data, "trainaug")
    if not config.kept:
        return TaggedImages(data, config)
    net = build(config.architecture(data.classes), config.weights)
    device = engine.this_process(config.device).device
    return KeptImages(net.to(device, memory_format=torch.channels_last), data, config, progress)


def train(
    config: TagTraining,
    folder: Path | None = None,
    progress: bool = True,
    images: Dataset | None = None,
    watch: Callable[[CamNet, int], None] | None = None,
) -> tuple[CamNet, list[dict[str, float]]]:
    """A trained network in evaluation mode, and the mean loss terms of each epoch.

    Args:
        folder: of checkpoints, where what was interrupted goes on, and of `model.safetensors` for `evaluate seeds`.
        images: of an earlier `training_images`; None: made here.
        watch: see `fit`.
    """
    images = training_images(config, progress) if images is None else images
    torch.manual_seed(config.seed)
    net = build(config.architecture(Voc(config.data, "trainaug").classes), config.weights)
    history = fit(TagLearner(net, config), images, folder, progress, watch)
    process = engine.this_process(config.device)
    if folder is not None and process.is_main_process:
        save(net, folder / "model.safetensors")
    process.wait_for_everyone()  # who comes next may load it
    return net.eval(), history


def fit(
    learner: TagLearner,
    dataset: Dataset,
    folder: Path | None = None,
    progress: bool = True,
    watch: Callable[[CamNet, int], None] | None = None,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch of a learner by its own configuration.

    Args:
        watch: called with the network and the number of the step before each of them, for pictures of a training.
    Raises:
        ValueError: fewer images than a batch.
    """
    config, whole = learner.config, dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    if isinstance(whole, KeptImages):
        _ = whole.views  # here, not in each of the processes that read
    loader = shuffled_batches(dataset, config)
    steps = config.epochs * len(loader)
    learner.start = int(config.contrast_from * steps)
    optimizer = usual_optimizer(learner.net.trunk, learner.net.new_layers(), config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** config.power)
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed, device=config.device)

    def step(model, batch):
        if watch is not None:
            watch(model.net, int(model.steps))
        return model.step(batch)

    return engine.train(learner, step, loader, optimizer, plan, scheduler=scheduler, folder=folder, progress=progress)


def fit_once(
    learner: TagLearner,
    dataset: Dataset,
    watch: Callable[[CamNet, int], Any] | None = None,
    progress: bool = True,
    takes: str = "",
) -> tuple[list[dict[str, float]], dict[int, Any]]:
    """The history of `fit`, and what `watch` returned by step; of an earlier `fit` of the same, if there was one.

    Afterwards the learner's network is the trained one, on its device and in evaluation mode, either way. What is kept
    and when it counts as the same, says `cached`: weights to start from, hooks, settings, data, all code, that of a
    notebook too.

    Args:
        watch: called with the network and the number of the step before each of them, and after the last one in
            evaluation mode; what it returns is kept unless it is None, and it shall change nothing elsewhere.
        takes: see `cached`.
    """
    config, net = learner.config, learner.net

    def make():
        seen = {}

        def look(net, step):
            if watch is not None and (found := watch(net, step)) is not None:
                seen[step] = found

        history = fit(learner, dataset, None, progress, look)
        look(net.eval(), int(learner.steps))
        return {"state": learner.state_dict(), "history": history, "seen": seen}

    found = cached(
        f"training of {config.method}",
        make,
        data=fingerprint(Path(config.data)),
        settings=[learner, dataset],
        code=[watch] if watch else [],
        seed=config.seed,
        takes=takes,
    )
    learner.to(engine.this_process(config.device).device, memory_format=torch.channels_last)
    learner.load_state_dict(found["state"])
    net.eval()
    return found["history"], found["seen"]


def continued(start: CamNet, config: TagTraining) -> CamNet:
    """A network to be trained, with trunk, neck and classifier of a trained CAM on the same classes.

    What is new, the background's row of the classifier among it, starts from the random seed of the configuration.
    """
    torch.manual_seed(config.seed)
    net = build(config.architecture(start.architecture.classes), config.weights)
    net.trunk.load_state_dict(start.trunk.state_dict())
    if start.neck is not None:
        net.neck.load_state_dict(start.neck.state_dict())
    with torch.no_grad():
        net.classifier.weight[-len(start.classifier.weight) :] = start.classifier.weight
    return net


def gradient_reach(terms: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> dict[tuple[str, str], float]:
    """Which weights each term of a loss moves: by (term, part) the length of its gradient, 0 where none arrives.

    Args:
        terms: scalars of one forward pass, whose graph is kept.
        parts: of the network.
    """

    def length(loss, module):
        slopes = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        return float(torch.stack([loss.new_zeros(())] + [slope.norm() for slope in slopes if slope is not None]).norm())

    return {(term, part): length(loss, module) for term, loss in terms.items() for part, module in parts.items()}


def shuffled_batches(images: Dataset, config: Any) -> DataLoader:
    """Batches of a training, all of one size, in an order that the engine draws.

    Args:
        config: has batch_size and workers.
    Raises:
        ValueError: fewer images than a batch.
    """
    if len(images) < config.batch_size:
        raise ValueError(
            f"Expected at least one batch of {config.batch_size} images, got {len(images)} images; "
            "take smaller batches."
        )
    return DataLoader(
        images, config.batch_size, shuffle=True, drop_last=True, generator=torch.Generator(), num_workers=config.workers
    )


def usual_optimizer(trunk: nn.Module, new: Sequence[nn.Module], config: Any) -> torch.optim.Optimizer:
    """SGD with the published groups, or AdamW with one rate for the trunk and one for new layers.

    Args:
        new: layers that start from random weights.
        config: has optimizer, learning_rate, new_learning_rate (AdamW), momentum (SGD) and weight_decay.
    """
    if config.optimizer == "sgd":
        groups = parameter_groups(trunk, new, config.learning_rate, config.weight_decay)
        return torch.optim.SGD(groups, config.learning_rate, config.momentum)
    groups = [
        {"params": [weight for weight in part.parameters() if weight.requires_grad], "lr": rate}
        for part, rate in ((trunk, config.learning_rate), (nn.ModuleList(new), config.new_learning_rate))
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
