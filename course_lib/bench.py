"""Our speed against the usual packages, side by side: one run, one thread, median CPU time of alternating repeats.

    python -m course_lib bench              every row
    python -m course_lib bench max_box_acc  chosen rows

A row is a function that prepares one task, checks that every contestant computes the same thing (which warms them up), and
returns them: callables without arguments, ours first. More rows: more functions in ROWS.
"""

import argparse
import importlib
import json
import re
import statistics
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import requires, version

import numpy as np
import torch
import torch.nn.functional as F

from course_lib import backbones, maps, paths
from course_lib.data.ilsvrc import Batch, Ilsvrc
from course_lib.evaluate.localization import DELTAS, THRESHOLDS, MaxBoxAcc
from course_lib.teach.lesson import commit

Contestants = dict[str, Callable[[], object]]
PEERS = {"grad-cam": "pytorch_grad_cam", "torchcam": "torchcam", "opencv-python-headless": "cv2"}
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
    return {"ours": ours, "torchcam, each class with its forward pass": lambda: torchcam(True),
            "torchcam, one forward pass": lambda: torchcam(False)}


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
    clear = (high - low)[..., 0, 0] > 0.01                                # there is no picture where the ReLU leaves nothing
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
    return _box_curves(maps.heatmap(torch.randn(IMAGES, 7, 7, generator=generator), 224),
                       list(torch.cat((corner, corner + 111), 2)))


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
            weights = 1 / torch.maximum(distance, 1e-6 * distance.mean(1, keepdim=True).clamp_min(prototype.abs().mean()))
            found.append(combine(weights / weights.sum(1, keepdim=True)))
        return torch.stack(found, 1)

    def multiply_and_sum() -> torch.Tensor:
        return loop(lambda weights: (weights[:, :, None, None] * features).sum(1))

    def einsum() -> torch.Tensor:
        return loop(lambda weights: torch.einsum("bk,bkhw->bhw", weights, features))

    def ours() -> torch.Tensor:
        return maps.dist_cam(features, prototypes)

    torch.testing.assert_close(maps.heatmap(ours()[:2], 14), maps.heatmap(multiply_and_sum()[:2], 14), rtol=0, atol=1e-3)
    torch.testing.assert_close(maps.heatmap(ours()[:2], 14), maps.heatmap(einsum()[:2], 14), rtol=0, atol=1e-3)
    return {"ours": ours, "loop over references, multiply and sum": multiply_and_sum, "loop over references, einsum": einsum}


def dist_cam_cost() -> Contestants:
    """Dist-CAM of one reference for each of 8 photographs, beside the forward pass that it explains, ResNet-50"""
    model, images, _ = _model_and_photographs("resnet50")
    images = images[:8]
    features = _features(model, images)
    reference = features.mean((-2, -1)).roll(1, 0)[:, None]                # another photograph's, for each image
    return {"ours": lambda: maps.dist_cam(features, reference), "forward pass": lambda: _features(model, images)}


ROWS = {"cam": cam, "heatmaps": heatmaps, "max_box_acc": max_box_acc, "max_box_acc_random": max_box_acc_random,
        "dist_cam": dist_cam, "dist_cam_cost": dist_cam_cost}


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
            seconds = _measure(ROWS[name](), arguments.repeats)
        except FileNotFoundError as error:
            print(f"The photographs to measure with are missing. Write them: python -m course_lib data\n({error})")
            return 1
        for contestant, spent in seconds.items():
            table.append({"row": name, "task": ROWS[name].__doc__, "contestant": contestant, "seconds": spent,
                          "ratio": spent / seconds["ours"]})
    versions = {package: version(package) for package in ("torch", "timm", "numpy", *PEERS)}
    minimum = dict(re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(requires("course_lib") or []), re.MULTILINE))
    minimum = {package: minimum[package] for package in versions}
    print("| task | contestant | median | ratio |\n|---|---|---:|---:|")
    for entry in table:
        print(f"| {entry['task']} | {entry['contestant']} | {1000 * entry['seconds']:.1f} ms | {entry['ratio']:.1f} |")
    print(f"\nOne thread, median CPU time of {arguments.repeats} alternating repeats after a warm-up; "
          + ", ".join(f"{package} {number} (at least {minimum[package]})" for package, number in versions.items()) + ".")
    result = {"commit": commit(), "repeats": arguments.repeats, "threads": 1, "versions": versions, "minimum": minimum,
              "rows": table}
    paths.write_text(paths.results() / "bench.json", json.dumps(result, indent=1) + "\n")
    return 0


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
    return {"ours": ours, "OpenCV contours, 1000 thresholds": every_threshold,
            "OpenCV contours, the 255 distinct masks only": distinct_masks}


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
