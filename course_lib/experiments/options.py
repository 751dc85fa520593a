"""Options of commands, made of functions and dataclasses. Light to import: not every command needs torch."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import tyro

from course_lib.settings import check_values


def options(kind: Callable, argv: list[str], name: str, **more: Any) -> Any:
    """What a function or dataclass makes of options; a wrong one ends the program with a sentence and code 2.

    Args:
        name: of the command, for its help.
        more: as of `tyro.cli`, such as a `default`.
    Raises:
        ValueError: an argument of the function is not what its type says, see `check_values`.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    kind = kind if isinstance(kind, type | partial) else checked(kind)
    return tyro.cli(kind, args=argv, prog=f"python -m course_lib {name}", config=config, **more)


def checked(function: Callable) -> Callable:
    """The function, refusing arguments as `check_settings` refuses fields."""

    @wraps(function)
    def call(*positional: Any, **named: Any) -> Any:
        check_values(function, inspect.signature(function).bind(*positional, **named).arguments)
        return function(*positional, **named)

    return call
