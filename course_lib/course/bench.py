"""Our speed against the usual packages, side by side: one run, one thread, median CPU time of alternating repeats.

    python -m course_lib bench              every row
    python -m course_lib bench max_box_acc  chosen rows

A row is a function that prepares one task, checks that every contestant computes the same thing (which warms them up),
and returns them: callables without arguments, ours first. More rows: more functions in ROWS.
"""

import atexit
import ctypes
import gc
import importlib
import json
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.sparse import csr_array
from torch import Tensor
from tqdm import tqdm

from course_lib import backbones, maps, paths
from course_lib.data.ilsvrc import Batch, Ilsvrc
from course_lib.evaluate import episodes, localization, ranking, segmentation
from course_lib.lesson import commit, peak_memory
from course_lib.settings import Count
from course_lib.worlds import minis
from course_lib.wsss import View, affinity, contrast, crf, pipeline, seam

Contestants = dict[str, Callable[[], Any]]
PEERS = {
    "grad-cam": "pytorch_grad_cam",
    "torchcam": "torchcam",
    "opencv-python-headless": "cv2",
    "easyfsl": "easyfsl",
    "pydensecrf2": "pydensecrf",
}
IMAGES, TARGETS = 16, 20  # photographs, and classes whose maps are asked for


def row_cam() -> Contestants:
    """maps of 20 classes for 16 photographs, EfficientNet-Lite0"""
    from torchcam.methods import CAM

    model, images, _ = _model_and_photographs()
    extractor = CAM(model, target_layer="network.bn2", fc_layer="classifier", enable_hooks=False)

    @torch.no_grad()
    def torchcam(every_class: bool) -> Tensor:
        extractor.enable_hooks()
        found = []
        for label in range(TARGETS):
            if label == 0 or every_class:
                model(images)
            found += extractor([label] * IMAGES, normalized=False)
        extractor.disable_hooks()
        return torch.stack(found, 1)

    contestants = {
        "ours": partial(_maps, model, images),
        "torchcam, each class with its forward pass": partial(torchcam, True),
        "torchcam, one forward pass": partial(torchcam, False),
    }
    return _agreed(contestants, atol=1e-4, rtol=1e-3)


def row_heatmaps() -> Contestants:
    """heatmaps (224 x 224) of 20 classes for 16 photographs, EfficientNet-Lite0"""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images, _ = _model_and_photographs()
    extractor = GradCAM(model, [model.network.bn2])

    def grad_cam(classes: int = TARGETS) -> np.ndarray:
        return np.stack([extractor(images, [ClassifierOutputTarget(label)] * IMAGES) for label in range(classes)], 1)

    # Grad-CAM of such a network is CAM after a ReLU, and this package up-samples bilinearly, after the min-max.
    raw = _maps(model, images)[:, :2].relu()
    low, high = raw.amin((-2, -1), keepdim=True), raw.amax((-2, -1), keepdim=True)
    expected = F.interpolate((raw - low) / (high - low), 224, mode="bilinear")
    clear = (high - low)[..., 0, 0] > 0.01  # there is no picture where the ReLU leaves nothing
    torch.testing.assert_close(torch.from_numpy(grad_cam(2))[clear], expected[clear], rtol=0, atol=0.05)
    return {"ours": lambda: maps.heatmap(_maps(model, images), 224), "grad-cam, class by class": grad_cam}


def row_max_box_acc() -> Contestants:
    """MaxBoxAcc and V2 curves of the CAM heatmaps (224 x 224) of 16 photographs, EfficientNet-Lite0"""
    model, images, batch = _model_and_photographs()
    weight = model.classifier.weight[batch.labels, None].detach()
    own = maps.weighted_map(_features(model, images), weight)[:, 0]
    return _box_curves(maps.heatmap(own, 224), batch.boxes)


def row_max_box_acc_random() -> Contestants:
    """MaxBoxAcc and V2 curves of 16 random maps, 7 x 7 to 224 x 224"""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 112, (IMAGES, 1, 2), generator=generator)
    raw = torch.randn(IMAGES, 7, 7, generator=generator)
    return _box_curves(maps.heatmap(raw, 224), [*torch.cat((corner, corner + 111), 2)])


def row_dist_cam() -> Contestants:
    """Dist-CAM of 1000 references for the last feature maps of 32 photographs, ResNet-50 (2048 x 7 x 7)"""
    model, images, _ = _model_and_photographs("resnet50", 32)
    features = torch.cat([_features(model, part) for part in images.split(8)])
    generator = torch.Generator().manual_seed(0)
    pooled = features.mean((-2, -1))
    prototypes = torch.rand(1000, len(pooled), generator=generator).softmax(1) @ pooled
    prototypes = prototypes * (0.5 + torch.rand(prototypes.shape, generator=generator))

    def loop(combine: Callable[[Tensor], Tensor]) -> Tensor:
        query, found = features.mean((-2, -1)), []
        for prototype in prototypes:
            distance = (query - prototype).abs()
            floor = 1e-6 * distance.mean(1, keepdim=True).clamp_min(prototype.abs().mean())
            weights = 1 / torch.maximum(distance, floor)
            found.append(combine(weights / weights.sum(1, keepdim=True)))
        return torch.stack(found, 1)

    def multiply_and_sum(weights: Tensor) -> Tensor:
        return (weights[:, :, None, None] * features).sum(1)

    def einsum(weights: Tensor) -> Tensor:
        return torch.einsum("bk,bkhw->bhw", weights, features)

    contestants = {
        "ours": lambda: maps.dist_cam(features, prototypes),
        "loop over references, multiply and sum": partial(loop, multiply_and_sum),
        "loop over references, einsum": partial(loop, einsum),
    }
    return _agreed(contestants, atol=1e-3, seen=lambda found: maps.heatmap(found[:2], 14))


def row_dist_cam_cost() -> Contestants:
    """Dist-CAM of one reference for each of 8 photographs, beside the forward pass that it explains, ResNet-50"""
    model, images, _ = _model_and_photographs("resnet50")
    images = images[:8]
    features = _features(model, images)
    reference = features.mean((-2, -1)).roll(1, 0)[:, None]  # another photograph's, for each image
    return {"ours": lambda: maps.dist_cam(features, reference), "forward pass": lambda: _features(model, images)}


def row_contrast() -> Contestants:
    """contrast loss and gradients as in training: 8 images, 21 classes, 128 channels, views of 56 x 56 and 16 x 16"""
    return _contrast(56, 16)


def row_contrast_coarse() -> Contestants:
    """contrast loss and gradients, 8 images, 21 classes, 128 channels, both views of 16 x 16"""
    return _contrast(16, 16)


def row_contrast_fine() -> Contestants:
    """contrast loss and gradients, 8 images, 21 classes, 128 channels, both views of 56 x 56"""
    return _contrast(56, 56)


def row_threshold_sweep() -> Contestants:
    """confusion matrices of seeds of 21 classes at 60 thresholds, an image of 375 x 500"""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 20, 375, 500, generator=generator) ** 3
    truth = torch.randint(0, 21, (1, 375, 500), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.05] = segmentation.IGNORE
    classes, thresholds = [str(label) for label in range(21)], segmentation.SEED_THRESHOLDS

    def confusion(labels: Tensor) -> Tensor:
        valid = truth != segmentation.IGNORE
        return (truth[valid] * 21 + labels[valid]).bincount(minlength=441).view(21, 21)

    def sixty_passes() -> Tensor:
        background = torch.zeros_like(scores[:, :1])
        return torch.stack([confusion(torch.cat((background + t, scores), 1).argmax(1)) for t in thresholds])

    def one_argmax() -> Tensor:
        best, label = scores.max(1)
        return torch.stack([confusion(torch.where(best > t, label + 1, 0)) for t in torch.tensor(thresholds)])

    contestants = {
        "ours": lambda: segmentation.sweep(scores, truth, classes).confusion,
        "60 passes, argmax in each": sixty_passes,
        "60 passes, argmax before them": one_argmax,
    }
    return _agreed(contestants, atol=0)


def row_pixel_correlation() -> Contestants:
    """PCM of an image of 500 x 375 at scale 2 (94 x 125 features, 192 channels, 21 maps)"""
    generator = torch.Generator().manual_seed(0)
    maps, features = (torch.randn(1, channels, 94, 125, generator=generator) for channels in (21, 192))
    maps = maps.relu()

    @torch.no_grad()
    def ours() -> Tensor:
        return seam.pixel_correlation(maps, features)

    def dense() -> Tensor:
        flat = features.flatten(2)
        flat = flat / (flat.norm(dim=1, keepdim=True) + seam.EPS)
        alike = (flat.mT @ flat).relu()
        alike = alike / (alike.sum(1, keepdim=True) + seam.EPS)
        return (maps.flatten(2) @ alike).view_as(maps)

    return _agreed({"ours": ours, "all affinities at once": dense}, atol=1e-5, rtol=1e-3)


def row_random_walk() -> Contestants:
    """random walk of 256 steps of 21 maps of an image of 375 x 500 (47 x 63 features, 34 affinities of a pixel)"""
    generator = torch.Generator().manual_seed(0)
    scores, strength = (torch.rand(1, count, 47, 63, generator=generator) for count in (21, 34))
    strength = 0.8 + 0.2 * strength
    near, (h, w) = affinity.near_pixels(5), scores.shape[2:]
    pixels = torch.arange(h * w).view(h, w)
    ends = [  # sources and neighbours that lie on the grid
        (pixels[: h - y, max(0, -x) : w - max(0, x)].flatten(), pixels[y:, max(0, x) : w + min(0, x)].flatten())
        for y, x in near
    ]
    sources, targets = (torch.cat(part) for part in zip(*ends))
    kept = torch.cat([strength[0, number].flatten()[first] for number, (first, _) in enumerate(ends)]) ** 8

    def squared() -> Tensor:
        walk = torch.eye(h * w)
        walk[sources, targets] = walk[targets, sources] = kept
        walk = walk / walk.sum(0)
        for _ in range(8):
            walk = walk @ walk
        return (scores.flatten(2) @ walk).view_as(scores)

    def sparse() -> Tensor:
        own = torch.arange(h * w)
        rows, columns = torch.cat((sources, targets, own)), torch.cat((targets, sources, own))
        values = torch.cat((kept, kept, torch.ones(h * w)))
        walk = csr_array((values.numpy(), (columns.numpy(), rows.numpy())), shape=(h * w, h * w))
        walk = csr_array(walk / walk.sum(1)[:, None])
        found = np.ascontiguousarray(scores[0].flatten(1).T.numpy())
        for _ in range(256):
            found = walk @ found
        return torch.from_numpy(found.T.reshape(scores.shape))

    contestants = {
        "ours": lambda: affinity.random_walk(scores, strength, 5, 8, 256),
        "dense matrix, squared eight times, as published": squared,
        "sparse matrix of scipy, 256 products": sparse,
    }
    return _agreed(contestants, atol=1e-4, rtol=1e-3)


def row_dense_crf() -> Contestants:
    """dense CRF of a photograph of 500 x 375, 21 classes, 10 iterations; lattices are made anew"""
    from pydensecrf.densecrf import DenseCRF2D
    from sklearn.datasets import load_sample_image

    image = np.ascontiguousarray(load_sample_image("china.jpg")[:375, :500])
    coarse = 3 * torch.randn(1, 21, 9, 12, generator=torch.Generator().manual_seed(0))
    unary = crf.unary_from_scores(F.interpolate(coarse, (375, 500), mode="bicubic")[0].softmax(0))

    def package() -> np.ndarray:
        peer = DenseCRF2D(500, 375, 21)
        peer.setUnaryEnergy(unary.flatten(1).numpy())
        peer.addPairwiseGaussian(sxy=3, compat=3)
        peer.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
        return np.array(peer.inference(10)).reshape(unary.shape)

    contestants = {"ours": lambda: crf.dense_crf(torch.from_numpy(image), unary).numpy(), "pydensecrf2": package}
    return _agreed(contestants, atol=1e-3)


def row_pipeline() -> Contestants:
    """the whole pipeline on the miniature VOC (SEAM, PSA, DeepLab, an epoch of each training): unchanged, and with one
    stage made anew"""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = pipeline.PipelineConfig(str(minis.mini_voc()), method="seam", refine="psa", epochs=1, device="cpu")
    run = partial(pipeline.run_pipeline, config, folder, progress=False)
    stages = run()["stages"]

    def anew(stage: str) -> None:
        shutil.rmtree(folder / stages[stage])
        run()

    return {"ours": run} | {f"ours, {stage} anew": partial(anew, stage) for stage in stages}


def row_episodes() -> Contestants:
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
    noise = 6 * torch.randn(len(labels), 640, generator=generator)
    features = torch.randn(20, 640, generator=generator)[labels] + noise
    model = PrototypicalNetworks()

    def drawn() -> episodes.Episodes:
        return episodes.sample(labels, 5, 1, 15, 10_000, generator.manual_seed(1))

    def ours() -> Tensor:
        return episodes.recalls(features, drawn(), "l2").mean(1)

    def easyfsl() -> float:
        random.seed(0)  # its tasks follow Python's own generator
        data = FeaturesDataset(labels.tolist(), features, [str(label) for label in range(20)])
        tasks = Tasks(data, 5, 1, 15, 10_000)
        loader = torch.utils.data.DataLoader(data, batch_sampler=tasks, collate_fn=tasks.episodic_collate_fn)
        return evaluate(model, loader, "cpu", use_tqdm=False)

    def its_model() -> Tensor:
        asked, right = drawn(), []
        for support, query in zip(asked.support, asked.query):
            model.process_support_set(features[support.flatten()], torch.arange(5))
            right.append((model(features[query]).argmax(1) == asked.labels).float().mean())
        return torch.stack(right)

    # A query at equal distances may go either way.
    torch.testing.assert_close(ours(), its_model(), rtol=0, atol=1.5 / 75)
    accuracy, margin = episodes.interval(ours())
    assert abs(easyfsl() - accuracy) < 2 * margin  # its own episodes are others
    return {
        "ours": ours,
        "easyfsl, features and sampler as in its manual": easyfsl,
        "easyfsl's model, on episodes that we draw": its_model,
    }


def row_cmc_map() -> Contestants:
    """CMC, mAP and mINP of 500 queries in a gallery of 4000, six cameras"""
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(500, 4000, generator=generator)
    labels = [
        torch.randint(high, (count,), generator=generator)
        for high, count in ((200, 500), (200, 4000), (6, 500), (6, 4000))
    ]

    def ours() -> tuple[np.ndarray, float, float]:
        found = ranking.cmc_map(distances, *labels)
        return found.cmc.numpy(), found.map, found.minp

    arrays = [part.numpy() for part in (distances, *labels)]
    contestants = {
        "ours": ours,
        "loop over queries and ranks, as published": partial(_ranks_by_loop, True, *arrays),
        "loop over queries, numpy along the ranks": partial(_ranks_by_loop, False, *arrays),
    }
    return _agreed(contestants, atol=1e-8)  # the loop takes equal distances in any order


def row_rerank() -> Contestants:
    """k-reciprocal re-ranking of 1000 queries in a gallery of 4000, 512 dimensions"""
    query, gallery = _clusters(1000, 4000)

    def contestants(*features: Tensor) -> Contestants:
        ours, dense = partial(ranking.rerank, *features), partial(_rerank_dense, *features)
        return {"ours": ours, "dense matrices in numpy": dense}

    _agreed(contestants(query[:100], gallery[:300]), atol=1e-5)
    return contestants(query, gallery)


def row_rerank_market() -> Contestants:
    """k-reciprocal re-ranking at the size of Market-1501: 3368 queries in a gallery of 15913, 512 dimensions"""
    return {"ours": partial(ranking.rerank, *_clusters(3368, 15913))}


ROWS = {
    row.__name__.removeprefix("row_"): row
    for row in (
        row_cam,
        row_heatmaps,
        row_max_box_acc,
        row_max_box_acc_random,
        row_dist_cam,
        row_dist_cam_cost,
        row_contrast,
        row_contrast_coarse,
        row_contrast_fine,
        row_threshold_sweep,
        row_pixel_correlation,
        row_random_walk,
        row_dense_crf,
        row_pipeline,
        row_episodes,
        row_cmc_map,
        row_rerank,
        row_rerank_market,
    )
}
MEMORY = {
    "pixel_correlation",
    "dense_crf",
    "random_walk",
    "rerank",
    "rerank_market",
}  # rows whose peak memory is measured too, in a run of its own


def main(rows: tyro.conf.Positional[tuple[str, ...]] = (), repeats: Count = 3) -> None:
    """Measure our speed beside that of other packages: prints a Markdown table and writes bench.json.

    Args:
        rows: what to measure, such as cam; everything if nothing is named.
        repeats: timed runs of each contestant.
    """
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"There is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    try:
        peers = {name: importlib.import_module(name) for name in PEERS.values()}
    except ImportError as error:
        raise RuntimeError(
            f'{error.name} is missing, so there is nothing to measure against. Install it: pip install -e ".[bench]"'
        ) from error
    torch.set_num_threads(1)
    peers["cv2"].setNumThreads(1)
    table = []
    for name in tqdm(rows or ROWS, "rows"):
        contestants = ROWS[name]()
        seconds = _measure(contestants, repeats)
        for contestant, run in contestants.items():
            spent = seconds[contestant]
            entry = {"row": name, "task": ROWS[name].__doc__, "contestant": contestant}
            entry |= {"seconds": spent, "ratio": spent / seconds["ours"]}
            table.append(entry | ({"peak_bytes": memory_rise(run)} if name in MEMORY else {}))
    versions = {package: version(package) for package in ("torch", "timm", "numpy", *PEERS)}
    minimum = dict(re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(requires("course_lib") or []), re.MULTILINE))
    minimum = {package: minimum[package] for package in versions}
    print("| task | contestant | median | ratio | peak memory |\n|---|---|---:|---:|---:|")
    for entry in table:
        peak = f"{entry['peak_bytes'] / 1e6:.0f} MB " if "peak_bytes" in entry else ""
        took = f"{1000 * entry['seconds']:.1f} ms | {entry['ratio']:.1f}"
        print(f"| {entry['task']} | {entry['contestant']} | {took} | {peak}|")
    used = ", ".join(f"{package} {number} (at least {minimum[package]})" for package, number in versions.items())
    print(f"\nOne thread, median CPU time of {repeats} alternating repeats after a warm-up; {used}.")
    result = {"commit": commit(), "repeats": repeats, "threads": 1, "versions": versions, "minimum": minimum}
    paths.write_text(paths.results() / "bench.json", json.dumps(result | {"rows": table}, indent=1) + "\n")


def memory_rise(run: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process rises at most while `run` runs, as the Linux kernel counts.

    What it frees before it ends counts too. What the allocator of the C library still keeps of earlier runs is given
    back first, so that it cannot be used again unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = peak_memory()
    run()
    return round((peak_memory() - before) * 2**20)


def _agreed(
    contestants: Contestants, atol: float, rtol: float = 0.0, seen: Callable[[Any], Any] = lambda found: found
) -> Contestants:
    """The contestants, once each of them has computed what the first one does.

    Args:
        seen: what is compared, of what they compute.
    """
    expected, *others = (seen(run()) for run in contestants.values())
    for found in others:
        torch.testing.assert_close(expected, found, rtol=rtol, atol=atol)
    return contestants


def _measure(contestants: Contestants, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each contestant. They take turns, so that a machine that slows down slows all of them."""
    spent = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


@cache
def _model_and_photographs(
    name: str = "tf_efficientnet_lite0", images: int = IMAGES
) -> tuple[backbones.Backbone, Tensor, Batch]:
    """A network (of random weights, if its own are not in a package) and the first images of the miniature ILSVRC."""
    batch = next(iter(Ilsvrc(paths.data_root() / "mini-ilsvrc", "val").batches(batch_size=images)))
    torch.manual_seed(0)
    model = backbones.create(name, pretrained=name == "tf_efficientnet_lite0")
    return model, model.normalise(batch.images), batch


@torch.no_grad()
def _features(model: backbones.Backbone, images: Tensor) -> Tensor:
    return model.features(images)


@torch.no_grad()
def _maps(model: backbones.Backbone, images: Tensor) -> Tensor:
    return maps.cam(model.features(images), model.classifier.weight[:TARGETS])


def _box_curves(heatmap: Tensor, boxes: list[Tensor]) -> Contestants:  # n H W
    levels = (heatmap * 255).to(torch.uint8).numpy()
    thresholds = (localization.HEATMAP_THRESHOLDS * 255).long()

    def ours() -> Tensor:
        metric = localization.MaxBoxAcc()
        metric.accumulate(heatmap, boxes)
        result = metric.compute()
        return torch.stack((result.single, result.multi))

    def distinct_masks() -> Tensor:
        return _opencv_curves(levels, boxes, range(255))[..., thresholds]

    contestants = {
        "ours": ours,
        "OpenCV contours, 1000 thresholds": lambda: _opencv_curves(levels, boxes, thresholds.tolist()),
        "OpenCV contours, the 255 distinct masks only": distinct_masks,
    }
    return _agreed(contestants, atol=1e-12)


def _opencv_curves(levels: np.ndarray, boxes: list[Tensor], thresholds: Sequence[int]) -> Tensor:
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
            overlap = _overlap(found[:, None], truth.numpy())
            areas = [cv2.contourArea(contour) for contour in contours] or [0]
            best[:, i, j] = overlap[np.argmax(areas)].max(), overlap.max()
    return torch.from_numpy((best[:, None] >= np.array(localization.DELTAS)[:, None, None]).mean(2))


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    inner = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1, 0).prod(-1)
    return inner / (sum((box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b)) - inner)


def _contrast(*sides: int) -> Contestants:
    generator = torch.Generator().manual_seed(0)
    views = []
    for side in sides:
        cam = F.interpolate(torch.randn(8, 21, 8, 8, generator=generator), (side, side), mode="bicubic")
        embeddings = torch.randn(8, 128, side, side, generator=generator).relu()
        views.append(View(cam, cam, embeddings.requires_grad_()))
    tags = (torch.rand(8, 20, generator=generator) < 0.08).float()
    noise = torch.rand(2, 8, side, side, generator=generator)
    config = contrast.ContrastConfig.code()

    def gradients(terms: dict[str, Tensor]) -> list[Tensor]:
        loss = sum(terms.values())
        return [loss.detach(), *torch.autograd.grad(loss, [view.embeddings for view in views])]

    def loops(draw: bool) -> list[Tensor]:
        return gradients(released_contrast(*views, tags, noise, draw))

    contestants = {
        "ours": lambda: gradients(contrast.contrast_loss(*views, tags, config, noise)),
        "loops of the released arithmetic": partial(loops, True),
        "the same without a random draw that nothing uses": partial(loops, False),
    }
    return _agreed(contestants, atol=1e-6, rtol=1e-3)


def released_contrast(view1: View, view2: View, tags: Tensor, noise: Tensor, draw: bool) -> dict[str, Tensor]:
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

    def cross(directions: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
        positive = ((directions * prototypes[labels]).sum(1) / 0.1).exp()
        return -(positive / (directions @ prototypes.T / 0.1).exp().sum(1)).log().mean()

    def intra(directions: Tensor, labels: Tensor, prototypes: Tensor, chance: Tensor) -> Tensor:
        everyone = prototypes.repeat(len(labels), 1, 1)  # m c d
        order = (directions.detach() @ prototypes.T).argsort(1, descending=True)
        hard = everyone.gather(1, order[:, 3:13, None].expand(-1, -1, everyone.shape[2]))
        if draw:
            drawn = torch.tensor([random.sample(range(len(prototypes)), 10) for _ in labels])
            everyone.gather(1, drawn[..., None].expand(-1, -1, everyone.shape[2]))
        positive = ((directions * prototypes[labels]).sum(1) / 0.1).exp()
        negative = ((directions[:, None] * hard).sum(2) / 0.1).exp().sum(1)
        losses = -(positive / (positive + negative)).log()
        total, classes = losses.sum() * 0, labels.unique()
        for label in classes:
            mask = labels == label
            count, own = int(mask.sum()), losses[mask]
            if count < 2:
                continue
            similarity = ((directions[mask] @ prototypes[label]).detach() + 1) / 2
            end = int(0.6 * count)
            hardest = similarity.argsort()[end - count // 2 : end]
            random_half = chance[mask].argsort()[: count // 2]
            total = total + own[torch.cat((random_half, hardest))].mean()
        return total / len(classes)

    views = list(zip(sides, sides[::-1], noise.flatten(1)))
    return {
        "cross-prototype": 0.1 * sum(cross(*own[:2], other[2]) for own, other, _ in views) / 2,
        "cross-cam": 0.1 * sum(cross(own[0], other[1], own[2]) for own, other, _ in views) / 2,
        "intra": 0.1 * sum(intra(*own, chance) for own, _, chance in views) / 2,
    }


def _ranks_by_loop(every_rank: bool, distances: np.ndarray, *labels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """CMC (50 ranks), mAP and mINP the usual way, query by query.

    Args:
        every_rank: divide each rank by itself in Python.
        labels: in the order of `ranking.cmc_map`.
    """
    query_ids, gallery_ids, query_cameras, gallery_cameras = labels
    curves, precisions, penalties = [], [], []
    for query, order in enumerate(np.argsort(distances, 1)):
        same = gallery_ids[order] == query_ids[query]
        hit = same[~(same & (gallery_cameras[order] == query_cameras[query]))]
        if not hit.any():
            continue
        found = hit.cumsum()
        precision = found / np.arange(1, len(found) + 1)
        if every_rank:
            precision = np.array([count / (rank + 1.0) for rank, count in enumerate(found)])
        curves.append(np.minimum(found[:50], 1))
        precisions.append((precision * hit).sum() / found[-1])
        penalties.append(found[-1] / (np.flatnonzero(hit)[-1] + 1))
    return np.mean(curves, 0), float(np.mean(precisions)), float(np.mean(penalties))


def _clusters(queries: int, gallery: int) -> tuple[Tensor, Tensor]:
    """Features of length 1 around random centres, 25 images a centre on average."""
    generator, images = torch.Generator().manual_seed(0), queries + gallery
    centres = torch.randn(images // 25, 512, generator=generator)
    own = torch.randint(len(centres), (images,), generator=generator)
    features = F.normalize(centres[own] + 1.5 * torch.randn(images, 512, generator=generator), dim=1)
    return features[:queries], features[queries:]


def _rerank_dense(query: Tensor, gallery: Tensor) -> Tensor:
    """Re-ranking the usual way: every matrix whole, every row sorted whole, every neighbourhood and query in a loop."""
    k1, k2, lam = 20, 6, 0.3
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
    return torch.from_numpy((1 - lam) * result + lam * distance[: len(query), len(query) :])
