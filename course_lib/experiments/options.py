"""Options of commands, made of functions and dataclasses. Light to import: not every command needs torch."""

from collections.abc import Callable
from typing import Any

import tyro


def options(kind: Callable, argv: list[str], name: str, **more: Any) -> Any:
    """What a function or dataclass makes of options; a wrong one ends the program with a sentence and code 2.

    Args:
        name: of the command, for its help.
        more: as of `tyro.cli`, such as a `default`.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, args=argv, prog=f"python -m course_lib {name}", config=config, **more)
