"""Segmentation against masks: pooled mIoU with a table of classes, and all background thresholds in one pass.

    IoU_c = TP_c / (truth_c + predicted_c - TP_c),   mIoU = mean over classes, the background among them

Pixels of the whole set are pooled before anything is divided, as on PASCAL VOC: the mean of the images' own IoUs is
another number. Pixels of truth 255 count nowhere. Of a class that the truth holds nowhere (`Absent`)

    left out    the mean has no part: it is over the same classes at every threshold, whatever is predicted (ours)
    zero        the IoU is 0, as in the released evaluators of seeds; on VOC itself there is no such class

What is predicted as such a class is lost to the class that is there, by either rule. (If a class were left out only
where nothing is predicted as it, the best threshold could be the one at which it leaves the mean.)

A seed is read from foreground scores and a threshold t: a pixel is the class of its highest score if that is above t,
else background. The confusion matrices for all t follow from one integer histogram of the pixels over (truth, best
class, number of thresholds below the score), since the best class does not depend on t. They are identical to those of
one pass for each threshold. The best threshold is chosen on the images that are scored: it says how good a map is, not
how good a seed is of which nothing is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Float64, Int, Integer
from torch import Tensor

from course_lib.processes import sum_over_processes

IGNORE = 255
Absent = Literal["left out", "zero"]  # rules for the mean IoU, where the truth has no pixel of a class
SEED_THRESHOLDS = tuple(step / 100 for step in range(60))  # 0.00 to 0.59, as in the evaluation of CAM seeds


@dataclass(frozen=True)
class Segmentation:
    """Agreement of label images with the truth, as shares in 0..1; NaN where there is nothing to divide by."""

    classes: tuple[str, ...]
    miou: float
    iou: Float64[Tensor, " c"]
    precision: Float64[Tensor, " c"]  # share of the pixels predicted so that are so
    recall: Float64[Tensor, " c"]  # share of the pixels that are so that were found
    confusion: Int[Tensor, "c c"]  # pixels: rows truth, columns prediction

    def table(self) -> str:
        """Markdown table of the classes, in percent."""
        columns = torch.stack((self.iou, self.precision, self.recall, self.confusion.sum(1) / self.confusion.sum()))
        means = torch.cat((columns[:3].nanmean(1), torch.ones(1)))
        lines = ["| class | IoU % | precision % | recall % | of all pixels % |", "|---|---:|---:|---:|---:|"]
        for name, shares in zip((*self.classes, "**mean**"), [*columns.T.tolist(), means.tolist()]):
            cells = ["-" if share != share else f"{100 * share:.1f}" for share in shares]
            lines.append(f"| {' | '.join([name, *cells])} |")
        return "\n".join(lines)


@dataclass(frozen=True)
class Sweep:
    """Segmentation by seeds at every background threshold."""

    thresholds: Float32[Tensor, " s"]
    miou: Float64[Tensor, " s"]
    confusion: Int[Tensor, "s c c"]  # pixels: rows truth, columns prediction
    best_threshold: float  # of highest mIoU; the lowest if there are several
    best: Segmentation  # there
    absent: Absent = "left out"

    def at(self, threshold: float) -> Segmentation:
        """Segmentation at the threshold of the sweep that is nearest."""
        nearest = (self.thresholds - threshold).abs().argmin()
        return segmentation(self.confusion[nearest], self.best.classes, self.absent)


class ThresholdSweep:
    """Seeds at all background thresholds in one pass over the scores: `accumulate` batches, then `compute`.

    Args:
        classes: their names, background first.
        thresholds: ascending; compared in float32, as scores are.
        absent: what a class counts of which the truth has no pixel.
    """

    def __init__(
        self, classes: Sequence[str], thresholds: Sequence[float] = SEED_THRESHOLDS, absent: Absent = "left out"
    ) -> None:
        self.classes, self.absent = tuple(classes), absent
        self.thresholds = torch.tensor(thresholds, dtype=torch.float32)
        if not (len(self.thresholds) and (self.thresholds.diff() > 0).all()):
            raise ValueError(
                f"Thresholds in ascending order were expected, at least one, but {tuple(thresholds)} came."
            )
        self.counts = torch.zeros(len(self.classes), len(self.classes) - 1, len(self.thresholds) + 1, dtype=torch.long)

    def accumulate(self, scores: Float[Tensor, "b t h w"], truth: Integer[Tensor, "b h w"]) -> None:
        """Adds a batch.

        Args:
            scores: of the classes after the background, zero where a class has no tag. Of equals the first one counts.
            truth: 0..t, and 255 where nothing is counted.
        """
        if scores.shape[1] != len(self.classes) - 1:
            raise ValueError(
                f"Scores of the {len(self.classes) - 1} classes after the background were expected, but "
                f"{scores.shape[1]} channels came. Leave out channel 0 of maps that hold the background."
            )
        if scores.isnan().any():
            raise ValueError("Scores hold NaN, which is neither above nor below a threshold. Look at the maps first.")
        if (strange := truth[(truth != IGNORE) & ((truth < 0) | (truth >= len(self.classes)))]).numel():
            raise ValueError(
                f"Labels of the truth from 0 to {len(self.classes) - 1}, or {IGNORE} where nothing is counted, were "
                f"expected, but {int(strange[0])} came."
            )
        score, best = scores.float().max(1)  # b h w
        below = torch.bucketize(score, self.thresholds.to(score.device))  # thresholds strictly below the score
        fronts, bins = self.counts.shape[1:]
        cells = (truth.long().clamp(max=len(self.classes)) * fronts + best) * bins + below
        counts = cells.flatten().bincount(minlength=(len(self.classes) + 1) * fronts * bins)
        self.counts += counts[: self.counts.numel()].view(self.counts.shape).cpu()

    def compute(self, alone: bool = False) -> Sweep:
        """All thresholds over everything accumulated so far; with torch.distributed by all processes: all must call.

        Args:
            alone: only what this process accumulated.
        """
        counts = self.counts if alone else sum_over_processes(self.counts)
        above = counts.flip(2).cumsum(2).flip(2)[..., 1:].permute(2, 0, 1)  # s c t: above at least this threshold
        background = counts.sum((1, 2)) - above.sum(2)
        confusion = torch.cat((background[..., None], above), 2)  # s c c
        miou = _mean(_overlap(confusion), self.absent)
        best = int(miou.nan_to_num(-1.0).argmax())
        return Sweep(
            thresholds=self.thresholds,
            miou=miou,
            confusion=confusion,
            best_threshold=round(float(self.thresholds[best]), 6),
            best=segmentation(confusion[best], self.classes, self.absent),
            absent=self.absent,
        )


def sweep(scores: Float[Tensor, "b t h w"], truth: Integer[Tensor, "b h w"], classes: Sequence[str]) -> Sweep:
    """Seeds of one batch at all background thresholds. Args: see `ThresholdSweep`, which takes a set batch by batch."""
    metric = ThresholdSweep(classes)
    metric.accumulate(scores, truth)
    return metric.compute()


def label_confusion(
    predicted: Integer[Tensor, "*b h w"], truth: Integer[Tensor, "*b h w"], count: int
) -> Int[Tensor, "c c"]:
    """Pixels by class of truth (rows) and prediction (columns), of label images that hold 0..count - 1.

    Args:
        truth: 255 where nothing is counted.
    """
    known = truth != IGNORE
    if (strange := torch.cat((predicted[known], truth[known])).unique()).numel() and int(strange[-1]) >= count:
        raise ValueError(f"Expected labels from 0 to {count - 1}, got {int(strange[-1])}; pass class indices.")
    cells = truth[known].long() * count + predicted[known].long()
    return cells.bincount(minlength=count * count).view(count, count).cpu()


def segmentation(confusion: Int[Tensor, "c c"], classes: Sequence[str], absent: Absent = "left out") -> Segmentation:
    """Scores of a confusion matrix of pixels (rows truth, columns prediction).

    Args:
        absent: what a class counts of which the truth has no pixel.
    Raises:
        ValueError: no pixel was counted.
    """
    if not confusion.any():
        raise ValueError(
            "Nothing to compute: no pixel was counted. Accumulate images whose truth is not 255 everywhere."
        )
    hits, iou = confusion.diagonal().double(), _overlap(confusion)
    precision, recall = hits / confusion.sum(0), hits / confusion.sum(1)
    return Segmentation(tuple(classes), float(_mean(iou, absent)), iou, precision, recall, confusion)


def iou_losses(confusion: Int[Tensor, "c c"]) -> Float64[Tensor, "t 3"]:
    """Of each class but the background, what its IoU loses, as shares of its union: with the IoU they sum to 1.

    Missed pixels of the class were called background, spilled ones are background that was called the class, and
    confused ones are of the class or were called so, and are another class on the other side. A class without a union
    has zeros.
    """
    counts = confusion.double()
    hits = counts.diagonal()
    union, wrong = counts.sum(0) + counts.sum(1) - hits, counts - hits.diag()
    confused = wrong[1:, 1:].sum(0) + wrong[1:, 1:].sum(1)
    return torch.stack((wrong[1:, 0], wrong[0, 1:], confused), 1) / union[1:, None].clamp_min(1)


def error_fates(
    truth: Integer[Tensor, "*b h w"], labels: Integer[Tensor, "*b h w"], predicted: Integer[Tensor, "*b h w"]
) -> dict[str, float]:
    """What became of the errors of the labels that a network learned from, as shares in 0..1; NaN of nothing.

    Of the wrong pixels of the labels those that the prediction has corrected, repeated, or changed into another wrong
    class; of the right ones those that it has spoiled.

    Args:
        truth: 255 where nothing is counted.
    """
    known = truth != IGNORE
    wrong, right = known & (labels != truth), known & (labels == truth)
    corrected, repeated = predicted == truth, predicted == labels
    shares = {
        "corrected": corrected[wrong],
        "repeated": repeated[wrong],
        "changed": ~(corrected | repeated)[wrong],
        "spoiled": ~corrected[right],
    }
    return {name: chosen.double().mean().item() for name, chosen in shares.items()}


def precision_threshold(
    probability: Float[Tensor, "n t"], tags: Float[Tensor, "n t"], precision: float
) -> Float[Tensor, ""]:
    """The lowest probability from which on tags have at least some precision, pooled over all; infinite without one.

    Args:
        tags: true ones, 0 or 1.
    """
    ranked, order = probability.flatten().sort(descending=True)
    shares = tags.flatten()[order].cumsum(0) / torch.arange(1, len(order) + 1, device=order.device)
    return ranked.masked_fill(shares < precision, torch.inf).min()


def _overlap(confusion):  # ... c c -> ... c, NaN where the truth has no pixel of a class
    hits, truth = confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1)
    return torch.where(truth > 0, hits.double() / (truth + confusion.sum(-2) - hits), torch.nan)


def _mean(iou, absent):  # ... c -> ...
    return iou.nanmean(-1) if absent == "left out" else iou.nan_to_num(0).mean(-1)
