"""Weakly supervised localisation: MaxBoxAcc, MaxBoxAccV2, GT-known and top-1 localisation, PxAP.

    BoxAcc(tau, delta) = mean over images of [ IoU(box at threshold tau, best ground-truth box) >= delta ]
    MaxBoxAcc          = max over tau of BoxAcc(tau, 0.5), box around the largest contour
    MaxBoxAccV2        = mean over delta in {0.3, 0.5, 0.7} of max over tau of BoxAcc(tau, delta), best of all contours
    PxAP               = sum over thresholds of PxPrec(tau_i) (PxRec(tau_i) - PxRec(tau_i-1)), pixels of the whole set pooled
                                                                Choe et al., CVPR 2020, Eq. 1-5 and section 4.1

One threshold serves the whole set: the maximum is taken after the mean over images. It is chosen on the images that it is
scored on, so MaxBoxAcc says how good a map is, not how good a localiser is; GT-known localisation at the fixed threshold of
the CAM paper (Zhou et al., CVPR 2016: 0.2 of the maximum) is reported beside it, and so are boxes that never saw the image.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float64, Int, Num, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from course_lib.components import contour_boxes

THRESHOLDS = torch.arange(1000, dtype=torch.float64) * 0.001  # shares of the heatmap's maximum
DELTAS = (0.3, 0.5, 0.7)
FIXED = 200  # index of threshold 0.2
CENTRE_SHARES = torch.arange(1, 21, dtype=torch.float64) / 20  # shares of the image area; the last is all of it


def iou(a: Num[Tensor, "n 4"], b: Num[Tensor, "m 4"]) -> Float64[Tensor, "n m"]:
    """Intersection over union of boxes (x0, y0, x1, y1) with inclusive corners: a box is x1 - x0 + 1 pixels wide.

    A union without area gives 0.
    """
    return _iou(a[:, None], b[None])


def _iou(a: Num[Tensor, "*#shape 4"], b: Num[Tensor, "*#shape 4"]) -> Float64[Tensor, "*shape"]:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.double().unbind(-1), b.double().unbind(-1)
    inner = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0) + 1).clamp(min=0) * (
        torch.minimum(ay1, by1) - torch.maximum(ay0, by0) + 1
    ).clamp(min=0)
    union = (ax1 - ax0 + 1) * (ay1 - ay0 + 1) + (bx1 - bx0 + 1) * (by1 - by0 + 1) - inner
    return torch.where(union > 0, inner / union, 0.0)


def squash_boxes(boxes: Num[Tensor, "n 4"], from_size: tuple[int, int], to_size: tuple[int, int]) -> Int[Tensor, "n 4"]:
    """Boxes of an image after it was resized to `to_size` without keeping its aspect: x -> int(x * new / old).

    Args:
        from_size: (width, height) of the image that the boxes belong to.
        to_size: (width, height) of the heatmap, such as (224, 224).
    """
    old, new = (torch.tensor(size * 2, dtype=torch.float64, device=boxes.device) for size in (from_size, to_size))
    return (boxes.double() * new / old).long()


def baseline_boxes(size: tuple[int, int]) -> Int[Tensor, "20 4"]:
    """Centred boxes in the shape of the image that cover 5, 10, ..., 100 % of it (`CENTRE_SHARES`).

    Args:
        size: (height, width) of the heatmaps.
    """
    extent = torch.tensor([size[1], size[0]], dtype=torch.float64)
    side = (extent * CENTRE_SHARES.sqrt()[:, None]).round().clamp(min=1)
    start = ((extent - side) / 2).floor()
    return torch.cat((start, start + side - 1), 1).long()


@dataclass(frozen=True)
class Localization:
    """Localisation accuracies of a set of images, as shares in 0..1. Curves run over `THRESHOLDS`."""

    images: int
    max_box_acc: float  # largest contour, IoU >= 0.5, at the best threshold of the set
    best_threshold: float  # the one that reaches it; the lowest if there are several
    max_box_acc_v2: float  # all contours, mean over IoU 0.3, 0.5, 0.7 of each one's best
    gt_known: float  # largest contour, IoU >= 0.5, at 0.2 of the maximum
    top1: float | None  # as gt_known, and the class is right; None if nothing is known of classes
    top1_best: float | None  # as max_box_acc (same threshold), and the class is right
    accuracy: float | None  # share of images whose class is right
    whole_image: float  # a box around the whole image, IoU >= 0.5
    centre_half: float  # a centred box of half the image
    centre_best: float  # the best centred box
    centre_best_share: float  # its share of the image area
    single: Float64[Tensor, "3 1000"]  # BoxAcc of the largest contour for IoU 0.3, 0.5, 0.7
    multi: Float64[Tensor, "3 1000"]  # BoxAcc of the best of all contours

    def table(self) -> str:
        """Markdown table of the figures, in percent, one row each."""
        names = {
            "max_box_acc": f"MaxBoxAcc (threshold {self.best_threshold:.3f})",
            "max_box_acc_v2": "MaxBoxAccV2",
            "gt_known": "GT-known, threshold 0.2",
            "top1": "top-1 localisation, threshold 0.2",
            "top1_best": f"top-1 localisation, threshold {self.best_threshold:.3f}",
            "accuracy": "class accuracy",
            "whole_image": "baseline: whole image",
            "centre_half": "baseline: centred half of the image",
            "centre_best": f"baseline: best centred box ({self.centre_best_share:.0%} of the image)",
        }
        figures = ((names[field.name], getattr(self, field.name)) for field in fields(self) if field.name in names)
        rows = [f"| {name} | {100 * figure:.1f} |" for name, figure in figures if figure is not None]
        return "\n".join([f"| {self.images} images | % |", "|---|---|", *rows])


class MaxBoxAcc:
    """Localisation accuracy for all thresholds in one pass over the heatmaps: `accumulate` batches, then `compute`."""

    def __init__(self) -> None:
        self.images = 0
        self.single = torch.zeros(3, len(THRESHOLDS), dtype=torch.long)  # hits for each delta and threshold
        self.multi = torch.zeros_like(self.single)
        self.centre = torch.zeros(len(CENTRE_SHARES), dtype=torch.long)
        self.classified: bool | None = None  # does class_correct come along; None: not yet seen
        self.correct = 0
        self.both = torch.zeros(len(THRESHOLDS), dtype=torch.long)  # hits at IoU 0.5 with the right class

    def accumulate(
        self,
        heatmaps: Float[Tensor, "b H W"],
        boxes: list[Num[Tensor, "_ 4"]],
        class_correct: Bool[Tensor, " b"] | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            heatmaps: values in 0..1, of the ground-truth class. For top-1 localisation the map of the predicted class is
                asked for; where the prediction counts, it is the same map.
            boxes: ground truth of each image, one or more boxes (x0, y0, x1, y1), inclusive, in pixels of the heatmap.
            class_correct: whether the predicted class of each image is right; given always or never.
        """
        _check_heatmaps(heatmaps)
        _check_boxes(boxes, len(heatmaps))
        if self.classified not in (None, class_correct is not None):
            raise ValueError(
                "class_correct came with some batches and not with others. Give it with all or with none of "
                "them: top-1 localisation is a share of all images."
            )
        if len(heatmaps) == 0:
            return
        levels = (heatmaps * 255).to(torch.uint8)
        largest, image, level, box = (part.cpu() for part in contour_boxes(levels))
        # Images with fewer boxes than others get some that lie outside and overlap with nothing.
        truth = pad_sequence([own.cpu() for own in boxes], batch_first=True, padding_value=-1)[:, None]  # b 1 most 4
        single = _iou(largest[:, :, None], truth).amax(2)  # b 256, IoU with the best ground-truth box
        every = _iou(box[:, None], truth[image, 0]).amax(1)
        multi = single.flatten().scatter_reduce(0, image * 256 + level, every, "amax").view_as(single)
        self.centre += (_iou(baseline_boxes(heatmaps.shape[1:])[:, None], truth).amax(2) >= 0.5).sum(0)
        at = (THRESHOLDS * levels.amax((1, 2)).cpu().double()[:, None]).long()  # b 1000
        delta = torch.tensor(DELTAS, dtype=torch.float64)[:, None, None]
        single, multi = (best.gather(1, at) >= delta for best in (single, multi))  # 3 b 1000
        self.images += len(boxes)
        self.single += single.sum(1)
        self.multi += multi.sum(1)
        self.classified = class_correct is not None
        if class_correct is not None:
            self.correct += int(class_correct.sum())
            self.both += single[1, class_correct.cpu()].sum(0)

    def compute(self) -> Localization:
        """Accuracies of everything accumulated so far."""
        if self.images == 0:
            raise ValueError("Nothing to compute: no image was accumulated. Call accumulate(heatmaps, boxes) first.")
        single, multi, centre, both = (
            hits.double() / self.images for hits in (self.single, self.multi, self.centre, self.both)
        )
        best = int(single[1].argmax())
        return Localization(
            images=self.images,
            max_box_acc=float(single[1, best]),
            best_threshold=float(THRESHOLDS[best]),
            max_box_acc_v2=float(multi.amax(1).mean()),
            gt_known=float(single[1, FIXED]),
            top1=float(both[FIXED]) if self.classified else None,
            top1_best=float(both[best]) if self.classified else None,
            accuracy=self.correct / self.images if self.classified else None,
            whole_image=float(centre[-1]),
            centre_half=float(centre[9]),
            centre_best=float(centre.amax()),
            centre_best_share=float(CENTRE_SHARES[centre.argmax()]),
            single=single,
            multi=multi,
        )


class PxAP:
    """Pixel average precision (PxAP) of heatmaps against masks: `accumulate` batches, then `compute`."""

    def __init__(self) -> None:
        # Scores of 1 get a bin of their own; the empty one above it lets recall start at 0.
        self.edges = torch.cat((THRESHOLDS, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
        self.foreground = torch.zeros(len(self.edges) - 1, dtype=torch.long)
        self.background = torch.zeros_like(self.foreground)

    def accumulate(
        self, heatmaps: Float[Tensor, "b H W"], masks: Bool[Tensor, "b H W"] | UInt8[Tensor, "b H W"]
    ) -> None:
        """Adds a batch.

        Args:
            heatmaps: values in 0..1.
            masks: 1 on the object, 0 beside it, 255 where it is not to be counted.
        """
        _check_heatmaps(heatmaps)
        masks = masks.to(torch.uint8)
        if ((masks > 1) & (masks < 255)).any():
            raise ValueError(
                f"Masks hold 0, 1 or 255 (ignore), but {int(masks[masks < 255].max())} came. "
                "Pass `mask > 0` if the values are classes or grey levels."
            )
        bins = torch.bucketize(heatmaps.double(), self.edges.to(heatmaps.device), right=True) - 1
        for hits, value in ((self.foreground, 1), (self.background, 0)):
            hits += torch.bincount(bins[masks == value], minlength=len(hits)).cpu()

    def compute(self) -> float:
        """Area under the precision-recall curve of all pixels accumulated so far, 0..1."""
        if not self.foreground.any():
            raise ValueError(
                "PxAP needs at least one foreground pixel, but none was accumulated. Check that masks are 1 "
                "on the object."
            )
        true, false = (hits.flip(0).cumsum(0).double() for hits in (self.foreground, self.background))
        precision, recall = true / (true + false).clamp(min=1), true / true[-1]
        return float((precision[1:] * recall.diff()).sum())


def _check_heatmaps(heatmaps: Float[Tensor, "b H W"]) -> None:
    if heatmaps.numel() == 0:
        return
    low, high = heatmaps.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            "Heatmaps must lie in 0..1, but values outside it or NaN came. Pass maps through maps.heatmap, "
            "which scales each of them by itself."
        )


def _check_boxes(boxes: list[Num[Tensor, "_ 4"]], images: int) -> None:
    if len(boxes) != images:
        raise ValueError(f"One tensor of boxes for each of {images} heatmaps was expected, but {len(boxes)} came.")
    for i, truth in enumerate(boxes):
        if len(truth) == 0:
            raise ValueError(
                f"Image {i} of the batch has no ground-truth box. Leave out images without boxes: "
                "nothing can be localised in them."
            )
        if (truth[:, 2:] < truth[:, :2]).any():
            raise ValueError(
                f"Boxes are (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, but image {i} of the batch has "
                f"{truth.tolist()}. Convert (x, y, width, height) first."
            )
