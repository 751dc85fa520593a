"""Seeds: score maps of the tagged classes from several scales of an image, a label image from them, and their mIoU.

    scores = score_maps(net, images, tags, scales=(0.5, 1.0, 1.5, 2.0))     for each reading: b t H W
    labels = hard_seeds(scores["with PCM"], threshold=0.26)                 b H W
    score(net, Voc(folder, "val"))["with PCM"]["miou"]                      of a whole split

At each scale the image and its mirror image pass the network as one batch. Maps are brought to the size of the image,
turned back, summed, scaled for each class by itself, and kept only for the classes that the image is tagged with: also
on val, as in the papers, so that the mIoU of seeds there is not that of a segmentation. Each method has its published
way of reading them, and may have another one: see `methods`.

A pixel whose highest score is above a threshold is of that class, else background. The threshold is the best of the set
that is scored: an oracle, in the papers too.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from course_lib import paths
from course_lib.data.files import BrokenFile, existing
from course_lib.data.voc import IGNORE, Voc
from course_lib.evaluate.segmentation import Sweep, ThresholdSweep
from course_lib.processes import sum_over_processes
from course_lib.wsss.cam_net import CamNet
from course_lib.wsss.contrast import min_max
from course_lib.wsss.seam import EPS
from course_lib.wsss.views import resize


@torch.inference_mode()
def score_maps(
    net: CamNet, images: UInt8[Tensor, "b 3 H W"], tags: Float[Tensor, "b t"], scales: Sequence[float] = (1.0,)
) -> dict[str, Float[Tensor, "b t H W"]]:
    """Scores in 0..1 of the classes from channel 1 on, for each reading of the method; 0 for classes without a tag.

    Args:
        net: in evaluation mode, on the device of images and tags.
        images: of one size.
        scales: factors of their sides, or of what these become if the network says at which size it looks
        (`scored_at`).
    """
    size, readings = images.shape[2:], net.method.readings
    longest, sums = net.architecture.scored_at or max(size), dict.fromkeys(readings, 0)
    for scale in scales:
        scaled = [max(1, round(side * scale * longest / max(size))) for side in size]
        these = transforms.resize(images, scaled, InterpolationMode.BICUBIC)
        view = net(net.prepare(torch.cat((these, these.flip(-1)))))
        for name, (source, activation) in readings.items():
            maps = getattr(view, source).float()
            if activation == "softmax":
                maps = maps.softmax(1)
            elif activation == "relu":
                maps = maps.relu()  # Eq. 3 (Du et al.)
            else:  # SEAM's network makes them as large as its input
                maps = resize(maps, tuple(scaled))
            straight, mirrored = F.interpolate(maps[:, 1:], size, mode="bilinear", align_corners=False).chunk(2)
            sums[name] = sums[name] + straight + mirrored.flip(-1)
    return {
        name: scaled_scores(total, minimum=readings[name][1] == "") * tags[:, :, None, None]
        for name, total in sums.items()
    }


def scaled_scores(sums: Float[Tensor, "b t H W"], minimum: bool) -> Float[Tensor, "b t H W"]:
    """Maps in 0..1, each by its own maximum and, if asked for, minimum; negative values become 0."""
    if minimum:
        return min_max(sums).clamp_min(0)
    sums = sums.relu()
    return sums / (sums.amax((2, 3), keepdim=True) + EPS)


def hard_seeds(scores: Float[Tensor, "b t H W"], threshold: float) -> Int[Tensor, "b H W"]:
    """Label images: the class of highest score (1 for channel 0 of the scores) if it is above the threshold, else 0."""
    highest, best = scores.max(1)
    return torch.where(highest > threshold, best + 1, 0)


def write_scores(folder: Path, name: str, scores: Float[Tensor, "t H W"], tags: Float[Tensor, " t"]) -> None:
    """Keep the maps of the tagged classes in a compressed .npz file of bytes: scores are rounded to 1/255."""
    present = tags.nonzero()[:, 0].cpu()
    levels = (scores[present.to(scores.device)] * 255).round().byte().cpu()
    content = io.BytesIO()
    np.savez_compressed(content, classes=present.numpy(), levels=levels.numpy(), count=len(tags))
    paths.write_bytes(folder / f"{name}.npz", content.getvalue())


def read_scores(path: Path) -> Float[Tensor, "t H W"]:
    """Scores as `write_scores` kept them, zero where a class has no tag.

    Raises:
        FileNotFoundError, BrokenFile: nothing is there, or something else.
    """
    path = existing(path, "is missing: expected score maps there. Make them again.")
    try:
        with np.load(path, allow_pickle=False) as file:
            levels = torch.from_numpy(file["levels"])
            scores = torch.zeros(int(file["count"]), *levels.shape[1:])
            scores[torch.from_numpy(file["classes"])] = levels / 255
    except Exception as error:  # broken bytes raise nearly anything
        raise BrokenFile(f"{path}: expected score maps, got something else ({error}); make them again.") from None
    return scores


class Scored(Dataset):
    """Images of one split with what scores them: (index, image, tags, mask, track).

    The track is labelled 0 where the image shows it and is tagged with the confounded class, else it is to be ignored.
    """

    def __init__(self, data: Voc) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        data, (image, tags), mask = self.data, self.data[index], self.data.mask(index)
        track = torch.full_like(mask, IGNORE)
        if data.confounded and tags[data.classes.index(data.confounded) - 1]:
            track[data.track(index)] = 0
        return index, image, tags, mask, track


def sweeps(
    net: CamNet,
    data: Voc,
    batches: Iterable,
    scales: Sequence[float] = (1.0,),
    keep: Callable[[str, Tensor, Tensor], None] | None = None,
) -> dict[str, tuple[Sweep, Int[Tensor, "t bins"]]]:
    """All thresholds for each reading: against the masks, and counts of the pixels of tracks.

    Args:
        net: in evaluation mode.
        batches: of `Scored(data)`; processes may have a share each.
        keep: called with the id of each image, its scores of the published reading (t H W) and its tags.
    """
    metrics = {name: (ThresholdSweep(data.classes), ThresholdSweep(data.classes)) for name in net.method.readings}
    for indices, *batch in batches:
        images, tags, masks, track = (tensor.to(net.trunk.mean.device, non_blocking=True) for tensor in batch)
        found = score_maps(net, images, tags, scales)
        for name, (on_masks, on_track) in metrics.items():
            on_masks.accumulate(found[name], masks)
            on_track.accumulate(found[name], track)
        if keep is not None:
            for index, scores, tag in zip(indices, next(iter(found.values())), tags):
                keep(data.ids[index], scores, tag)
    return {
        name: (on_masks.compute(), sum_over_processes(on_track.counts)[0])
        for name, (on_masks, on_track) in metrics.items()
    }


def figures(found: Sweep, track: Int[Tensor, "t bins"], data: Voc, threshold: float) -> dict[str, Any]:
    """What a sweep says, in percent: at its best threshold, and the mIoU at the published one.

    Args:
        track: counts of the pixels of tracks, see `sweeps`.
    """
    best, there = found.best, found.at(threshold)
    row = {
        "miou": 100 * best.miou,
        "threshold": found.best_threshold,
        "precision": _mean(best.precision),
        "recall": _mean(best.recall),
        "published_threshold": threshold,
        "miou_there": 100 * there.miou,
        "iou": {name: None if iou != iou else 100 * iou for name, iou in zip(best.classes, best.iou.tolist())},
        "curve": (100 * found.miou).tolist(),
    }
    if data.confounded:  # it is found by its track, and drags the mean
        number = data.classes.index(data.confounded)
        row["miou_others"] = _mean(torch.cat((best.iou[:number], best.iou[number + 1 :])))
        if track.any():
            above = (found.thresholds < found.best_threshold + EPS).sum()  # bins of scores above the best threshold
            row["track"] = 100 * float(track[number - 1, above:].sum() / track.sum())
    return row


def score(net: CamNet, data: Voc) -> dict[str, dict[str, Any]]:
    """Figures of the seeds of a split for each reading of the network, the published one first.

    Args:
        net: in evaluation mode.
        data: of images of one size.
    """
    found = sweeps(net, data, DataLoader(Scored(data), 8))
    return {name: figures(*pair, data, net.method.threshold) for name, pair in found.items()}


def _mean(shares):
    return 100 * float(shares.nanmean())
