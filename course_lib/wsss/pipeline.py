"""Pipeline: from photographs with tags to pseudo masks, a segmentation network and a scored result, stage by stage.

    result = run_pipeline(PipelineConfig(data=folder, method="seam+p2p", refine="psa"), Path("build/wsss"))

    stage      makes                                           from
    classify   model.safetensors, a network of seeds           photographs, tags
    seeds      ID.npz, scores of the classes                   classify
    crf        ID.png, seeds after a dense CRF                 seeds
    sure       labels of the pixels that two CRFs agree on     seeds
    affinity   model.safetensors, AffinityNet or IRNet         sure
    masks      ID.png, the pseudo masks                        seeds, or crf, or seeds and affinity
    segment    model.safetensors, a DeepLab                    masks, or the true ones
    predict    ID.png                                          segment
    score      score.json                                      seeds, masks, predict, and the true masks

A stage has a folder of its own, named after the stage and a digest of all that it depends on: its settings, the stages
before it, and the data. What is there whole (done.json says so) is not made again, so that a second run does what
changed and nothing else; a stage that was interrupted goes on where it stood. Several processes of torchrun share the
images of a stage and the batches of a training.

The settings of CRFs and walks are the published ones. Thresholds of seeds are those of `methods`, and never chosen on
masks.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from course_lib import engine, paths
from course_lib.backbones.weights import LITE0
from course_lib.data.files import BrokenFile, existing, read_json
from course_lib.data.images import load, load_grey
from course_lib.data.miniature import fingerprint
from course_lib.data.voc import Voc, write_mask
from course_lib.evaluate.segmentation import Segmentation, ThresholdSweep, label_confusion, segmentation
from course_lib.settings import Count, RandomSeed, Share, Side, Workers, check_settings
from course_lib.wsss import cam_net
from course_lib.wsss.affinity_learner import (
    STRONG,
    WEAK,
    AffinityTraining,
    affinity_recipe,
    load_affinity,
    train_affinity,
)
from course_lib.wsss.crf import CRF_SETTINGS, dense_crf, unary_from_labels, unary_from_scores
from course_lib.wsss.deeplab import (
    DEEPLAB_HEADS,
    SEGMENTATION_SCALES,
    MaskTraining,
    class_shares,
    load_segmenter,
    mask_recipe,
    train_segmenter,
)
from course_lib.wsss.irn import BoundaryWalk, confident_labels, refine_with_boundaries
from course_lib.wsss.learner import train
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.psa import WalkConfig, refine_with_affinity, scored_background
from course_lib.wsss.recipes import TagTraining, recipe
from course_lib.wsss.seeds import hard_seeds, read_scores, score_maps, write_scores

REFINEMENTS = ("none", "crf", "psa", "irn", "truth")
LAYOUT = 1  # of stages: raise it when one of them makes something else from the same settings
ALPHAS = {STRONG: 4.0, WEAK: 24.0}  # backgrounds of the CRFs whose agreement teaches AffinityNet (SEAM)
IRN_BACKGROUNDS = {STRONG: 0.30, WEAK: 0.05}  # and IRNet
PUBLISHED_GRID = 56  # side of the grid of features on which the steps of a walk are published
CERTAIN = 0.5  # probability from which a class counts as a tag, where there is none


@dataclass(frozen=True)
class PipelineConfig:
    """What is made from what. Further settings of the trainings are those of their recipes."""

    data: str = ""  # a folder in VOC's layout, or of photographs with a file of tags; "": the miniature
    method: str = "seam+p2p"  # of seeds: cam, seam, eps, seam+p2p or eps+p2p
    backbone: str = LITE0  # of seeds and psa: resnet38 as published, or tf_efficientnet_lite0 or small on a CPU
    weights: str = "pretrained"  # to start from: pretrained (timm's), random, or for ResNet38 a path
    refine: Literal[REFINEMENTS] = "crf"  # of seeds: none, crf, psa, irn; truth: no seeds, the true masks teach
    threshold: Share | None = None  # score of the background of seeds; None: that of the method
    head: Literal[DEEPLAB_HEADS] | None = None  # of the segmentation network; None: that of its recipe
    segmenter: str = ""  # its backbone; "": resnet101 where seeds are of a resnet38, else that of the seeds
    segment: bool = True  # train a segmentation network on the masks
    crf_after: bool = False  # a CRF on its predictions, as in Tables 3 and 4
    predict_tags: bool = False  # of images of the list test, which have none, for their seeds
    masks_of: tuple[Literal["trainaug", "train", "val"], ...] = ()  # splits that get pseudo masks; none: all
    scales: tuple[float, ...] = ()  # of seeds; none: 0.5 1 1.5 2 for resnet38, else 1
    walk_side: Side | None = None  # longer side that images are brought to for a walk; None: as they are
    epochs: Count | None = None  # of all trainings; None: those of the recipes
    batch_size: Count | None = None  # of all trainings; None: those of the recipes
    size: Side | None = None  # of images in all trainings; None: that of the recipes
    workers: Workers = 0  # processes that read images
    seed: RandomSeed = 0  # of everything drawn
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        check_settings(self)
        if self.method not in TAG_METHODS:
            raise ValueError(f"There is no method {self.method!r}; there are: {', '.join(TAG_METHODS)}.")
        if self.segmenter and self.segmenter not in ("resnet38", "small") and not timm.is_model(self.segmenter):
            raise ValueError(f"Expected one of timm's networks as segmenter, got {self.segmenter!r}.")
        if self.segment and self.masks_of:
            raise ValueError(
                "Expected pseudo masks of all splits for the training of a segmentation network, got masks_of="
                f"{self.masks_of}; leave it out, or set segment to False."
            )
        if any(not 0.1 <= scale <= 16 for scale in self.scales):
            raise ValueError(f"scales must be from 0.1 to 16, got {self.scales}.")

    @property
    def shared(self) -> dict[str, Any]:
        """Settings that all trainings take from here."""
        given = {name: getattr(self, name) for name in ("epochs", "batch_size", "size")}
        same = {name: getattr(self, name) for name in ("workers", "seed", "device")}
        return {name: value for name, value in given.items() if value is not None} | same

    @property
    def tags(self) -> TagTraining:
        """The training of the network of seeds."""
        weights = {"weights": self.weights} if self.weights != "pretrained" else {}
        return recipe(self.method, self.backbone, data=self.data, **weights, **self.shared)

    def affinity(self, labels: Path) -> AffinityTraining:
        """The training of AffinityNet or IRNet.

        Args:
            labels: folder of the stage `sure`.
        """
        own = {"weights": self.weights} if self.refine == "psa" and self.weights != "pretrained" else {}
        backbone = self.backbone if self.refine == "psa" or self.backbone != "resnet38" else None
        return affinity_recipe(self.refine, backbone, data=self.data, labels=str(labels), **own, **self.shared)

    def masks(self, folder: Path | None) -> MaskTraining:
        """The training of the segmentation network.

        Args:
            folder: of pseudo masks; None: the true ones.
        """
        backbone = self.segmenter or ("resnet101" if self.backbone == "resnet38" else self.backbone)
        chosen = {"head": self.head} if self.head else {}
        if backbone == self.backbone and self.weights != "pretrained":
            chosen["weights"] = self.weights
        return mask_recipe(backbone, data=self.data, masks=str(folder or ""), **chosen, **self.shared)


@dataclass
class Stage:
    """A stage whose folder is whole, or will be.

    Attributes:
        name: as in the table above.
        folder: of what it makes.
        key: digest of all that it depends on.
    """

    name: str
    folder: Path
    key: str

    @cached_property
    def files(self) -> dict[str, str]:
        """sha256 of each file by its path in the folder, once the stage is done."""
        return read_json(self.folder / "done.json")["files"]

    @property
    def done(self) -> bool:
        """Whether everything that it makes is there."""
        return (self.folder / "done.json").is_file() and all((self.folder / name).is_file() for name in self.files)

    def verified(self, name: str) -> Path:
        """The path of one of its files, whose content is what the stage wrote.

        Raises:
            FileNotFoundError, BrokenFile: nothing is there, or something else.
        """
        advice = f"Remove {self.folder}, and run again: it is made anew."
        path = existing(self.folder / name, f"is missing, which the stage {self.name} makes. {advice}")
        if _digest(path) != self.files.get(name):
            raise BrokenFile(f"{path}: expected what the stage {self.name} wrote, got other content. {advice}")
        return path


class Pipeline:
    """The stages of one configuration in one folder. `run_pipeline` runs them all.

    Args:
        config: with data.
        folder: of the folders of stages.
        progress: show bars, in the main process.
    """

    def __init__(self, config: PipelineConfig, folder: Path, progress: bool = True) -> None:
        self.config, self.folder = config, folder
        self.process = engine.this_process(config.device)
        self.progress = progress and self.process.is_main_process
        self.splits = {
            name: Voc(config.data, name) for name in ("trainaug", "train", "val") if _listed(config.data, name)
        }
        self.world = _world(Path(config.data), self.splits)

    def stage(self, name: str, settings: Any, before: Sequence[Stage], make: Callable[[Path], None]) -> Stage:
        """Make a stage unless it is there whole, or go on with it; returns it.

        Args:
            settings: all that it depends on besides the stages before it and the data, as JSON.
            make: writes into a folder; called again on the same folder, it goes on.
        """
        wanted = {"layout": LAYOUT, "stage": name, "settings": json.loads(json.dumps(settings)), "world": self.world}
        wanted["before"] = {stage.name: stage.key for stage in before}
        key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
        stage = Stage(name, self.folder / f"{name}-{key}", key)
        if not stage.done:
            (stage.folder / "done.json").unlink(missing_ok=True)
            stage.__dict__.pop("files", None)
            stage.folder.mkdir(parents=True, exist_ok=True)
            make(stage.folder)
            self.process.wait_for_everyone()
            if self.process.is_main_process:
                for rest in (*stage.folder.glob("step-*"), *stage.folder.glob("unfinished")):
                    shutil.rmtree(rest)  # checkpoints of a training that ended
                made = [path for path in stage.folder.rglob("*") if path.is_file()]
                for part in (path for path in made if path.name.startswith(paths.PART)):
                    part.unlink()  # of an interrupted run
                files = {
                    path.relative_to(stage.folder).as_posix(): _digest(path)
                    for path in sorted(made)
                    if not path.name.startswith(paths.PART)
                }
                paths.write_text(stage.folder / "done.json", json.dumps(wanted | {"files": files}, indent=1) + "\n")
            self.process.wait_for_everyone()
        return stage

    def run(self) -> dict[str, Stage]:
        """All stages of the configuration, by name, in their order."""
        config, made = self.config, {}
        if config.refine != "truth":
            training = config.tags
            made["classify"] = self.stage(
                "classify", _figures_of(training), [], lambda folder: train(training, folder, self.progress)
            )
            made["seeds"] = self.stage(
                "seeds",
                {"scales": self.scales, "predict_tags": config.predict_tags},
                [made["classify"]],
                partial(self._seeds, made["classify"]),
            )
            if config.refine == "crf":
                made["crf"] = self.stage(
                    "crf",
                    [self.reading, CRF_SETTINGS, config.masks_of],
                    [made["seeds"]],
                    partial(self._crf, made["seeds"]),
                )
            if config.refine in ("psa", "irn"):
                levels = ALPHAS if config.refine == "psa" else IRN_BACKGROUNDS
                made["sure"] = self.stage(
                    "sure",
                    [config.refine, self.reading, levels, CRF_SETTINGS],
                    [made["seeds"]],
                    partial(self._sure, made["seeds"]),
                )
                learning = config.affinity(made["sure"].folder)
                made["affinity"] = self.stage(
                    "affinity",
                    _figures_of(learning),
                    [made["sure"]],
                    lambda folder: train_affinity(learning, folder, self.progress),
                )
            sources = [made[name] for name in ("seeds", "crf", "affinity") if name in made]
            made["masks"] = self.stage(
                "masks",
                [config.refine, self.reading, asdict(self.walk), config.walk_side, config.masks_of],
                sources,
                partial(self._masks, *sources),
            )
        if config.segment:
            pseudo = made["masks"] if "masks" in made else None
            before = [pseudo] if pseudo else []
            learning = config.masks(pseudo.folder if pseudo else None)
            made["segment"] = self.stage(
                "segment",
                _figures_of(learning),
                before,
                lambda folder: train_segmenter(learning, folder, self.progress),
            )
            made["predict"] = self.stage(
                "predict",
                [self.segmentation_scales, config.crf_after, CRF_SETTINGS["deeplab"]],
                [made["segment"]],
                partial(self._predict, made["segment"]),
            )
        scored = [made[name] for name in ("seeds", "masks", "predict") if name in made]
        made["score"] = self.stage("score", [self.threshold], scored, partial(self._score, scored))
        return made

    @property
    def scales(self) -> tuple[float, ...]:
        """Of seeds."""
        return self.config.scales or ((0.5, 1.0, 1.5, 2.0) if self.config.backbone == "resnet38" else (1.0,))

    @property
    def segmentation_scales(self) -> tuple[float, ...]:
        """Of predictions: the published six, or one on a CPU."""
        return SEGMENTATION_SCALES if self.config.backbone == "resnet38" else (1.0,)

    @property
    def threshold(self) -> float:
        """Score of the background of seeds."""
        given = self.config.threshold
        return TAG_METHODS[self.config.method].threshold if given is None else given

    @property
    def masked(self) -> set[str]:
        """Ids of the images that get pseudo masks; none: all."""
        return {name for split in self.config.masks_of for name in self.splits[split].ids}

    @property
    def reading(self) -> dict[str, Any]:
        """How seeds become labels: with a threshold as P2P on SEAM reads its own, or by an alpha as on EPS."""
        return {"alpha": 8.0} if TAG_METHODS[self.config.method].saliency else {"threshold": self.threshold}

    @property
    def walk(self) -> WalkConfig | BoundaryWalk:
        """Settings of the random walk: those published for the method, on small networks fitted to their grid.

        A walk of t steps gets about radius * t^(1/2) pixels of the grid far. So that it gets as far across the image as
        on the published grid, t goes with the square of the grid's side. Borders are sources there, too.
        """
        config = self.config
        small = config.backbone != "resnet38"
        side = config.walk_side or config.tags.scored_at or config.tags.size
        if config.refine == "irn":
            published = BoundaryWalk()
            steps = max(1, round(published.steps * (side / published.side) ** 2))
            return BoundaryWalk(side=None, steps=steps) if small else published
        known = {"cam": WalkConfig.psa(), "seam": WalkConfig.seam()}.get(config.method, WalkConfig.p2p())
        known = replace(known, borders=small)
        if config.refine != "psa" or not small:
            return known
        learning = config.affinity(Path())
        grid = side / (8 if config.backbone == "small" else learning.output_stride)
        return replace(known, steps=max(1, round(known.steps * (grid / PUBLISHED_GRID) ** 2)))

    def batches(
        self, folder: Path, suffix: str, splits: Sequence[str], size: int = 8
    ) -> Iterator[list[tuple[str, int]]]:
        """This process's batches of (split, index) of images of one size whose files are not all there.

        Batches are the same in every run, and one is made whole: what a network says of an image can differ in its last
        bits with the images beside it.
        """
        members, seen = {}, set()
        for split in splits:
            for index, (name, path) in enumerate(zip(self.splits[split].ids, self.splits[split].images)):
                if name not in seen:  # those of train are in trainaug, too
                    with Image.open(path) as image:  # the header only
                        members.setdefault(image.size, []).append((split, index))
                seen.add(name)
        every = [group[start : start + size] for group in members.values() for start in range(0, len(group), size)]
        mine = every[self.process.process_index :: self.process.num_processes]
        missing = lambda split, index: not (folder / f"{self.splits[split].ids[index]}{suffix}").is_file()
        todo = [batch for batch in mine if any(missing(*one) for one in batch)]
        yield from tqdm(todo, folder.name.partition("-")[0], unit="batch", disable=not self.progress)

    def _on_device(self, net: Any) -> Any:
        return net.to(self.process.device, memory_format=torch.channels_last)

    def _seeds(self, classify: Stage, folder: Path) -> None:
        net = self._on_device(cam_net.load(classify.verified("model.safetensors")))
        for batch in self.batches(folder, ".npz", [*self.splits]):
            items = [self.splits[split][index] for split, index in batch]
            images, tags = (torch.stack(parts).to(self.process.device) for parts in zip(*items))
            for (split, index), scores, tag in zip(batch, _published(net, images, tags, self.scales), tags):
                write_scores(folder, self.splits[split].ids[index], scores, tag)
        for name, image in self._untagged():
            if self.config.predict_tags and not (folder / f"{name}.npz").is_file():
                image = image.to(self.process.device)[None]
                tags = predicted_tags(net, image)
                write_scores(folder, name, _published(net, image, tags, self.scales)[0], tags[0])

    def _each(self, seeds: Stage, target: Callable[[str], Path], only: Collection[str] = ()) -> Iterator[tuple]:
        """(id, image, scores of its seeds) of this process's images that have seeds and not yet their target.

        Args:
            only: ids; none: all.
        """
        ids = [name.removesuffix(".npz") for name in seeds.files if name.endswith(".npz")]
        mine = [name for name in ids if not only or name in only]
        mine = mine[self.process.process_index :: self.process.num_processes]
        todo = [name for name in mine if not target(name).is_file()]
        for name in tqdm(todo, "images", unit="image", disable=not self.progress):
            image = load(Path(self.config.data) / "JPEGImages" / f"{name}.jpg").to(self.process.device)
            yield name, image, read_scores(seeds.verified(f"{name}.npz")).to(self.process.device)

    def _crf(self, seeds: Stage, folder: Path) -> None:
        target = lambda name: folder / f"{name}.png"
        for name, image, scores in self._each(seeds, target, self.masked):
            _write(target(name), seeds_after_crf(image, scores, self.config.method, **self.reading))

    def _sure(self, seeds: Stage, folder: Path) -> None:
        known = {*self.splits["trainaug"].ids}
        if self.config.refine == "irn":
            target = lambda name: folder / f"{name}.png"
            for name, image, scores in self._each(seeds, target, known):
                backgrounds = [IRN_BACKGROUNDS[level] for level in (STRONG, WEAK)]
                _write(target(name), confident_labels(*labels_after_crf(image, scores, backgrounds)))
            return
        target = lambda name: folder / WEAK / f"{name}.npz"  # written last
        for name, image, scores in self._each(seeds, target, known):
            present = torch.cat((scores.new_ones(1), (scores.amax((1, 2)) > 0).to(scores)))
            for level, shares in zip(ALPHAS, shares_after_crf(image, scores, [*ALPHAS.values()])):
                write_scores(folder / level, name, shares, present)

    def _masks(self, seeds: Stage, *others: Stage | Path) -> None:
        *source, folder = others
        refine, target = self.config.refine, lambda name: folder / f"{name}.png"
        net = None
        if refine in ("psa", "irn"):
            net = self._on_device(load_affinity(source[0].verified("model.safetensors")))
        for name, image, scores in self._each(seeds, target, self.masked):
            if refine == "crf":
                paths.write_bytes(target(name), source[0].verified(f"{name}.png").read_bytes())
            elif refine == "none":
                _write(target(name), hard_seeds(scores[None], self.threshold)[0])
            else:
                _write(target(name), self._walked(net, image, scores))

    def _walked(self, net: Any, image: UInt8[Tensor, "3 H W"], scores: Float[Tensor, "t H W"]) -> Int[Tensor, "H W"]:
        refine = refine_with_boundaries if self.config.refine == "irn" else refine_with_affinity
        size, side = image.shape[1:], self.config.walk_side or self.config.tags.scored_at
        if side is not None:
            scaled = [max(1, round(length * side / max(size))) for length in size]
            image = transforms.resize(image, scaled, InterpolationMode.BICUBIC)
            scores = transforms.resize(scores, scaled, InterpolationMode.BILINEAR)
        present, classes = present_classes(scores)
        if len(classes) == 1:
            return torch.zeros(size, dtype=torch.long)
        walked = refine(net, image[None], scores[present][None], self.walk)
        return classes[F.interpolate(walked, size, mode="bilinear", align_corners=False)[0].argmax(0)]

    def _predict(self, segment: Stage, folder: Path) -> None:
        net = self._on_device(load_segmenter(segment.verified("model.safetensors")))
        for batch in self.batches(folder, ".png", [split for split in ("train", "val") if split in self.splits]):
            images = torch.stack([self.splits[split][index][0] for split, index in batch])
            for (split, index), labels in zip(batch, self._segmented(net, images)):
                _write(folder / f"{self.splits[split].ids[index]}.png", labels)
        for name, image in self._untagged():
            if not (folder / f"{name}.png").is_file():
                _write(folder / f"{name}.png", self._segmented(net, image[None])[0])

    def _segmented(self, net: Any, images: UInt8[Tensor, "b 3 H W"]) -> Int[Tensor, "b H W"]:
        images = images.to(self.process.device)
        shares = class_shares(net, images, self.segmentation_scales)
        if self.config.crf_after:
            after = partial(dense_crf, **CRF_SETTINGS["deeplab"])
            each = zip(images.permute(0, 2, 3, 1).contiguous(), unary_from_scores(shares))
            shares = torch.stack([after(image, unary) for image, unary in each])
        return shares.argmax(1)

    def _score(self, stages: Sequence[Stage], folder: Path) -> None:
        """mIoU by split and stage, in percent, with the IoU of each class; only where there are masks.

        Seeds are scored twice: at the threshold of the method, and at the best one of the masks that score them, which
        is an oracle, in the papers too.
        """
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for split in ("train", "val"):
            data = self.splits.get(split)
            if data is None or not data.masks.is_dir():
                continue
            rows = found[split] = {}
            for stage in stages:
                each = tqdm(data.ids, f"score of {stage.name}, {split}", disable=not self.progress)
                if stage.name == "seeds":
                    sweep = ThresholdSweep(data.classes)
                    for index, name in enumerate(each):
                        scores = read_scores(stage.verified(f"{name}.npz"))
                        sweep.accumulate(scores[None], data.mask(index)[None])
                    # Every process scores everything: what there is takes a minute, and sweeps would add up.
                    swept = sweep.compute(alone=True)
                    rows["seeds"] = _row(swept.at(self.threshold)) | {"threshold": self.threshold}
                    rows["seeds, oracle threshold"] = _row(swept.best) | {"threshold": swept.best_threshold}
                    continue
                if stage.name == "masks" and self.config.masks_of and split not in self.config.masks_of:
                    continue
                total = 0
                for index, name in enumerate(each):
                    labels = load_grey(stage.verified(f"{name}.png"), "P")
                    total = total + label_confusion(labels, data.mask(index), len(data.classes))
                rows[stage.name] = _row(segmentation(total, data.classes))
        if self.process.is_main_process:
            paths.write_text(folder / "score.json", json.dumps(found, indent=1) + "\n")

    def _untagged(self) -> Iterator[tuple[str, UInt8[Tensor, "3 H W"]]]:
        """This process's images of the list test, which has no tags and no masks."""
        listed = Path(self.config.data) / "ImageSets" / "Segmentation" / "test.txt"
        names = listed.read_text("utf-8-sig").split() if listed.is_file() else []
        for name in names[self.process.process_index :: self.process.num_processes]:
            name = Path(name).stem
            yield name, load(Path(self.config.data) / "JPEGImages" / f"{name}.jpg")


def run_pipeline(config: PipelineConfig, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Run all stages, and score what can be scored; returns the scores, {} where there are no masks.

    Args:
        config: with data.
        folder: of the stages; several configurations may share it, and with it what they have in common.
    """
    pipeline = Pipeline(config, folder, progress)
    made = pipeline.run()
    return {
        "settings": asdict(config),
        "world": fingerprint(Path(config.data)),
        "stages": {name: stage.folder.name for name, stage in made.items()},
        "scores": read_json(made["score"].verified("score.json")),
    }


@torch.inference_mode()
def predicted_tags(net: cam_net.CamNet, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b t"]:
    """Tags by the network's own logits, for images that have none: classes with a probability above a half, or the
    likeliest."""
    logits = net(net.prepare(_scored(net, images))).cam.float().mean((2, 3))[:, 1:]
    likely = logits.sigmoid() > CERTAIN
    best = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    return (likely | best).float()


def seeds_after_crf(
    image: UInt8[Tensor, "3 H W"],
    scores: Float[Tensor, "t H W"],
    method: str,
    threshold: float | None = None,
    alpha: float | None = None,
) -> Int[Tensor, "H W"]:
    """Labels of seeds after a dense CRF over the background and the classes with a score, as published for a method.

    Args:
        scores: in 0..1, zero for classes without a tag.
        method: one of TAG_METHODS: with saliency soft scores go in, otherwise hard labels.
        threshold: of hard labels.
        alpha: of soft scores: those of the background are (1 - highest)^alpha.
    """
    present, classes = present_classes(scores)
    if len(classes) == 1:
        return torch.zeros(image.shape[1:], dtype=torch.long)
    if alpha is not None:
        unary, settings = unary_from_scores(scored_background(scores[present][None], alpha)[0]), CRF_SETTINGS["p2p-eps"]
    else:  # P2P names all classes of the data to the CRF: what is left of a certainty is shared by more
        classes = torch.arange(len(scores) + 1, device=scores.device)
        unary, settings = unary_from_labels(hard_seeds(scores[None], threshold)[0], len(classes)), CRF_SETTINGS["p2p"]
    return classes[dense_crf(image.permute(1, 2, 0).contiguous(), unary, **settings).argmax(0)]


def labels_after_crf(
    image: UInt8[Tensor, "3 H W"], scores: Float[Tensor, "t H W"], thresholds: Sequence[float]
) -> Int[Tensor, "a H W"]:
    """Labels of seeds after a dense CRF on hard labels (IRN), at several thresholds over one lattice.

    Args:
        thresholds: scores of the background, one for each label image.
    """
    present, classes = present_classes(scores)
    if len(classes) == 1:
        return torch.zeros(len(thresholds), *image.shape[1:], dtype=torch.long)
    hard = [hard_seeds(scores[present][None], threshold)[0] for threshold in thresholds]
    unary = torch.stack([unary_from_labels(each, len(classes)) for each in hard])  # a k H W
    return classes[dense_crf(image.permute(1, 2, 0).contiguous(), unary, **CRF_SETTINGS["irn"]).argmax(1)]


def shares_after_crf(
    image: UInt8[Tensor, "3 H W"], scores: Float[Tensor, "t H W"], alphas: Sequence[float]
) -> Float[Tensor, "a c H W"]:
    """Probabilities of background and classes after a dense CRF on soft scores (PSA, SEAM); 0 for classes without one.

    Args:
        alphas: scores of the background are (1 - highest)^alpha, for each of them.
    """
    present, classes = present_classes(scores)
    front = scores[present] if len(classes) > 1 else scores[:0]
    highest = front.amax(0) if len(front) else torch.zeros_like(scores[0])
    soft = torch.stack([torch.cat((((1 - highest) ** alpha)[None], front)) for alpha in alphas])  # a k H W
    shares = dense_crf(image.permute(1, 2, 0).contiguous(), unary_from_scores(soft), **CRF_SETTINGS["seam"])
    whole = shares.new_zeros(len(alphas), len(scores) + 1, *scores.shape[1:])
    whole[:, classes] = shares
    return whole


def present_classes(scores: Float[Tensor, "t H W"]) -> tuple[Bool[Tensor, " t"], Int[Tensor, " k"]]:
    """Which classes have a score anywhere, and the numbers of those and of the background, which is 0."""
    present = scores.amax((1, 2)) > 0
    return present, torch.cat((present.new_zeros(1, dtype=torch.long), present.nonzero()[:, 0] + 1))


def _published(net, images, tags, scales):
    return next(iter(score_maps(net, images, tags, scales).values()))


def _scored(net, images):
    """Images at the size at which a network looks at them."""
    longest, size = net.architecture.scored_at, images.shape[2:]
    if longest is None:
        return images
    return transforms.resize(images, [max(1, round(side * longest / max(size))) for side in size])


def _row(found: Segmentation) -> dict[str, Any]:
    iou = {name: None if share != share else 100 * share for name, share in zip(found.classes, found.iou.tolist())}
    return {"miou": 100 * found.miou, "iou": iou}


def _write(path, labels):
    write_mask(path, labels.byte().cpu().numpy())


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _listed(root, split):
    lists = Path(root) / "ImageSets" / "Segmentation"
    return (lists / f"{split}.txt").is_file() or (split == "trainaug" and (lists / "train_aug.txt").is_file())


def _figures_of(training: Any) -> dict[str, Any]:
    """Settings of a training that change its figures, without the folders of its inputs, which have keys."""
    free = ("workers", "device", "data", "masks", "labels")
    return {name: value for name, value in asdict(training).items() if name not in free}


def _world(root: Path, splits: dict[str, Voc]) -> list:
    """What the data are: the name of a miniature, or lists, sizes and times of all images."""
    known = fingerprint(root)
    masks = (path for data in splits.values() if data.masks.is_dir() for path in sorted(data.masks.iterdir()))
    files = [path.stat() for path in (*(path for data in splits.values() for path in data.images), *masks)]
    digest = hashlib.sha256(json.dumps([[file.st_size, file.st_mtime_ns] for file in files]).encode()).hexdigest()
    tags = hashlib.sha256(repr([(data.ids, data.tags.tolist()) for data in splits.values()]).encode()).hexdigest()
    return [known, tags[:12], digest[:12] if known == "real data" else ""]
