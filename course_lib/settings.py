"""Settings that say in their types what they may be, and are checked where they are made.

    epochs: Count = 10                              from 1 to 1e9
    loss: Annotated[str, ("triplet", "center")]     one of these, as of a Literal
    methods: Annotated[tuple[str, ...], DISTINCT]   at least one, and none twice

A frozen dataclass calls `check_settings` in its `__post_init__`.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

DISTINCT = object()  # of a tuple: it has entries, and no entry twice
# Numbers from the first to the second of a pair; NaN is none of them.
Count = Annotated[int, (1, 1e9)]
Several = Annotated[int, (2, 1e9)]  # of what is compared
Whole = Annotated[int, (0, 1e9)]
Workers = Annotated[int, (0, 256)]  # processes; more would only fill the machine
RandomSeed = Annotated[int, (0, 2**32 - 1)]
Side = Annotated[int, (8, 8192)]  # of an image, pixels
Share = Annotated[float, (0, 1)]
PartialShare = Annotated[float, (0, 0.9999)]  # of all, nothing would be left
Positive = Annotated[float, (1e-12, 1e6)]
NotNegative = Annotated[float, (0, 1e6)]


def check_settings(settings: Any) -> None:
    """Nothing if every field is what its type says. None is left alone, and every entry of a tuple is looked at.

    Raises:
        ValueError: a sentence with what was expected and what came.
    """
    check_values(type(settings), vars(settings))


def check_values(owner: Any, values: Mapping[str, Any]) -> None:
    """The same for values by name that a class or function will get."""
    kinds = get_type_hints(owner, include_extras=True)
    for name, value in values.items():
        entries = value if isinstance(value, tuple) else () if value is None else (value,)
        for rule in _rules(kinds.get(name)):
            if rule is DISTINCT and len({*entries}) != max(1, len(entries)):
                raise ValueError(f"{name} must have one entry at least, and none twice, got {entries}.")
            for entry in entries:
                if isinstance(rule, tuple) and not rule[0] <= entry <= rule[1]:
                    raise ValueError(f"{name} must be from {rule[0]:g} to {rule[1]:g}, got {entry}.")
                if isinstance(rule, list) and entry not in rule:
                    kind = name.removesuffix("s") if isinstance(value, tuple) else name
                    raise ValueError(f"There is no {kind} {entry!r}; there are: {', '.join(map(str, rule))}.")


def _rules(kind: Any) -> Iterable:
    """Pairs, choices (as a list) and DISTINCT that stand anywhere in a type."""
    if get_origin(kind) is Literal:
        yield [*get_args(kind)]
    elif isinstance(kind, tuple) or kind is DISTINCT:
        yield [*kind] if kind is not DISTINCT and isinstance(kind[0], str) else kind
    else:
        for part in get_args(kind):
            yield from _rules(part)
