"""Weakly supervised localisation: MaxBoxAcc, MaxBoxAccV2, GT-known and top-1 localisation, PxAP.

    BoxAcc(tau, delta) = mean over images of [ IoU(box at threshold tau, best ground-truth box) >= delta ]
    MaxBoxAcc          = max over tau of BoxAcc(tau, 0.5), box around the largest contour
    MaxBoxAccV2        = mean over delta in {0.3, 0.5, 0.7} of max over tau of BoxAcc(tau, delta), best of all contours
    PxPrec, PxRec(tau) = share of the pixels >= tau that are of the object, share of the object's pixels that are >= tau
    PxAP               = sum over i of PxPrec(tau_i) (PxRec(tau_i) - PxRec(tau_i-1)), pixels of the whole set pooled
                                                                                 Choe et al., CVPR 2020, section 4.1

One threshold serves the whole set: the maximum is taken after the mean over images. It is chosen on the images that it
is scored on, so MaxBoxAcc says how good a map is, not how good a localiser is; GT-known localisation at the fixed
threshold of the CAM paper (Zhou et al., CVPR 2016: 0.2 of the maximum) is reported beside it, and so are boxes that
never saw the image.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int, Num, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from course_lib.components import contour_boxes

HEATMAP_THRESHOLDS = torch.arange(1000).double() * 0.001  # shares of the heatmap's maximum
DELTAS = (0.3, 0.5, 0.7)
FIXED_THRESHOLD = 0.2  # of GT-known and top-1 localisation
FIXED = 200  # its index among HEATMAP_THRESHOLDS
BENCHMARK_THRESHOLDS = (
    torch.arange(100).double() * 0.01
)  # the coarser grid, of which the benchmark's scripts are run too
CENTRE_SHARES = torch.arange(1, 21).double() / 20  # shares of the image area; the last is all of it


def iou(a: Num[Tensor, "n 4"], b: Num[Tensor, "m 4"]) -> Float64[Tensor, "n m"]:
    """Intersection over union of boxes (x0, y0, x1, y1) with inclusive corners: a box is x1 - x0 + 1 pixels wide.

    A union without area gives 0.
    """
    return _iou(a[:, None], b)


def _iou(a, b):  # ... 4 each, which broadcast -> ...
    a, b = a.double(), b.double()
    inner = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2] + 1).clamp(min=0).prod(-1)
    union = sum((box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b)) - inner
    return torch.where(union > 0, inner / union, 0.0)


def squash_boxes(boxes: Num[Tensor, "n 4"], from_size: tuple[int, int], to_size: tuple[int, int]) -> Int[Tensor, "n 4"]:
    """Boxes of an image after it was resized to `to_size` without keeping its aspect: x -> int(x * new / old).

    Args:
        from_size: (width, height) of the image that the boxes belong to.
        to_size: (width, height) of the heatmap, such as (224, 224).
    """
    return (boxes.double() * boxes.new_tensor(to_size * 2) / boxes.new_tensor(from_size * 2)).long()


def baseline_boxes(size: tuple[int, int]) -> Int[Tensor, "20 4"]:
    """Centred boxes in the shape of the image that cover 5, 10, ..., 100 % of it (`CENTRE_SHARES`).

    Args:
        size: (height, width) of the heatmaps.
    """
    extent = torch.tensor(size[::-1])
    side = (extent * CENTRE_SHARES.sqrt()[:, None]).round().clamp(min=1)
    start = (extent - side) // 2
    return torch.cat((start, start + side - 1), 1).long()


def hits_by_size(found: Num[Tensor, "n 4"], true: Num[Tensor, "n 4"], groups: int) -> list[float]:
    """Share of boxes with IoU >= 0.5 with the true one, 0..1, in groups of images of equal number.

    Args:
        true: one box for each image; the groups run from the smallest area, (x1 - x0) (y1 - y0), to the largest.
    """
    hit = (_iou(found, true) >= 0.5).double()
    order = (true[:, 2:] - true[:, :2]).prod(1).argsort(stable=True)
    return [part.mean().item() for part in hit[order].tensor_split(groups)]


@dataclass(frozen=True)
class Localization:
    """Localisation accuracies of a set of images, as shares in 0..1. Curves run over the thresholds of `MaxBoxAcc`."""

    images: int
    max_box_acc: float  # largest contour, IoU >= 0.5, at the best threshold of the set
    best_threshold: float  # the one that reaches it; the lowest if there are several
    max_box_acc_v2: float  # all contours, mean over IoU 0.3, 0.5, 0.7 of each one's best
    gt_known: float  # largest contour, IoU >= 0.5, at 0.2 of the maximum or the threshold nearest to it
    top1: float | None  # as gt_known, and the class is right; None if nothing is known of classes
    top1_best: float | None  # as max_box_acc (same threshold), and the class is right
    accuracy: float | None  # share of images whose class is right
    whole_image: float  # a box around the whole image, IoU >= 0.5
    centre_half: float  # a centred box of half the image
    centre_best: float  # the best centred box
    centre_best_share: float  # its share of the image area
    single: Float64[Tensor, "3 s"]  # BoxAcc of the largest contour for IoU 0.3, 0.5, 0.7
    multi: Float64[Tensor, "3 s"]  # BoxAcc of the best of all contours

    def table(self) -> str:
        """Markdown table of the figures, in percent, one row each."""
        figures = {
            f"MaxBoxAcc (threshold {self.best_threshold:.3f})": self.max_box_acc,
            "MaxBoxAccV2": self.max_box_acc_v2,
            "GT-known, threshold 0.2": self.gt_known,
            "top-1 localisation, threshold 0.2": self.top1,
            f"top-1 localisation, threshold {self.best_threshold:.3f}": self.top1_best,
            "class accuracy": self.accuracy,
            "baseline: whole image": self.whole_image,
            "baseline: centred half of the image": self.centre_half,
            f"baseline: best centred box ({self.centre_best_share:.0%} of the image)": self.centre_best,
        }
        rows = (f"| {name} | {100 * figure:.1f} |" for name, figure in figures.items() if figure is not None)
        return "\n".join([f"| {self.images} images | % |\n|---|---|", *rows])


class MaxBoxAcc:
    """Localisation accuracy for all thresholds in one pass over the heatmaps: `accumulate` batches, then `compute`.

    Args:
        thresholds: ascending shares of the heatmap's maximum, from 0 to below 1. The finer the grid, the higher the
            maximum over it: figures compare on one grid only.
    """

    def __init__(self, thresholds: Float[Tensor, " s"] = HEATMAP_THRESHOLDS) -> None:
        self.thresholds = thresholds.double().cpu()
        if not (len(thresholds) and 0 <= thresholds[0] and thresholds[-1] < 1 and (thresholds.diff() > 0).all()):
            raise ValueError(
                f"Expected ascending thresholds from 0 to below 1, at least one, got {thresholds.tolist()[:5]} ...; "
                "give shares of the heatmap's maximum."
            )
        self.fixed = int((self.thresholds - FIXED_THRESHOLD).abs().argmin())
        self.images = self.correct = 0  # images, and those whose predicted class is right
        # Hits for each delta and threshold, with the box of the largest contour and with the best box of all contours.
        self.single, self.multi = torch.zeros(2, len(DELTAS), len(self.thresholds)).long()
        self.both = torch.zeros_like(self.single[1])  # hits at IoU 0.5 with the right class
        self.centre = torch.zeros_like(CENTRE_SHARES).long()
        self.classified = None  # does class_correct come along, True or False; None: not yet seen

    def accumulate(
        self,
        heatmaps: Float[Tensor, "b H W"],
        boxes: list[Num[Tensor, "_ 4"]],
        class_correct: Bool[Tensor, " b"] | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            heatmaps: values in 0..1, of the ground-truth class. For top-1 localisation the map of the predicted class
                is asked for; where the prediction counts, it is the same map.
            boxes: ground truth of each image, one or more boxes (x0, y0, x1, y1), inclusive, in pixels of the heatmap.
            class_correct: whether the predicted class of each image is right; given always or never.
        """
        check_heatmaps(heatmaps)
        if len(boxes) != len(heatmaps):
            raise ValueError(
                f"One tensor of boxes for each of {len(heatmaps)} heatmaps was expected, but {len(boxes)} came."
            )
        for i, truth in enumerate(boxes):
            if not len(truth):
                raise ValueError(
                    f"Image {i} of the batch has no ground-truth box. Leave out images without boxes: "
                    "nothing can be localised in them."
                )
            if (truth[:, 2:] < truth[:, :2]).any():
                raise ValueError(
                    f"Boxes are (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, but image {i} of the batch has "
                    f"{truth.tolist()}. Convert (x, y, width, height) first."
                )
        classified = class_correct is not None
        if self.classified not in (None, classified):
            raise ValueError(
                "class_correct came with some batches and not with others. Give it with all or with none of "
                "them: top-1 localisation is a share of all images."
            )
        if not boxes:
            return
        levels = (heatmaps * 255).byte()
        largest, image, level, box = map(Tensor.cpu, contour_boxes(levels))
        # Images with fewer boxes than others get some that lie outside and overlap with nothing.
        truth = pad_sequence(map(Tensor.cpu, boxes), batch_first=True, padding_value=-1)[:, None]  # b 1 most 4
        single = _iou(largest[:, :, None], truth).amax(2)  # b 256, IoU with the best ground-truth box
        every = _iou(box[:, None], truth[image, 0]).amax(1)
        multi = single.flatten().scatter_reduce(0, image * 256 + level, every, "amax").view_as(single)
        self.centre += (_iou(baseline_boxes(heatmaps.shape[1:])[:, None], truth).amax(2) >= 0.5).sum(0)
        at = (self.thresholds * levels.amax((1, 2)).cpu()[:, None]).long()  # b s
        delta = torch.tensor(DELTAS, dtype=torch.float64)[:, None, None]
        # BoxAcc (Choe et al., section 4.1), before the mean over images.
        single, multi = (best.gather(1, at) >= delta for best in (single, multi))  # 3 b s
        self.images += len(boxes)
        self.single += single.sum(1)
        self.multi += multi.sum(1)
        self.classified = classified
        if classified:
            self.correct += int(class_correct.sum())
            self.both += single[1, class_correct.cpu()].sum(0)

    def compute(self) -> Localization:
        """Accuracies of everything accumulated so far."""
        if not self.images:
            raise ValueError("Nothing to compute: no image was accumulated. Call accumulate(heatmaps, boxes) first.")
        single, multi, centre, both = (
            hits.double() / self.images for hits in (self.single, self.multi, self.centre, self.both)
        )
        best = single[1].argmax()
        return Localization(
            images=self.images,
            max_box_acc=float(single[1, best]),  # MaxBoxAcc (Choe et al., section 4.1)
            best_threshold=float(self.thresholds[best]),
            max_box_acc_v2=float(multi.amax(1).mean()),
            gt_known=float(single[1, self.fixed]),
            top1=float(both[self.fixed]) if self.classified else None,
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
        self.pixels = torch.zeros(2, len(HEATMAP_THRESHOLDS) + 2).long()  # of background, of the object

    def accumulate(
        self, heatmaps: Float[Tensor, "b H W"], masks: Bool[Tensor, "b H W"] | UInt8[Tensor, "b H W"]
    ) -> None:
        """Adds a batch.

        Args:
            heatmaps: values in 0..1.
            masks: 1 on the object, 0 beside it, 255 where it is not to be counted.
        """
        check_heatmaps(heatmaps)
        if ((masks > 1) & (masks < 255)).any():
            raise ValueError(
                f"Masks hold 0, 1 or 255 (ignore), but {int(masks[masks < 255].max())} came. "
                "Pass `mask > 0` if the values are classes or grey levels."
            )
        edges = torch.cat((HEATMAP_THRESHOLDS, torch.ones(1))).to(heatmaps.device)
        bins = torch.bucketize(heatmaps.double(), edges, right=True) - 1
        for value, pixels in enumerate(self.pixels):
            pixels += bins[masks == value].bincount(minlength=len(pixels)).cpu()

    def compute(self) -> float:
        """Area under the precision-recall curve of all pixels accumulated so far, 0..1."""
        if not self.pixels[1].any():
            raise ValueError(
                "PxAP needs at least one foreground pixel, but none was accumulated. Check that masks are 1 "
                "on the object."
            )
        false, true = self.pixels.flip(1).cumsum(1).double()
        precision, recall = true / (true + false).clamp(min=1), true / true[-1]  # PxPrec, PxRec (Choe et al.)
        return float((precision[1:] * recall.diff()).sum())  # PxAP (Choe et al.)


def check_heatmaps(heatmaps: Float[Tensor, "*batch H W"]) -> None:
    """Raises a ValueError if a heatmap holds a value outside 0..1, or NaN."""
    if heatmaps.numel() and not 0 <= heatmaps.amin() <= heatmaps.amax() <= 1:  # false for NaN
        raise ValueError(
            "Heatmaps must lie in 0..1, but values outside it or NaN came. Pass maps through maps.heatmap, "
            "which scales each of them by itself."
        )
