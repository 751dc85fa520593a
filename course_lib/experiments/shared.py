"""What all experiments share: options, tables on disk, what to say after a training, miniatures in place of a path."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from course_lib import backbones, checkpoints, engine, paths
from course_lib.backbones import Backbone
from course_lib.published import DIST_CAM_TABLE_1

WEIGHTS = ("pretrained", "random")  # what a network starts from, where it is no path


def with_data(config: Any, miniature: Callable[[], Path]) -> Any:
    """A configuration whose empty `data` became the miniature, which is written if it is not there."""
    return config if config.data else replace(config, data=str(miniature()))


def timm_name(backbone: str) -> str:
    """timm's name of a network. Those of the paper's Table 1 get torchvision's first weights: the paper names none."""
    return f"{backbone}.tv_in1k" if backbone in DIST_CAM_TABLE_1 else backbone


def network(backbone: str, weights: str, classes: list[str], seed: int = 0) -> tuple[Backbone, bool]:
    """A network, and whether its classifier knows these classes (WordNet ids, in label order).

    Args:
        backbone: as in `timm_name`.
        weights: "pretrained", "random" (from `seed`) or the path of a checkpoint with a classifier for the classes. If
            it says that its loss has trained no classifier, the classifier knows nothing.
    """
    torch.manual_seed(seed)
    if weights in WEIGHTS:
        own = classes == list(dict(backbones.imagenet_classes()))
        return backbones.create(timm_name(backbone), weights == "pretrained"), own
    _, about = checkpoints.read(weights)
    return backbones.create(timm_name(backbone), weights, len(classes)), about.get("classifier") != "untrained"


def writable(folder: Path) -> Path:
    """The folder, made if need be, before any work begins; a sentence if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # another process may have been here
    except OSError as error:
        raise OSError(
            f"expected a folder to write into, got {folder}: {error.strerror}; name another --folder."
        ) from error
    return folder


def first_process() -> bool:
    """Whether this process is the one that writes and prints, among those of torchrun or alone."""
    return os.environ.get("RANK", "0") == "0"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def write(result: dict[str, Any], text: str, path: Path) -> dict[str, Any]:
    """Write a result as path.json and its table as path.md, in the main process only; returns the result."""
    if first_process():
        paths.write_text(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        paths.write_text(path.with_suffix(".md"), text)
    return result


def say(*lines: str) -> None:
    """Print lines, in the main process only."""
    if first_process():
        print(*lines, sep="\n")


def train_on_batches(
    learner: nn.Module,
    dataset: Dataset,
    batches: Iterable[list[int]],
    optimizer: Optimizer,
    config: Any,
    folder: Path | None,
    progress: bool,
    *,
    epochs: int | None = None,
    scheduler: LRScheduler | None = None,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch of a learner that is trained by its own `step`, as a configuration has it.

    Args:
        epochs: those of the configuration, if None.
    """
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers)
    plan = engine.Plan(epochs or config.epochs, config.precision, seed=config.seed, device=config.device)
    step = lambda model, batch: model.step(*batch)
    return engine.train(learner, step, loader, optimizer, plan, scheduler=scheduler, folder=folder, progress=progress)


def tell(history: list[dict[str, float]], folder: Path, evaluate: str) -> None:
    """Print the mean loss terms of each epoch, where the trained network lies, and how to go on; the main process does.

    Args:
        evaluate: what is evaluated next, as in "python -m course_lib evaluate seeds".
    """
    say(
        *(
            f"epoch {epoch:3}  " + "  ".join(f"{name} {value:.4g}" for name, value in row.items())
            for epoch, row in enumerate(history, 1)
        ),
        f"Trained: {folder / 'model.safetensors'}. "
        f"Evaluate it: python -m course_lib evaluate {evaluate} --checkpoint ...",
    )


def evaluated(kind: str, evaluate: Callable, table: Callable, config: Any, folder: Path | None) -> None:
    """Evaluate a configuration, print the table of the result, and leave both in the folder.

    Args:
        folder: None: one in build/KIND, named after network, weights and data.
    """
    weights = Path(config.checkpoint).absolute().parent.name if config.checkpoint else config.weights
    folder = folder or build_folder(kind, config.backbone, weights, Path(config.data).name)
    say(table(evaluate(config, writable(folder))))


def build_folder(kind: str, *parts: str) -> Path:
    """The folder that results go to if none is named: build/KIND/PART-PART-..."""
    return paths.results().parent / kind / "-".join(parts)
