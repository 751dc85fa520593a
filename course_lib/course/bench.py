"""Our speed against the usual packages, side by side: one run, one thread, median CPU time of alternating repeats.

    python -m course_lib bench              every row
    python -m course_lib bench max_box_acc  chosen rows

A row is a function that prepares one task, checks that every contestant computes the same thing (which warms them up), and
returns them: callables without arguments, ours first. More rows: more functions in ROWS.
"""

import argparse
import ctypes
import gc
import importlib
import json
import random
import re
import statistics
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import requires, version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from course_lib import backbones, maps, paths
from course_lib.data.ilsvrc import Batch, Ilsvrc
from course_lib.evaluate import ranking
from course_lib.evaluate.episodes import interval, recalls, sample
from course_lib.evaluate.localization import DELTAS, THRESHOLDS, MaxBoxAcc
from course_lib.evaluate.segmentation import IGNORE, sweep
from course_lib.evaluate.segmentation import THRESHOLDS as SEED_THRESHOLDS
from course_lib.lesson import commit
from course_lib.wsss import View, seam
from course_lib.wsss.contrast import ContrastConfig, contrast_loss

Contestants = dict[str, Callable[[], object]]
PEERS = {"grad-cam": "pytorch_grad_cam", "torchcam": "torchcam", "opencv-python-headless": "cv2", "easyfsl": "easyfsl"}
IMAGES, CLASSES = 16, 20


def cam() -> Contestants:
    """maps of 20 classes for 16 photographs, EfficientNet-Lite0"""
    from torchcam.methods import CAM

    model, images, _ = _model_and_photographs()
    extractor = CAM(model, target_layer="network.bn2", fc_layer="classifier", enable_hooks=False)

    @torch.no_grad()
    def torchcam(every_class: bool) -> torch.Tensor:
        extractor.enable_hooks()
        found = []
        for label in range(CLASSES):
            if label == 0 or every_class:
                model(images)
            found += extractor([label] * IMAGES, normalized=False)
        extractor.disable_hooks()
        return torch.stack(found, 1)

    def ours() -> torch.Tensor:
        return _maps(model, images)

    torch.testing.assert_close(ours(), torchcam(False), rtol=1e-3, atol=1e-4)
    return {
        "ours": ours,
        "torchcam, each class with its forward pass": lambda: torchcam(True),
        "torchcam, one forward pass": lambda: torchcam(False),
    }


def heatmaps() -> Contestants:
    """heatmaps (224 x 224) of 20 classes for 16 photographs, EfficientNet-Lite0"""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images, _ = _model_and_photographs()
    extractor = GradCAM(model, [model.network.bn2])

    def grad_cam(classes: int = CLASSES) -> np.ndarray:
        return np.stack([extractor(images, [ClassifierOutputTarget(label)] * IMAGES) for label in range(classes)], 1)

    def ours() -> torch.Tensor:
        return maps.heatmap(_maps(model, images), 224)

    # Grad-CAM of such a network is CAM after a ReLU, and this package up-samples bilinearly, after the min-max.
    raw = _maps(model, images)[:, :2].relu()
    low, high = raw.amin((-2, -1), keepdim=True), raw.amax((-2, -1), keepdim=True)
    expected = F.interpolate((raw - low) / (high - low), 224, mode="bilinear")
    clear = (high - low)[..., 0, 0] > 0.01  # there is no picture where the ReLU leaves nothing
    torch.testing.assert_close(torch.from_numpy(grad_cam(2))[clear], expected[clear], rtol=0, atol=0.05)
    return {"ours": ours, "grad-cam, class by class": grad_cam}


def max_box_acc() -> Contestants:
    """MaxBoxAcc and V2 curves of the CAM heatmaps (224 x 224) of 16 photographs, EfficientNet-Lite0"""
    model, images, batch = _model_and_photographs()
    own = _maps(model, images, len(model.classifier.weight))[torch.arange(IMAGES), batch.labels]
    return _box_curves(maps.heatmap(own, 224), batch.boxes)


def max_box_acc_random() -> Contestants:
    """MaxBoxAcc and V2 curves of 16 random maps, 7 x 7 to 224 x 224"""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 112, (IMAGES, 1, 2), generator=generator)
    return _box_curves(
        maps.heatmap(torch.randn(IMAGES, 7, 7, generator=generator), 224), list(torch.cat((corner, corner + 111), 2))
    )


def dist_cam() -> Contestants:
    """Dist-CAM of 1000 references for the last feature maps of 32 photographs, ResNet-50 (2048 x 7 x 7)"""
    features, references = _resnet_features(32), 1000
    generator = torch.Generator().manual_seed(0)
    pooled = features.mean((-2, -1))
    prototypes = torch.rand(references, len(pooled), generator=generator).softmax(1) @ pooled
    prototypes = prototypes * (0.5 + torch.rand(prototypes.shape, generator=generator))

    def loop(combine: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        query, found = features.mean((-2, -1)), []
        for prototype in prototypes:
            distance = (query - prototype).abs()
            weights = 1 / torch.maximum(
                distance, 1e-6 * distance.mean(1, keepdim=True).clamp_min(prototype.abs().mean())
            )
            found.append(combine(weights / weights.sum(1, keepdim=True)))
        return torch.stack(found, 1)

    def multiply_and_sum() -> torch.Tensor:
        return loop(lambda weights: (weights[:, :, None, None] * features).sum(1))

    def einsum() -> torch.Tensor:
        return loop(lambda weights: torch.einsum("bk,bkhw->bhw", weights, features))

    def ours() -> torch.Tensor:
        return maps.dist_cam(features, prototypes)

    torch.testing.assert_close(
        maps.heatmap(ours()[:2], 14), maps.heatmap(multiply_and_sum()[:2], 14), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(maps.heatmap(ours()[:2], 14), maps.heatmap(einsum()[:2], 14), rtol=0, atol=1e-3)
    return {
        "ours": ours,
        "loop over references, multiply and sum": multiply_and_sum,
        "loop over references, einsum": einsum,
    }


def dist_cam_cost() -> Contestants:
    """Dist-CAM of one reference for each of 8 photographs, beside the forward pass that it explains, ResNet-50"""
    model, images, _ = _model_and_photographs("resnet50")
    images = images[:8]
    features = _features(model, images)
    reference = features.mean((-2, -1)).roll(1, 0)[:, None]  # another photograph's, for each image
    return {"ours": lambda: maps.dist_cam(features, reference), "forward pass": lambda: _features(model, images)}


def contrast() -> Contestants:
    """contrast loss and its gradients as in training: 8 images, 21 classes, 128 channels, views of 56 x 56 and 16 x 16"""
    return _contrast(56, 16)


def contrast_coarse() -> Contestants:
    """contrast loss and its gradients, 8 images, 21 classes, 128 channels, both views of 16 x 16"""
    return _contrast(16, 16)


def contrast_fine() -> Contestants:
    """contrast loss and its gradients, 8 images, 21 classes, 128 channels, both views of 56 x 56"""
    return _contrast(56, 56)


def threshold_sweep() -> Contestants:
    """confusion matrices of seeds of 21 classes at 60 thresholds, an image of 375 x 500"""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 20, 375, 500, generator=generator) ** 3
    truth = torch.randint(0, 21, (1, 375, 500), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.05] = IGNORE
    classes = ["background", *map(str, range(1, 21))]

    def ours() -> torch.Tensor:
        return sweep(scores, truth, classes).confusion

    def confusion(labels: torch.Tensor) -> torch.Tensor:
        valid = truth != IGNORE
        return (truth[valid] * 21 + labels[valid]).bincount(minlength=441).view(21, 21)

    def sixty_passes() -> torch.Tensor:
        background = torch.zeros_like(scores[:, :1])
        return torch.stack([confusion(torch.cat((background + t, scores), 1).argmax(1)) for t in SEED_THRESHOLDS])

    def one_argmax() -> torch.Tensor:
        best, label = scores.max(1)
        return torch.stack([confusion(torch.where(best > t, label + 1, 0)) for t in torch.tensor(SEED_THRESHOLDS)])

    assert torch.equal(ours(), sixty_passes()) and torch.equal(ours(), one_argmax())
    return {"ours": ours, "60 passes, argmax in each": sixty_passes, "60 passes, argmax before them": one_argmax}


def pixel_correlation() -> Contestants:
    """PCM of an image of 500 x 375 at scale 2 (94 x 125 features, 192 channels, 21 maps)"""
    generator = torch.Generator().manual_seed(0)
    maps, features = (torch.randn(1, channels, 94, 125, generator=generator) for channels in (21, 192))
    maps = maps.relu()

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return seam.pixel_correlation(maps, features)

    @torch.no_grad()
    def dense() -> torch.Tensor:
        flat = features.flatten(2)
        flat = flat / (flat.norm(dim=1, keepdim=True) + seam.EPS)
        affinity = (flat.transpose(1, 2) @ flat).relu()
        affinity = affinity / (affinity.sum(1, keepdim=True) + seam.EPS)
        return (maps.flatten(2) @ affinity).view_as(maps)

    torch.testing.assert_close(ours(), dense(), rtol=1e-3, atol=1e-5)
    return {"ours": ours, "all affinities at once": dense}


def cmc_map() -> Contestants:
    """CMC, mAP and mINP of 500 queries in a gallery of 4000, six cameras"""
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(500, 4000, generator=generator)
    query_ids, gallery_ids, query_cameras, gallery_cameras = (
        torch.randint(high, (count,), generator=generator)
        for high, count in ((200, 500), (200, 4000), (6, 500), (6, 4000))
    )
    labels = query_ids, gallery_ids, query_cameras, gallery_cameras

    def loop(every_rank: bool) -> tuple[np.ndarray, float, float]:
        return _ranks_by_loop(distances.numpy(), *(part.numpy() for part in labels), every_rank)

    def ours() -> tuple[np.ndarray, float, float]:
        found = ranking.cmc_map(distances, *labels)
        return found.cmc.numpy(), found.map, found.minp

    for every_rank in (True, False):
        for figure, expected in zip(ours(), loop(every_rank)):  # the loop takes equal distances in any order
            np.testing.assert_allclose(figure, expected, rtol=0, atol=1e-8)
    return {
        "ours": ours,
        "loop over queries and ranks, as published": lambda: loop(True),
        "loop over queries, numpy along the ranks": lambda: loop(False),
    }


def rerank() -> Contestants:
    """k-reciprocal re-ranking of 1000 queries in a gallery of 4000, 512 dimensions"""
    query, gallery = _clusters(1000, 4000)
    few = query[:100], gallery[:300]
    np.testing.assert_allclose(ranking.rerank(*few).numpy(), _rerank_dense(*few), rtol=0, atol=1e-5)
    return {
        "ours": lambda: ranking.rerank(query, gallery),
        "dense matrices in numpy": lambda: _rerank_dense(query, gallery),
    }


def rerank_market() -> Contestants:
    """k-reciprocal re-ranking at the size of Market-1501: 3368 queries in a gallery of 15913, 512 dimensions"""
    query, gallery = _clusters(3368, 15913)
    return {"ours": lambda: ranking.rerank(query, gallery)}


def episodes() -> Contestants:
    """10,000 episodes, 5-way 1-shot with 75 queries, drawn from 12,000 features of 640 channels and answered"""
    from easyfsl.datasets import FeaturesDataset
    from easyfsl.methods import PrototypicalNetworks
    from easyfsl.samplers import TaskSampler
    from easyfsl.utils import evaluate

    class DataSource(torch.utils.data.Sampler):
        """What samplers of torch took in former times, and easyfsl 1.5 still hands on."""

        def __init__(self, data_source: None) -> None:
            pass

    class Tasks(TaskSampler, DataSource):
        """Its sampler, on the torch of today."""

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(600)  # as many as the test images of miniImageNet
    features = torch.randn(20, 640, generator=generator)[labels] + 6 * torch.randn(
        len(labels), 640, generator=generator
    )
    own_labels, model = torch.arange(5), PrototypicalNetworks()

    def ours() -> torch.Tensor:
        drawn = sample(labels, 5, 1, 15, 10_000, generator.manual_seed(1))
        return recalls(features, drawn, "l2").mean(1)

    def easyfsl() -> float:
        random.seed(0)  # its tasks follow Python's own generator
        data = FeaturesDataset(labels.tolist(), features, [str(label) for label in range(20)])
        tasks = Tasks(data, 5, 1, 15, 10_000)
        loader = torch.utils.data.DataLoader(data, batch_sampler=tasks, collate_fn=tasks.episodic_collate_fn)
        return evaluate(model, loader, "cpu", use_tqdm=False)

    @torch.no_grad()
    def its_model() -> torch.Tensor:
        drawn, right = sample(labels, 5, 1, 15, 10_000, generator.manual_seed(1)), []
        for support, query in zip(drawn.support, drawn.query):
            model.process_support_set(features[support.flatten()], own_labels)
            right.append((model(features[query]).argmax(1) == drawn.labels).float().mean())
        return torch.stack(right)

    accuracy, margin = interval(ours())
    torch.testing.assert_close(
        ours(), its_model(), rtol=0, atol=1.5 / 75
    )  # a query at equal distances may go either way
    assert abs(easyfsl() - accuracy) < 2 * margin  # its own episodes are others
    return {
        "ours": ours,
        "easyfsl, features and sampler as in its manual": easyfsl,
        "easyfsl's model, on episodes that we draw": its_model,
    }


ROWS = {
    "cam": cam,
    "heatmaps": heatmaps,
    "max_box_acc": max_box_acc,
    "max_box_acc_random": max_box_acc_random,
    "dist_cam": dist_cam,
    "dist_cam_cost": dist_cam_cost,
    "contrast": contrast,
    "contrast_coarse": contrast_coarse,
    "contrast_fine": contrast_fine,
    "threshold_sweep": threshold_sweep,
    "pixel_correlation": pixel_correlation,
    "episodes": episodes,
    "cmc_map": cmc_map,
    "rerank": rerank,
    "rerank_market": rerank_market,
}
MEMORY = {"pixel_correlation", "rerank", "rerank_market"}  # rows whose peak memory is measured too, in a run of its own


def main(argv: list[str]) -> int:
    """Runs the benchmark, prints a Markdown table and writes bench.json. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m course_lib bench", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"rows to run, of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contestant (default: 3)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    try:
        for module in PEERS.values():
            importlib.import_module(module)
    except ImportError as error:
        print(f'{error.name} is missing, so there is nothing to measure against. Install it: pip install -e ".[bench]"')
        return 1

    torch.set_num_threads(1)
    importlib.import_module("cv2").setNumThreads(1)
    table = []
    for name in arguments.rows or ROWS:
        try:
            contestants = ROWS[name]()
            seconds = _measure(contestants, arguments.repeats)
            memory = {contestant: peak_memory(run) for contestant, run in contestants.items() if name in MEMORY}
        except FileNotFoundError as error:
            print(f"The photographs to measure with are missing. Write them: python -m course_lib data\n({error})")
            return 1
        for contestant, spent in seconds.items():
            table.append(
                {
                    "row": name,
                    "task": ROWS[name].__doc__,
                    "contestant": contestant,
                    "seconds": spent,
                    "ratio": spent / seconds["ours"],
                    **({"peak_bytes": memory[contestant]} if name in MEMORY else {}),
                }
            )
    versions = {package: version(package) for package in ("torch", "timm", "numpy", *PEERS)}
    minimum = dict(re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(requires("course_lib") or []), re.MULTILINE))
    minimum = {package: minimum[package] for package in versions}
    print("| task | contestant | median | ratio | peak memory |\n|---|---|---:|---:|---:|")
    for entry in table:
        peak = f" {entry['peak_bytes'] / 1e6:.0f} MB |" if "peak_bytes" in entry else " |"
        print(
            f"| {entry['task']} | {entry['contestant']} | {1000 * entry['seconds']:.1f} ms | {entry['ratio']:.1f} |{peak}"
        )
    print(
        f"\nOne thread, median CPU time of {arguments.repeats} alternating repeats after a warm-up; "
        + ", ".join(f"{package} {number} (at least {minimum[package]})" for package, number in versions.items())
        + "."
    )
    result = {
        "commit": commit(),
        "repeats": arguments.repeats,
        "threads": 1,
        "versions": versions,
        "minimum": minimum,
        "rows": table,
    }
    paths.write_text(paths.results() / "bench.json", json.dumps(result, indent=1) + "\n")
    return 0


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises at most while `run` runs, by the count of the Linux kernel.

    What it frees before it ends counts too. What the allocator of the C library still keeps of earlier runs is given back
    first, so that it cannot be used again unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now

    def resident(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def _measure(contestants: Contestants, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each contestant. They take turns, so that a machine that slows down slows all of them."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


@cache
def _model_and_photographs(
    name: str = "tf_efficientnet_lite0", images: int = IMAGES
) -> tuple[backbones.Backbone, torch.Tensor, Batch]:
    """A network (of random weights, if its own are not in a package) and the first images of the miniature ILSVRC."""
    batch = next(iter(Ilsvrc(paths.data_root() / "mini-ilsvrc", "val").batches(batch_size=images)))
    torch.manual_seed(0)
    model = backbones.create(name, pretrained=name == "tf_efficientnet_lite0")
    return model, model.normalise(batch.images), batch


@cache
def _resnet_features(images: int) -> torch.Tensor:
    model, photographs, _ = _model_and_photographs("resnet50", images)
    return torch.cat([_features(model, part) for part in photographs.split(8)])


@torch.no_grad()
def _features(model: backbones.Backbone, images: torch.Tensor) -> torch.Tensor:
    return model.features(images)


@torch.no_grad()
def _maps(model: backbones.Backbone, images: torch.Tensor, classes: int = CLASSES) -> torch.Tensor:
    return maps.cam(model.features(images), model.classifier.weight[:classes])


def _box_curves(heatmap: torch.Tensor, boxes: list[torch.Tensor]) -> Contestants:
    levels = (heatmap * 255).to(torch.uint8).numpy()

    def ours() -> torch.Tensor:
        metric = MaxBoxAcc()
        metric.accumulate(heatmap, boxes)
        result = metric.compute()
        return torch.stack((result.single, result.multi))

    def every_threshold() -> torch.Tensor:
        return _opencv_curves(levels, boxes, (THRESHOLDS * 255).int().tolist())

    def distinct_masks() -> torch.Tensor:
        return _opencv_curves(levels, boxes, list(range(255)))[..., (THRESHOLDS * 255).long()]

    torch.testing.assert_close(ours(), every_threshold(), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(), distinct_masks(), rtol=0, atol=1e-12)
    return {
        "ours": ours,
        "OpenCV contours, 1000 thresholds": every_threshold,
        "OpenCV contours, the 255 distinct masks only": distinct_masks,
    }


def _opencv_curves(levels: np.ndarray, boxes: list[torch.Tensor], thresholds: list[int]) -> torch.Tensor:
    """BoxAcc of the largest and of all contours (2 3 thresholds), the usual way: contours of every thresholded copy.

    The thresholds are levels 0..254: heatmaps reach 255, so the levels are the same for all of them.
    """
    import cv2

    best = np.zeros((2, len(levels), len(thresholds)))
    for i, (level, truth) in enumerate(zip(levels, boxes)):
        height, width = level.shape
        for j, threshold in enumerate(thresholds):
            _, mask = cv2.threshold(level, threshold, 255, cv2.THRESH_BINARY)
            contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
            found = np.zeros((1, 4), int)
            if contours:
                x, y, w, h = np.array([cv2.boundingRect(contour) for contour in contours]).T
                found = np.stack((x, y, np.minimum(x + w, width - 1), np.minimum(y + h, height - 1)), 1)
            overlap = _iou(found[:, None], truth.numpy())
            areas = [cv2.contourArea(contour) for contour in contours]
            best[:, i, j] = overlap[int(np.argmax(areas)) if contours else 0].max(), overlap.max()
    return torch.from_numpy((best[:, None] >= np.array(DELTAS)[:, None, None]).mean(2))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    inner = np.maximum(high - low + 1, 0).prod(-1)
    return inner / ((a[..., 2:] - a[..., :2] + 1).prod(-1) + (b[..., 2:] - b[..., :2] + 1).prod(-1) - inner)


def _contrast(*sides: int) -> Contestants:
    generator = torch.Generator().manual_seed(0)
    views = []
    for side in sides:
        cam = F.interpolate(torch.randn(8, 21, 8, 8, generator=generator), (side, side), mode="bicubic")
        embeddings = torch.randn(8, 128, side, side, generator=generator).relu()
        views.append(View(cam, cam, embeddings.requires_grad_()))
    tags = (torch.rand(8, 20, generator=generator) < 0.08).float()
    noise = torch.rand(2, 8, side, side, generator=generator)
    config = ContrastConfig.code()

    def gradients(terms: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        loss = sum(terms.values())
        return [loss.detach(), *torch.autograd.grad(loss, [view.embeddings for view in views])]

    def ours() -> list[torch.Tensor]:
        return gradients(contrast_loss(*views, tags, config, noise))

    def loops(draw: bool = False) -> list[torch.Tensor]:
        return gradients(released_contrast(*views, tags, noise, draw))

    torch.testing.assert_close(ours(), loops(), rtol=1e-3, atol=1e-6)
    return {
        "ours": ours,
        "loops of the released arithmetic": lambda: loops(True),
        "the same without a random draw that nothing uses": loops,
    }


def released_contrast(
    view1: View, view2: View, tags: torch.Tensor, noise: torch.Tensor, draw: bool
) -> dict[str, torch.Tensor]:
    """The terms of `ContrastConfig.code()` step by step as the released code goes: class by class, pixel by pixel.

    Args:
        noise: in place of random.sample for the random half of the pixels: the smallest numbers of a class are drawn.
        draw: also draw 10 negatives for each pixel as the released code does, though no loss takes them.
    """
    size, present = view2.cam.shape[2:], torch.cat((torch.ones_like(tags[:, :1]), tags), 1)
    sides = []
    for view in (view1, view2):
        with torch.no_grad():
            cam = F.interpolate(view.refined, size, mode="bilinear", align_corners=True).relu()
            low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
            cam[cam < low + 1e-5] = 0
            cam = (cam - low - 1e-5) / (high - low + 1e-5)
            cam[:, 0] = 0.2
            labels = (cam * present[:, :, None, None]).softmax(1).argmax(1).flatten()
        embeddings = F.interpolate(view.embeddings, size, mode="bilinear", align_corners=True)
        rows = embeddings.permute(0, 2, 3, 1).reshape(-1, embeddings.shape[1])
        prototypes = []
        with torch.no_grad():
            for label in range(cam.shape[1]):
                confidence = cam[:, label].flatten()
                picks = confidence.topk(32).indices if label else torch.arange(32)  # equals have no order of their own
                weight = confidence[picks][:, None]
                prototypes.append((weight * rows[picks]).sum(0) / weight.sum())
            prototypes = F.normalize(torch.stack(prototypes), dim=1)
        sides.append((F.normalize(rows, dim=1), labels, prototypes))

    def contrast(directions: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        positive = ((directions * prototypes[labels]).sum(1) / 0.1).exp()
        return -(positive / (directions @ prototypes.T / 0.1).exp().sum(1)).log().mean()

    def intra(
        directions: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, chance: torch.Tensor
    ) -> torch.Tensor:
        everyone = prototypes.repeat(len(labels), 1, 1)  # m c d
        order = (directions.detach() @ prototypes.T).argsort(1, descending=True)
        hard = everyone.gather(1, order[:, 3:13, None].expand(-1, -1, everyone.shape[2]))
        if draw:
            drawn = torch.tensor([random.sample(range(len(prototypes)), 10) for _ in labels])
            everyone.gather(1, drawn[..., None].expand(-1, -1, everyone.shape[2]))
        positive = ((directions * prototypes[labels]).sum(1) / 0.1).exp()
        negative = ((directions[:, None] * hard).sum(2) / 0.1).exp().sum(1)
        losses = -(positive / (positive + negative)).log()
        total, classes = losses.sum() * 0, np.unique(labels)
        for label in classes:
            mask = labels == int(label)
            count, own = int(mask.sum()), losses[mask]
            if count < 2:
                continue
            similarity = ((directions[mask] @ prototypes[int(label)]).detach() + 1) / 2
            end = int(0.6 * count)
            hardest = similarity.argsort()[end - count // 2 : end]
            random_half = chance[mask].argsort()[: count // 2]
            total = total + own[torch.cat((random_half, hardest))].mean()
        return total / len(classes)

    one, two = sides
    return {
        "cross-prototype": 0.1 * (contrast(*one[:2], two[2]) + contrast(*two[:2], one[2])) / 2,
        "cross-cam": 0.1 * (contrast(one[0], two[1], one[2]) + contrast(two[0], one[1], two[2])) / 2,
        "intra": 0.1 * (intra(*one, noise[0].flatten()) + intra(*two, noise[1].flatten())) / 2,
    }


def _ranks_by_loop(
    distances: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery_cameras: np.ndarray,
    every_rank: bool,
) -> tuple[np.ndarray, float, float]:
    """CMC (50 ranks), mAP and mINP the usual way, query by query; `every_rank` divides each rank by itself in Python."""
    orders = np.argsort(distances, 1)
    curves, precisions, penalties = [], [], []
    for query, order in enumerate(orders):
        same = gallery_ids[order] == query_ids[query]
        hit = same[~(same & (gallery_cameras[order] == query_cameras[query]))]
        if not hit.any():
            continue
        found = hit.cumsum()
        precision = (
            np.array([count / (rank + 1.0) for rank, count in enumerate(found)])
            if every_rank
            else found / np.arange(1, len(found) + 1)
        )
        curves.append(np.minimum(found[:50], 1))
        precisions.append((precision * hit).sum() / found[-1])
        penalties.append(found[-1] / (np.flatnonzero(hit)[-1] + 1))
    return np.mean(curves, 0), float(np.mean(precisions)), float(np.mean(penalties))


def _clusters(queries: int, gallery: int, each: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of length 1 around random centres, `each` images a centre on average."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn((queries + gallery) // each, 512, generator=generator)
    own = torch.randint(len(centres), (queries + gallery,), generator=generator)
    features = F.normalize(centres[own] + 1.5 * torch.randn(queries + gallery, 512, generator=generator), dim=1)
    return features[:queries], features[queries:]


def _rerank_dense(
    query: torch.Tensor, gallery: torch.Tensor, k1: int = 20, k2: int = 6, lam: float = 0.3
) -> np.ndarray:
    """Re-ranking the usual way: every matrix whole, every row sorted whole, every neighbourhood and query in a loop."""
    features = torch.cat((query, gallery)).numpy()
    lengths = np.square(features).sum(1)
    distance = np.maximum(lengths[:, None] + lengths - 2 * features @ features.T, 0)
    distance /= distance.max(1, keepdims=True)
    order = np.argsort(distance, 1)

    def reciprocal(image: int, k: int) -> np.ndarray:
        forward = order[image, : k + 1]
        return forward[(order[forward, : k + 1] == image).any(1)]

    encoding = np.zeros_like(distance)
    for image in range(len(features)):
        own = members = reciprocal(image, k1)
        for candidate in own:
            theirs = reciprocal(candidate, round(k1 / 2))
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                members = np.append(members, theirs)
        members = np.unique(members)
        weight = np.exp(-distance[image, members])
        encoding[image, members] = weight / weight.sum()
    encoding = np.stack([encoding[order[image, :k2]].mean(0) for image in range(len(features))])
    holders = [np.flatnonzero(column) for column in encoding.T]
    result = np.empty((len(query), len(gallery)), np.float32)
    for image in range(len(query)):
        shared = np.zeros(len(features), np.float32)
        for column in np.flatnonzero(encoding[image]):
            rows = holders[column]
            shared[rows] += np.minimum(encoding[image, column], encoding[rows, column])
        result[image] = (1 - shared / (2 - shared))[len(query) :]
    return (1 - lam) * result + lam * distance[: len(query), len(query) :]
