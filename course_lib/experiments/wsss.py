"""Seeds on PASCAL VOC 2012: trainings from image tags, the mIoU of their seeds, and ablations of contrast.

    python -m course_lib train wsss --method seam+p2p --folder runs/p2p                     photographs, on a CPU
    python -m course_lib train wsss --method seam+p2p --backbone small --folder runs/b2     creatures, on a CPU
    torchrun --nproc-per-node 4 -m course_lib train wsss --method seam+p2p --backbone resnet38 --workers 8 \\
        --weights ilsvrc-cls_rna-a1_cls1000_ep-0001.params --data /data/VOCdevkit/VOC2012 --folder runs/voc    published
    python -m course_lib evaluate seeds --checkpoint runs/voc/model.safetensors --data /data/VOCdevkit/VOC2012
    python -m course_lib evaluate seeds --checkpoint resnet38_contrast.pth --data ... --save      writes maps and seeds
    python -m course_lib ablate --table 5 --folder runs/table5                                    Table 5 in miniature

Wang et al., CVPR 2020 (SEAM); Lee et al., CVPR 2021 (EPS); Du et al., CVPR 2022 (contrast, Tables 5 to 7). All score
seeds before any refinement. Where a setting is not named, that of the recipe of method and backbone holds.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from course_lib import engine
from course_lib.backbones.weights import LITE0
from course_lib.data.files import BrokenFile, existing, read_json
from course_lib.data.images import FORMATS
from course_lib.data.miniature import fingerprint
from course_lib.data.voc import VOC_COUNTS, Voc, write_mask
from course_lib.evaluate.segmentation import SEED_THRESHOLDS
from course_lib.experiments import shared
from course_lib.experiments.options import checked, options
from course_lib.lesson import versions
from course_lib.published import CONTRAST_TABLES, SEED_MIOU
from course_lib.settings import DISTINCT, Count, RandomSeed, Share, Workers, check_settings
from course_lib.worlds import minis
from course_lib.wsss.cam_net import CamNet, load
from course_lib.wsss.contrast import ContrastConfig
from course_lib.wsss.learner import train
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.recipes import TagTraining, recipe, rows
from course_lib.wsss.seeds import Scored, figures, hard_seeds, read_scores, sweeps, write_scores

SCALES = (0.5, 1.0, 1.5, 2.0)  # published, on VOC
SPLITS = ("train", "val")


@dataclass(frozen=True)
class SeedEvaluation:
    """What is evaluated, on what, and how."""

    checkpoint: str  # a model.safetensors of `train wsss`, or a released .pth
    data: str = ""  # a folder in VOC's layout; "": the miniature
    splits: Annotated[tuple[str, ...], tuple(VOC_COUNTS), DISTINCT] = SPLITS  # lists of images
    scales: tuple[Annotated[float, (0.1, 16)], ...] = ()  # none: 0.5 1 1.5 2 for ResNet38, else 1
    batch_size: Count = 8  # images of one size at a time
    limit: Count | None = None  # images of each split; None: all
    workers: Workers = 0  # processes that read images
    save: bool = False  # write score maps and seeds, too
    threshold: Share | None = None  # of the seeds that are written; None: the best one
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        check_settings(self)


@shared.owner("evaluate seeds", free=["save"])
def evaluate(config: SeedEvaluation, net: CamNet, folder: Path, progress: bool = True) -> dict[str, Any]:
    """mIoU of the seeds of each split and reading; writes `seeds.json` and `seeds.md`, returns the former.

    Several processes share the images. With `save` it also writes `maps/SPLIT/ID.npz` (see `write_scores`) and
    `seeds/SPLIT/ID.png`, of the published reading.

    Raises:
        ValueError: the network knows other classes than the data.
    """
    process, architecture = engine.this_process(config.device), net.architecture
    net = net.to(process.device, memory_format=torch.channels_last)
    scales = config.scales or (SCALES if architecture.backbone == "resnet38" else (1.0,))
    names = {"checkpoint": Path(config.checkpoint).name, "data": Path(config.data).name}
    result: dict[str, Any] = {
        "settings": asdict(config) | names | {"scales": scales, "world": fingerprint(Path(config.data))},
        "architecture": asdict(architecture),
        "versions": versions(),
        "paper": SEED_MIOU[architecture.method],
        "splits": {},
    }
    parts = []
    for split in config.splits:
        data, maps = Voc(config.data, split), folder / "maps" / split
        if tuple(data.classes) != architecture.classes:
            raise ValueError(
                f"Expected data with the classes of the network, {', '.join(architecture.classes[1:])}, got "
                f"{', '.join(data.classes[1:])}; name the data that it was trained on."
            )
        batches = same_size(data, config.batch_size, config.limit)[process.process_index :: process.num_processes]
        loader = DataLoader(Scored(data), batch_sampler=batches, num_workers=config.workers)
        keep = partial(write_scores, maps) if config.save else None
        found = sweeps(net, data, tqdm(loader, split, disable=not progress), scales, keep)
        result["splits"][split] = {name: figures(*pair, data, net.method.threshold) for name, pair in found.items()}
        name, (sweep, _) = next(iter(found.items()))
        parts.append(f"## {split}, {name}\n\n{sweep.best.table()}\n")
        process.wait_for_everyone()
        if config.save and process.is_main_process:
            threshold = sweep.best_threshold if config.threshold is None else config.threshold
            for path in sorted(maps.glob("*.npz")):
                seed = hard_seeds(read_scores(path)[None], threshold)[0]
                write_mask(_made(folder / "seeds" / split) / f"{path.stem}.png", seed.byte().numpy())
    return shared.write(result, "\n".join([table(result), *parts]), folder / "seeds")


def same_size(data: Voc, batch_size: int, limit: int | None = None) -> list[list[int]]:
    """Batches of indices, of images of one size each; the first `limit` images of the split.

    Raises:
        BrokenFile: images that cannot be read; without them the figures were those of another split.
    """
    members: dict[tuple[int, int], list[int]] = {}
    broken, paths = [], data.images[:limit]
    for index, path in enumerate(paths):
        try:
            with Image.open(existing(path), formats=FORMATS) as image:  # the header only
                members.setdefault(image.size, []).append(index)
        except Exception:  # broken bytes raise nearly anything
            broken.append(str(path))
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise BrokenFile(
            f"{len(broken)} of {len(paths)} images of {data.split} cannot be read, so there are no figures of it: "
            f"{', '.join(broken[:5])}{more}. Unpack them again."
        )
    return [
        group[start : start + batch_size] for group in members.values() for start in range(0, len(group), batch_size)
    ]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, in percent, the papers' figures on VOC beside it."""
    settings, architecture = result["settings"], result["architecture"]
    rows = [(split, name, row) for split, readings in result["splits"].items() for name, row in readings.items()]
    tracked = ["track"] if any("track" in row for *_, row in rows) else []
    lines, edges, papers = [], [], dict(result["paper"])
    for split, name, row in rows:
        shares = [
            f"{row[column]:.1f}" if column in row else "" for column in ("precision", "recall", "miou_there", *tracked)
        ]
        # The paper's figure stands beside its own reading, the first one.
        lines.append(
            [split, name, f"{row['miou']:.1f}", f"{row['threshold']:.2f}", *shares, str(papers.pop(split, ""))]
        )
        if row["threshold"] in (SEED_THRESHOLDS[0], SEED_THRESHOLDS[-1]):
            edges.append(f"{split}, {name}")
    there = f"mIoU at {TAG_METHODS[architecture['method']].threshold:.2f}"
    header = ["split", "maps", "mIoU", "at threshold", "precision", "recall", there]
    header += [*("track taken for the class on it" for _ in tracked), "paper, VOC: mIoU"]
    note = (
        "Masks choose the threshold, of each row by itself. Precision and recall are means over classes. Scales: "
        f"{', '.join(f'{scale:g}' for scale in settings['scales'])}, each with its mirror image."
    )
    if edges:
        note += f" The best threshold is at the end of the sweep for {'; '.join(edges)}: the mIoU may be higher beyond."
    title = f"# Seeds of {architecture['method']} on {settings['data']}, {architecture['backbone']}"
    return "\n".join([title, "", *shared.markdown(header, lines), "", note, ""])


@shared.owner("ablate", "number", "limit")
def ablate(
    number: int,
    config: TagTraining,
    random_seeds: Sequence[int],
    folder: Path,
    limit: Count | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """mIoU of the seeds of every row and random seed; writes `table5.json` (or 6, 7) and `.md`, returns the former.

    All rows of a random seed start from the same weights and see the same batches. What was interrupted goes on.

    Args:
        limit: images that score, of each split; None: all.
    Raises:
        ValueError: the folder holds another ablation.
    """
    path, trainings = folder / f"table{number}.json", rows(number, config)
    result: dict[str, Any] = {
        "table": number,
        "world": fingerprint(Path(config.data)),
        "limit": limit,
        "settings": json.loads(json.dumps({name: asdict(training) for name, training in trainings.items()})),
        "rows": {name: {} for name in trainings},
    }
    if path.is_file():
        result = read_json(path)
    for seed in random_seeds:  # a whole table of the first random seed comes first
        for name, training in trainings.items():
            if str(seed) in result["rows"][name]:
                continue
            own = folder / name.strip("+ ").replace(" ", "").lower() / f"seed{seed}"
            net, _ = train(replace(training, seed=seed), own, progress)
            evaluation = SeedEvaluation(
                str(own / "model.safetensors"),
                training.data,
                limit=limit,
                workers=training.workers,
                device=training.device,
            )
            found = evaluate(evaluation, net, own, progress)["splits"]
            result["rows"][name][str(seed)] = {
                split: {reading: row["miou"] for reading, row in found[split].items()} for split in SPLITS
            }
            shared.write(result, as_markdown(result), path)
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """Mean and sample standard deviation over random seeds, and each of them, in percent, beside the paper's figure."""
    lines = []
    for name, found in result["rows"].items():
        cells = [name]
        for split, figure in zip(SPLITS, (*CONTRAST_TABLES[result["table"]][name], "")):
            # The published way to read a method's maps comes first.
            scores = [next(iter(by_split[split].values())) for by_split in found.values()]
            each = ", ".join(f"{score:.1f}" for score in scores)
            cells += [f"{mean(scores):.1f} ± {stdev(scores):.1f} ({each})" if len(scores) > 1 else each, str(figure)]
        lines.append(cells)
    header = ["row", *(column for split in SPLITS for column in (split, f"paper, {split}"))]
    note = "Mean ± standard deviation over random seeds (each of them). Paper: VOC, ResNet38, median of three runs."
    return "\n".join([f"# Table {result['table']}, mIoU of seeds", "", *shared.markdown(header, lines), "", note, ""])


def train_command(argv: list[str]) -> None:
    """Train a network that makes seeds from image tags."""

    def command(config: TagTraining, folder: Path) -> None:
        """Train a network that makes seeds from image tags. What was interrupted goes on.

        The defaults are those of --method and --backbone. --preset paper: contrast as in the paper; --preset code: as
        released.

        Args:
            folder: of checkpoints and of the trained model.safetensors
        """
        _, history = shared.owner("train wsss")(train)(ready(config, folder), folder)
        shared.tell(history, folder, "seeds")

    with_recipe(command, argv, "train wsss")


def evaluate_command(config: SeedEvaluation, folder: Path | None = None) -> None:
    """Measure the seeds of a trained or released network, with and without PCM.

    Args:
        folder: of the results; None: one in build/seeds
    """
    config = shared.prepared(config, folder, lambda: miniature(load(config.checkpoint).architecture.backbone))
    net, checkpoint = load(config.checkpoint), Path(config.checkpoint).absolute()
    folder = folder or shared.build_folder("seeds", config, checkpoint.parent.name, checkpoint.stem)
    evaluate(config, net, folder)
    if shared.first_process():  # it wrote them
        print((folder / "seeds.md").read_text("utf-8"))


def ablate_command(argv: list[str]) -> None:
    """Measure rows of Table 5, 6 or 7 of pixel-to-prototype contrast."""

    def command(
        config: TagTraining,
        table: Literal[5, 6, 7],
        folder: Path,
        random_seeds: Annotated[tuple[RandomSeed, ...], DISTINCT] = (0, 1, 2),
        limit: Count | None = None,
    ) -> None:
        """Measure rows of Table 5, 6 or 7 of pixel-to-prototype contrast. What was interrupted goes on.

        The defaults are those of --method and --backbone. --preset paper: contrast as in the paper; --preset code: as
        released.

        Args:
            table: of Du et al., CVPR 2022
            folder: of checkpoints and of the table
            random_seeds: of the trainings; --seed is not asked
            limit: images of each split that score; None: all
        """
        result = ablate(table, ready(config, folder), random_seeds, folder, limit)
        shared.say(as_markdown(result))

    with_recipe(command, argv, "ablate")


def with_recipe(command: Callable, argv: list[str], name: str) -> None:
    """Run a command whose `config` is the recipe of --method, --backbone and --preset, changed by the other options."""

    def chosen(
        method: str = "seam+p2p", backbone: str = LITE0, preset: Literal["paper", "code"] | None = None
    ) -> TagTraining:
        config = recipe(method, backbone)
        presets = {"paper": ContrastConfig.paper(), "code": ContrastConfig.code(TAG_METHODS[method].saliency)}
        return replace(config, contrast=presets.get(preset, config.contrast))

    helping = [word for word in argv if word in ("-h", "--help")]
    asked = [word for word in argv if word not in helping]
    config, rest = options(chosen, asked, name, return_unknown_args=True)
    options(partial(checked(command), config=config), rest + helping, name)


def ready(config: TagTraining, folder: Path) -> TagTraining:
    """A configuration as `shared.prepared` makes it; a ValueError for options of contrast where the method has none."""
    ours, usual = (asdict(each.contrast) for each in (config, recipe(config.method, config.backbone)))
    changed = [name for name in ours if ours[name] != usual[name]]
    if changed and not TAG_METHODS[config.method].contrast:
        raise ValueError(
            f"Expected no options of contrast with the method {config.method}, got {', '.join(changed)}; leave them "
            "out, or take a method with p2p."
        )
    return shared.prepared(config, folder, partial(miniature, config.backbone))


def miniature(backbone: str) -> Path:
    """The data if none is named: creatures for the small trunk, photographs for the others."""
    return minis.mini_voc(source="creatures" if backbone == "small" else "photographs")
