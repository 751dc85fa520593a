"""Our speed against the usual packages, side by side: one run, one thread, median CPU time of alternating repeats.

    python -m course_lib bench              every row
    python -m course_lib bench heatmaps     chosen rows

A row is a function that prepares one task, checks that every contestant computes the same thing, and returns them: callables
without arguments, ours first. More rows: more functions in ROWS.
"""

import argparse
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

from course_lib import maps
from course_lib.evaluate.localization import DELTAS, THRESHOLDS, MaxBoxAcc

Contestants = dict[str, Callable[[], object]]
PEERS = {"grad-cam": "pytorch_grad_cam", "torchcam": "torchcam", "opencv-python-headless": "cv2"}
IMAGES, CLASSES = 8, 20


def cam() -> Contestants:
    """maps of 20 classes for 8 images, ResNet-18"""
    from torchcam.methods import CAM

    model, images = _model_and_images()
    extractor = CAM(model, target_layer="layer4", fc_layer="fc", enable_hooks=False)

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

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return maps.cam(model.forward_features(images), model.get_classifier().weight[:CLASSES])

    torch.testing.assert_close(ours(), torchcam(False), rtol=1e-3, atol=1e-4)
    return {"ours": ours, "torchcam, each class with its forward pass": lambda: torchcam(True),
            "torchcam, one forward pass": lambda: torchcam(False)}


def heatmaps() -> Contestants:
    """heatmaps (224 x 224) of 20 classes for 8 images, ResNet-18"""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = _model_and_images()
    extractor = GradCAM(model, [model.layer4])

    def grad_cam() -> np.ndarray:
        return np.stack([extractor(images, [ClassifierOutputTarget(label)] * IMAGES) for label in range(CLASSES)], 1)

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return maps.heatmap(maps.cam(model.forward_features(images), model.get_classifier().weight[:CLASSES]), 224)

    # Grad-CAM of such a network is CAM after a ReLU, and this package up-samples bilinearly, after the min-max.
    with torch.no_grad():
        raw = maps.cam(model.forward_features(images), model.get_classifier().weight[:CLASSES]).relu()
    spread = raw.amax((-2, -1), keepdim=True) - raw.amin((-2, -1), keepdim=True)
    expected = F.interpolate((raw - raw.amin((-2, -1), keepdim=True)) / spread, 224, mode="bilinear")
    clear = spread[..., 0, 0] > 0.01                                      # there is no picture where the ReLU leaves nothing
    torch.testing.assert_close(torch.from_numpy(grad_cam())[clear], expected[clear], rtol=0, atol=0.05)
    return {"ours": ours, "grad-cam, class by class": grad_cam}


def max_box_acc() -> Contestants:
    """MaxBoxAcc and V2 curves of 8 heatmaps, 7 x 7 to 224 x 224"""
    return _max_box_acc(7)


def max_box_acc_fine() -> Contestants:
    """MaxBoxAcc and V2 curves of 8 heatmaps, 28 x 28 to 224 x 224"""
    return _max_box_acc(28)


ROWS = {"cam": cam, "heatmaps": heatmaps, "max_box_acc": max_box_acc, "max_box_acc_fine": max_box_acc_fine}


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
        seconds = _measure(ROWS[name](), arguments.repeats)
        for contestant, spent in seconds.items():
            table.append({"row": name, "task": ROWS[name].__doc__, "contestant": contestant, "seconds": spent,
                          "ratio": spent / seconds["ours"]})
    versions = {package: version(package) for package in ("torch", "timm", *PEERS)}
    print("| task | contestant | median | ratio |\n|---|---|---:|---:|")
    for entry in table:
        print(f"| {entry['task']} | {entry['contestant']} | {1000 * entry['seconds']:.1f} ms | {entry['ratio']:.1f} |")
    print(f"\nOne thread, median CPU time of {arguments.repeats} alternating repeats after a warm-up; "
          + ", ".join(f"{package} {number}" for package, number in versions.items()) + ".")
    folder = Path(os.environ.get("COURSE_RESULTS", "build/results"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(
        {"repeats": arguments.repeats, "threads": 1, "versions": versions, "rows": table}, indent=1) + "\n")
    return 0


def _measure(contestants: Contestants, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each contestant. They take turns, so that a machine that slows down slows all of them."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            if turn:                                                      # the first turn warms up
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def _model_and_images() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("resnet18").eval(), torch.randn(IMAGES, 3, 224, 224)


def _max_box_acc(side: int) -> Contestants:
    generator = torch.Generator().manual_seed(0)
    heatmap = maps.heatmap(torch.randn(IMAGES, side, side, generator=generator), 224)
    corner = torch.randint(0, 112, (IMAGES, 2), generator=generator)
    boxes = [torch.cat((c, c + 111))[None] for c in corner]
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
