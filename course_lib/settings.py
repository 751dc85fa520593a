"""Settings that are checked where they are made: a frozen dataclass calls `check_settings` in its `__post_init__`."""

from collections.abc import Iterable, Mapping
from typing import Any


def check_settings(
    settings: Any,
    *,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    known: Mapping[str, Iterable] | None = None,
) -> None:
    """Nothing if all is well; fields that are None are left alone, and of a tuple every entry is looked at.

    Args:
        positive: names of fields that must be above 0.
        not_negative: names of fields that must be 0 or above.
        known: names of fields -> the values that they may have.
    Raises:
        ValueError: a sentence with what was expected and what came.
    """
    for names, holds, wanted in (
        (positive, lambda x: x > 0, "above 0"),
        (not_negative, lambda x: x >= 0, "0 or above"),
    ):
        for name in names:
            for value in _entries(settings, name):
                if not holds(value):  # NaN too
                    raise ValueError(f"{name} must be {wanted}, got {value}.")
    for name, values in (known or {}).items():
        kind = name.removesuffix("s") if isinstance(getattr(settings, name), tuple) else name
        for value in _entries(settings, name):
            if value not in values:
                raise ValueError(f"There is no {kind} {value!r}; there are: {', '.join(map(str, values))}.")


def _entries(settings, name):
    value = getattr(settings, name)
    return () if value is None else value if isinstance(value, tuple) else (value,)
