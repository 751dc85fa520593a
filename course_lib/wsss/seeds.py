"""Seeds: score maps of the tagged classes from several scales of an image, a label image from them, and their mIoU.

    python -m course_lib evaluate seeds --checkpoint runs/p2p/model.safetensors --data /data/VOCdevkit/VOC2012
    python -m course_lib evaluate seeds --checkpoint resnet38_contrast.pth --data ... --save      and write maps and seeds

At each scale the image and its mirror image pass the network as one batch. Maps are brought to the size of the image, turned
back, summed, scaled for each class by itself, and kept only for the classes that the image is tagged with: also on val, as in
the papers, so that the mIoU of seeds there is not that of a segmentation. Each method has its published way of reading them:

    method               maps                            of the sum over scales and flips s
    cam                  relu(cam)                       s / max s
    seam, seam+p2p       after PCM                       (s - min s) / (max s - min s)
    eps, eps+p2p         softmax over the classes        s / max s                                (PCM is not asked)

Where there is a PCM, the same network is also read the other way, with or without it. A pixel whose highest score is above a
threshold is of that class, else background. The threshold is the best of the set that is scored: an oracle, in the papers too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from course_lib import engine, paths
from course_lib.data.voc import IGNORE, Voc, write_mask
from course_lib.evaluate.segmentation import THRESHOLDS, Sweep, ThresholdSweep
from course_lib.prototypes import sum_over_processes
from course_lib.worlds import minis
from course_lib.wsss.cam_net import CamNet, load
from course_lib.wsss.contrast import min_max
from course_lib.wsss.views import resize

EPS = 1e-5  # beside a maximum, as released
SCALES = (0.5, 1.0, 1.5, 2.0)  # published, on VOC
# Best thresholds of the released scripts, and the papers' mIoU of seeds on VOC's train and val, %.
PUBLISHED = {"cam": 0.20, "seam": 0.26, "eps": 0.20, "seam+p2p": 0.26, "eps+p2p": 0.22}
PAPER = {
    "cam": {"train": 47.43},
    "seam": {"train": 55.41, "val": 52.54},
    "eps": {"train": 69.5},
    "seam+p2p": {"train": 61.54, "val": 58.41},
    "eps+p2p": {"train": 70.5},
}


class Reading(NamedTuple):
    """How scores are read from a `View`."""

    source: str  # its field
    activation: str  # of each pass: "relu", "softmax", or "" with the minimum of the sum subtracted (SEAM)


_PCM = {"with PCM": Reading("refined", ""), "without PCM": Reading("cam", "")}
_SOFTMAX = Reading("cam", "softmax")
# The published one comes first.
READINGS = {
    "cam": {"without PCM": Reading("cam", "relu")},
    "seam": _PCM,
    "seam+p2p": _PCM,
    "eps": {"without PCM": _SOFTMAX},
    "eps+p2p": {"without PCM": _SOFTMAX, "with PCM": _PCM["with PCM"]},
}


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, on what, and how."""

    checkpoint: str  # as `train wsss` writes it, or a released one
    data: str  # a folder in VOC's layout
    splits: tuple[str, ...] = ("train", "val")
    scales: tuple[float, ...] | None = None  # None: SCALES for ResNet38, else the image as it is
    batch_size: int = 8  # images of one size at a time
    limit: int | None = None  # images of a split; None: all
    workers: int = 0  # processes that read images
    threshold: float | None = None  # of seeds that are saved; None: the best one


@torch.inference_mode()
def score_maps(
    net: CamNet, images: UInt8[Tensor, "b 3 H W"], tags: Float[Tensor, "b t"], scales: Sequence[float] = (1.0,)
) -> dict[str, Float[Tensor, "b t H W"]]:
    """Scores in 0..1 of the classes from channel 1 on, for each reading of READINGS; 0 for classes without a tag.

    Args:
        net: in evaluation mode, on the device of images and tags.
        images: of one size.
        scales: factors of their sides, or of what these become if the network says at which size it looks (`scored_at`).
    """
    size, sums = images.shape[2:], {}
    longest = net.architecture.scored_at or max(size)
    for scale in scales:
        scaled = [max(1, round(side * scale * longest / max(size))) for side in size]
        these = (
            images
            if scaled == [*size]
            else transforms.resize(images, scaled, InterpolationMode.BICUBIC, antialias=True)
        )
        view = net(net.prepare(torch.cat((these, these.flip(-1)))))
        for name, reading in READINGS[net.architecture.method].items():
            maps = getattr(view, reading.source).float()
            if reading.activation == "softmax":
                maps = maps.softmax(1)
            elif reading.activation == "relu":
                maps = maps.relu()
            else:  # SEAM's network makes them as large as its input
                maps = resize(maps, tuple(scaled))
            maps = F.interpolate(maps[:, 1:], size, mode="bilinear", align_corners=False)
            straight, mirrored = maps.chunk(2)
            sums[name] = sums.get(name, 0) + straight + mirrored.flip(-1)
    readings = READINGS[net.architecture.method]
    return {
        name: scaled_scores(total, minimum=not readings[name].activation) * tags[:, :, None, None]
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
    score, best = scores.max(1)
    return torch.where(score > threshold, best + 1, 0)


def write_scores(path: Path, scores: Float[Tensor, "t H W"], tags: Float[Tensor, " t"]) -> None:
    """Keep the maps of the tagged classes in a compressed .npz file of bytes: scores are rounded to 1/255."""
    present = tags.nonzero()[:, 0].cpu()
    levels = (scores[present.to(scores.device)] * 255).round().byte().cpu()
    np.savez_compressed(path, classes=present.numpy(), levels=levels.numpy(), count=len(tags))


def read_scores(path: Path) -> Float[Tensor, "t H W"]:
    """Scores as `write_scores` kept them, zero where a class has no tag."""
    with np.load(path, allow_pickle=False) as file:
        levels = torch.from_numpy(file["levels"])
        scores = torch.zeros(int(file["count"]), *levels.shape[1:])
        scores[torch.from_numpy(file["classes"])] = levels / 255
    return scores


class Scored(Dataset):
    """Images of one split with what scores them: (index, image, tags, mask, where the confounded class's track is)."""

    def __init__(self, data: Voc):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        (image, tags), mask = self.data[index], self.data.mask(index)
        track = self.data.track(index) if self.data.confounded else torch.zeros_like(mask, dtype=torch.bool)
        return index, image, tags, mask, track


def evaluate(config: Evaluation, folder: Path, save: bool = False, progress: bool = True) -> dict[str, Any]:
    """mIoU of the seeds of each split and reading; writes `seeds.json` and `seeds.md`, returns the former.

    Several processes share the images.

    Args:
        save: also write `maps/SPLIT/ID.npz` (see `write_scores`) and `seeds/SPLIT/ID.png`, of the published reading.
    Raises:
        ValueError: the network knows other classes than the data.
    """
    process = engine.this_process()
    net = load(config.checkpoint).to(process.device, memory_format=torch.channels_last)
    architecture = net.architecture
    scales = config.scales or (SCALES if architecture.backbone == "resnet38" else (1.0,))
    result: dict[str, Any] = {
        "settings": asdict(config)
        | {
            "checkpoint": Path(config.checkpoint).name,
            "data": Path(config.data).name,
            "scales": scales,
            "world": minis.fingerprint(Path(config.data)),
        },
        "architecture": asdict(architecture),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "paper": PAPER[architecture.method],
        "splits": {},
    }
    tables = []
    for split in config.splits:
        data = Voc(config.data, split)
        if tuple(data.classes) != architecture.classes:
            raise ValueError(
                f"{config.checkpoint} is of a network for {', '.join(architecture.classes[1:])}, but the data has "
                f"{', '.join(data.classes[1:])}. Name the data that it was trained on."
            )
        maps = folder / "maps" / split if save else None
        batches = same_size(data, config.batch_size, config.limit)
        sweeps, tracks = _sweep(net, data, scales, batches, config.workers, maps, progress)
        result["splits"][split] = _rows(sweeps, tracks, data, architecture.method)
        first, best = next(iter(sweeps.items()))
        tables.append(f"## {split}, {first}\n\n{best.best.table()}\n")
        process.wait_for_everyone()
        if maps is not None and process.is_main_process:
            threshold = best.best_threshold if config.threshold is None else config.threshold
            _write_seeds(maps, folder / "seeds" / split, threshold)
    if process.is_main_process:
        paths.write_text(folder / "seeds.json", json.dumps(result, indent=1) + "\n")
        paths.write_text(folder / "seeds.md", table(result) + "\n" + "\n".join(tables))
    return result


def score(
    net: CamNet, data: Voc, scales: Sequence[float] = (1.0,), progress: bool = False
) -> dict[str, dict[str, Any]]:
    """mIoU of the seeds of a split for each reading of the network, the published one first, with all that `evaluate` writes.

    Args:
        net: in evaluation mode.
    """
    sweeps, tracks = _sweep(net, data, scales, same_size(data, Evaluation.batch_size), 0, None, progress)
    return _rows(sweeps, tracks, data, net.architecture.method)


def _sweep(
    net: CamNet,
    data: Voc,
    scales: Sequence[float],
    batches: list[list[int]],
    workers: int,
    maps: Path | None,
    progress: bool,
) -> tuple[dict[str, Sweep], dict[str, Int[Tensor, "t bins"]]]:
    """All thresholds for each reading: against the masks; and counts of the pixels of tracks with the confounded class's tag."""
    names = READINGS[net.architecture.method]
    sweeps, tracks = ({name: ThresholdSweep(data.classes) for name in names} for _ in range(2))
    process = engine.this_process()
    share = batches[process.process_index :: process.num_processes]
    loader = DataLoader(Scored(data), batch_sampler=share, num_workers=workers)
    device = net.trunk.mean.device
    if maps is not None:
        maps.mkdir(parents=True, exist_ok=True)
    for indices, images, tags, masks, track in tqdm(loader, data.split, disable=not progress):
        images, tags, masks, track = (tensor.to(device, non_blocking=True) for tensor in (images, tags, masks, track))
        if data.confounded:
            track = track & tags[:, data.classes.index(data.confounded) - 1].bool()[:, None, None]
        for number, (name, scores) in enumerate(score_maps(net, images, tags, scales).items()):
            sweeps[name].accumulate(scores, masks)
            tracks[name].accumulate(scores, torch.where(track, 0, IGNORE))
            if maps is not None and not number:
                for index, score, tag in zip(indices.tolist(), scores, tags):
                    write_scores(maps / f"{data.ids[index]}.npz", score, tag)
    return (
        {name: part.compute() for name, part in sweeps.items()},
        {name: sum_over_processes(part.counts)[0] for name, part in tracks.items()},
    )


def same_size(data: Voc, batch_size: int, limit: int | None = None) -> list[list[int]]:
    """Batches of indices, of images of one size each; the first `limit` images of the split."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, path in enumerate(data.images[:limit]):
        with Image.open(path) as image:  # the header only
            members.setdefault(image.size, []).append(index)
    return [
        group[start : start + batch_size] for group in members.values() for start in range(0, len(group), batch_size)
    ]


def _write_seeds(maps: Path, folder: Path, threshold: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(maps.glob("*.npz")):
        seed = hard_seeds(read_scores(path)[None], threshold)[0]
        write_mask(folder / f"{path.stem}.png", seed.byte().numpy())


def _rows(
    sweeps: dict[str, Sweep], tracks: dict[str, Int[Tensor, "t bins"]], data: Voc, method: str
) -> dict[str, dict[str, Any]]:
    return {name: _row(found, tracks[name], data, method) for name, found in sweeps.items()}


def _row(found: Sweep, track: Int[Tensor, "t bins"], data: Voc, method: str) -> dict[str, Any]:
    best = found.best
    row = {
        "miou": 100 * best.miou,
        "threshold": found.best_threshold,
        "precision": _mean(best.precision),
        "recall": _mean(best.recall),
        "published_threshold": PUBLISHED[method],
        "miou_there": 100 * found.at(PUBLISHED[method]).miou,
        "iou": {name: None if iou != iou else 100 * iou for name, iou in zip(best.classes, best.iou.tolist())},
        "curve": (100 * found.miou).tolist(),
    }
    if data.confounded:  # it is found by its track, and drags the mean
        row["miou_others"] = _mean(
            torch.tensor([iou for name, iou in zip(best.classes, best.iou) if name != data.confounded])
        )
    if track.any():
        above = (found.thresholds < found.best_threshold + EPS).sum()  # bins of scores above the best threshold
        row["track"] = 100 * float(track[data.classes.index(data.confounded) - 1, above:].sum() / track.sum())
    return row


def _mean(shares: Tensor) -> float:
    return 100 * float(shares.nanmean())


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, in percent, the papers' figures on VOC beside it."""
    settings, architecture = result["settings"], result["architecture"]
    rows = [(split, name, row) for split, readings in result["splits"].items() for name, row in readings.items()]
    tracked = any("track" in row for *_, row in rows)
    names = [
        "split",
        "maps",
        "mIoU",
        "at threshold",
        "precision",
        "recall",
        f"mIoU at {PUBLISHED[architecture['method']]:.2f}",
        *(["track taken for the class on it"] if tracked else []),
        "paper, VOC: mIoU",
    ]
    lines = [
        f"# Seeds of {architecture['method']} on {settings['data']}, {architecture['backbone']}",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for number, (split, name, row) in enumerate(rows):
        first = number == 0 or rows[number - 1][0] != split
        cells = [
            split,
            name,
            f"{row['miou']:.1f}",
            f"{row['threshold']:.2f}",
            f"{row['precision']:.1f}",
            f"{row['recall']:.1f}",
            f"{row['miou_there']:.1f}",
            *([f"{row['track']:.1f}" if "track" in row else ""] if tracked else []),
            str(result["paper"].get(split, "")) if first else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Masks choose the threshold, of each row by itself. Precision and recall are means over classes. Scales: "
        + ", ".join(f"{scale:g}" for scale in settings["scales"])
        + ", each with its mirror image."
    )
    if edge := [f"{split}, {name}" for split, name, row in rows if row["threshold"] in (THRESHOLDS[0], THRESHOLDS[-1])]:
        note += f" The best threshold is at the end of the sweep for {'; '.join(edge)}: the mIoU may be higher beyond."
    return "\n".join([*lines, "", note, ""])


def default_data(backbone: str) -> str:
    """The miniature that a command takes if none is named: creatures for the small trunk, photographs for the others."""
    return str(minis.mini_voc(source="creatures" if backbone == "small" else "photographs"))


def main(argv: list[str]) -> int:
    """`python -m course_lib evaluate seeds`: seed mIoU of a trained or released network, with and without PCM."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib evaluate seeds", description=main.__doc__, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--checkpoint", required=True, help="a model.safetensors of `train wsss`, or a released .pth")
    parser.add_argument("--data", help="folder of PASCAL VOC 2012 or of a miniature (default: mini-voc)")
    parser.add_argument("--splits", type=lambda text: tuple(text.split(",")), help="(default: train,val)")
    parser.add_argument(
        "--scales",
        type=lambda text: tuple(map(float, text.split(","))),
        help=f"(default: {','.join(map(str, SCALES))} for ResNet38, else 1)",
    )
    parser.add_argument("--batch-size", type=int, help=f"(default: {Evaluation.batch_size})")
    parser.add_argument("--limit", type=int, help="images of each split (default: all)")
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0)")
    parser.add_argument("--save", action="store_true", help="write score maps and seeds")
    parser.add_argument("--threshold", type=float, help="of the seeds that are saved (default: the best one)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: in build/seeds)")
    chosen = vars(parser.parse_args(argv))
    save, out = chosen.pop("save", False), chosen.pop("out", None)
    try:
        if "data" not in chosen:
            chosen["data"] = default_data(load(chosen["checkpoint"]).architecture.backbone)
        config = Evaluation(**chosen)
        checkpoint = Path(config.checkpoint)
        out = (
            out
            or paths.results().parent / "seeds" / f"{checkpoint.parent.name}-{checkpoint.stem}-{Path(config.data).name}"
        )
        evaluate(config, out, save)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    if engine.this_process().is_main_process:
        print((out / "seeds.md").read_text("utf-8"))
    return 0
