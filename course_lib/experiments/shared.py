"""What all experiments share: what is looked at before any work, folders, tables on disk, what to say afterwards."""

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from course_lib import backbones, checkpoints, engine, paths
from course_lib.backbones import Backbone
from course_lib.data.files import read_json
from course_lib.data.miniature import fingerprint
from course_lib.published import DIST_CAM_TABLE_1

WEIGHTS = ("pretrained", "random")  # what a network starts from, where it is no path
OURS = ("resnet12", "resnet38", "small")  # networks that are none of timm's
SETTINGS = "settings.json"  # by command, of what wrote into a folder
FREE = {"workers", "device", "save_every"}  # settings that change no figure


def prepared(config: Any, folder: Path | None, miniature: Callable[[], Path]) -> Any:
    """A configuration whose empty `data` became the miniature, which is written if it is not there.

    Before that everything is looked at that would stop the work later.

    Args:
        folder: to write into; None: not known yet.
    Raises:
        OSError: data or weights that are not there, or a folder that nothing can be written into.
        ValueError: a network or device that nobody knows.
    """
    engine.this_process(config.device)
    backbone = getattr(config, "backbone", OURS[0])
    if backbone not in OURS and not timm.is_model(backbone):
        raise ValueError(f"Expected one of timm's networks as --backbone, got {backbone!r}; see timm.list_models().")
    if config.data and not Path(config.data).is_dir():
        raise FileNotFoundError(f"A folder was expected as --data, got {config.data}, where there is none.")
    for name, path in _weights(config):
        if not Path(path).is_file():
            came = "a folder" if Path(path).exists() else "nothing"
            raise FileNotFoundError(
                f"A checkpoint was expected at {path}, got {came}; name an existing one as --{name}."
            )
    if folder:
        writable(folder)
    return config if config.data else replace(config, data=str(miniature()))


def _weights(config: Any) -> list[tuple[str, str]]:
    """Names and paths of the files of weights that a configuration asks for."""
    asked = (("weights", getattr(config, "weights", WEIGHTS[0])), ("checkpoint", getattr(config, "checkpoint", None)))
    return [(name, path) for name, path in asked if path not in (*WEIGHTS, None) and (path or name == "weights")]


def owner(command: str, *more: str, free: Iterable[str] = ()) -> Callable[[Callable], Callable]:
    """Makes a function of `config` and `folder` the only one that writes there, and refuse what has other settings.

    The settings are kept in the folder's settings.json. A lock ends with its process, even if that is killed.

    Args:
        command: that the function is known as.
        more: names of arguments that are settings too.
        free: names of settings that may change, beside FREE.
    """

    def own(function: Callable) -> Callable:
        @wraps(function)
        def call(*positional: Any, **named: Any) -> Any:
            given = inspect.signature(function).bind(*positional, **named).arguments
            new, folder = not given["folder"].exists(), writable(given["folder"])
            with _alone(folder):
                asked = settings_of(given["config"], {name: given.get(name) for name in more}, free)
                if changed := differences(folder, command, asked):
                    raise ValueError(
                        f"{folder} holds `{command}` with other settings: {'; '.join(changed)}. Name another --folder, "
                        f"such as {folder}-2, or remove this one."
                    )
                kept = _kept(folder)
                _keep(folder, kept | {command: asked})
                before = {*folder.iterdir()}
                try:
                    return function(*positional, **named)
                except BaseException:
                    if first_process() and {*folder.iterdir()} == before:  # nothing was made: other settings may follow
                        shutil.rmtree(folder) if new else _keep(folder, kept)
                    raise

        return call

    return own


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0) if first_process() else nullcontext()
    except Timeout:
        raise RuntimeError(
            f"Another run is writing into {folder}; wait until it is done, or name another --folder."
        ) from None
    with lock:
        yield


def _kept(folder: Path) -> dict[str, Any]:
    return read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}


def _keep(folder: Path, settings: dict[str, Any]) -> None:
    if first_process():
        paths.write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def settings_of(config: Any, more: dict[str, Any] | None = None, free: Iterable[str] = ()) -> dict[str, Any]:
    """All settings that figures follow from, as JSON has them: of data and weights what they are, not where."""
    asked = asdict(config) | {"data": f"{Path(config.data).name} ({fingerprint(Path(config.data))})"}
    for value in [value for value in asked.values() if isinstance(value, dict)]:
        asked |= value  # settings of contrast, say, each by its own name
    for name, path in _weights(config):
        with open(path, "rb") as file:
            asked[name] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    for name, value in (more or {}).items():
        asked |= asdict(value) if is_dataclass(value) else {name: value}
    kept = {name: value for name, value in asked.items() if name not in {*FREE, *free} and not isinstance(value, dict)}
    return json.loads(json.dumps(kept))


def differences(folder: Path, command: str, asked: dict[str, Any]) -> list[str]:
    """What the folder's own settings of a command say otherwise; nothing if it has none."""
    then = _kept(folder).get(command, asked)
    return [
        f"{name} was {then.get(name)} and is {asked.get(name)}"
        for name in {**then, **asked}
        if then.get(name) != asked.get(name)
    ]


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
    folder = folder or build_folder(kind, config, config.backbone, weights)
    say(table(evaluate(config, folder)))


def build_folder(kind: str, config: Any, *parts: str) -> Path:
    """The folder that results go to if none is named: build/KIND/PART-...-DATA; of other settings, one beside it."""
    folder, asked = paths.results().parent / kind / "-".join((*parts, Path(config.data).name)), settings_of(config)
    if differences(folder, f"evaluate {kind}", asked):
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:6]
        folder = folder.with_name(f"{folder.name}-{digest}")
    return folder
