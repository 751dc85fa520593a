"""What all experiments share: options, tables on disk, what to say after a training, miniatures in place of a path."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import tyro

from course_lib import engine, paths

WEIGHTS = ("pretrained", "random")  # what a network starts from, where it is no path


def options(kind: Callable, argv: list[str], name: str, **more: Any) -> Any:
    """What a function or dataclass makes of options; a wrong one ends the program with a sentence and code 2.

    Args:
        name: of the command, for its help.
        more: as of `tyro.cli`, such as a `default`.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, args=argv, prog=f"python -m course_lib {name}", config=config, **more)


def with_data(config: Any, miniature: Callable[[], Path]) -> Any:
    """A configuration whose empty `data` became the miniature, which is written if it is not there."""
    return config if config.data else replace(config, data=str(miniature()))


def writable(folder: Path) -> Path:
    """The folder, made if need be, before any work begins; a sentence if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"expected a folder to write into, got {folder}: {error.strerror}; name another --folder."
        ) from error
    return folder


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def write(result: dict[str, Any], text: str, path: Path) -> dict[str, Any]:
    """Write a result as path.json and its table as path.md, in the main process only; returns the result."""
    if engine.this_process().is_main_process:
        paths.write_text(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        paths.write_text(path.with_suffix(".md"), text)
    return result


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    return {"torch": torch.__version__, "timm": timm.__version__}


def say(*lines: str) -> None:
    """Print lines, in the main process only."""
    if engine.this_process().is_main_process:
        print(*lines, sep="\n")


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
