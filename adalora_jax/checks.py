"""What the value of a config field may be: each check gives it back in the form that is kept."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class MissingFunction:
    """Stands in a config for a function that could not be saved with it."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"the function {self.name} was not saved with its config: give it again, with "
            "config.replace."
        )


def integer(name: str, value: Any, *, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``; ``name`` is for the message.

    Raises:
      ValueError: it is none.

    >>> integer("init_r", 3, minimum=1)
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")
    return number


def number(name: str, value: Any, range_: str, ok: Callable[[float], bool]) -> int | float:
    """``value`` as an int or a float for which ``ok`` holds; ``range_`` says it in words.

    >>> number("beta1", 0.85, "below 1", lambda v: v < 1)
    0.85
    """
    try:
        good = not isinstance(value, (bool, str)) and ok(float(value))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{name}={value!r} must be {range_}.")
    return value if isinstance(value, int) else float(value)


def choice(name: str, value: Any, allowed: tuple[str, ...], or_callable: bool = False) -> None:
    """Refuses what is not ``allowed``, nor a function where one may be given.

    >>> choice("init", "zeros", ("gaussian", "lambda_one"))
    Traceback (most recent call last):
        ...
    ValueError: init='zeros' must be one of 'gaussian', 'lambda_one'.
    """
    if (or_callable and callable(value)) or value in allowed:
        return
    options = ", ".join(repr(option) for option in allowed)
    raise ValueError(
        f"{name}={value!r} must be one of {options}{', or a function' if or_callable else ''}."
    )


def names(name: str, value: Any) -> Any:
    """A regex stays a string, a predicate a function; any other collection becomes a tuple.

    >>> names("target_modules", {"value", "query"}), names("target_modules", ".*query")
    (('query', 'value'), '.*query')
    """
    if value is None or callable(value):
        return value
    if isinstance(value, str):
        return (value,) if name in ("modules_to_save", "layers_pattern") else value
    try:
        result = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    except TypeError:
        result = (None,)
    if not all(isinstance(entry, str) and entry for entry in result):
        raise ValueError(f"{name}={value!r} must be a list of names or a string.")
    return result


def indices(name: str, value: Any) -> int | tuple[int, ...] | None:
    """One index, or several as a tuple.

    >>> indices("layers_to_transform", [0, 2]), indices("layers_to_transform", 3)
    ((0, 2), 3)
    """
    if value is None:
        return None
    many = isinstance(value, (list, tuple, set, frozenset, range))
    result = tuple(integer(name, entry, minimum=0) for entry in (value if many else (value,)))
    return result if many else result[0]


def rank_pattern(value: Any) -> tuple[tuple[str, Any], ...] | None:
    """A hashable form of ``{path: rank}`` or PEFT's ``{path: [True, False, ...]}``, sorted.

    The booleans of a stack of layers are lists in a list.

    >>> rank_pattern({"query": 2, "key": [True, False]})
    (('key', (True, False)), ('query', 2))
    """
    if value is None:
        return None
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        result = {
            str(path): _triplets(rank)
            if isinstance(rank, (list, tuple))
            else integer("rank_pattern", rank, minimum=0)
            for path, rank in pairs
        }
    except (TypeError, ValueError):
        raise ValueError(
            f"rank_pattern={value!r} must map each adapter's path to its rank or to a list of "
            "booleans, one a triplet."
        ) from None
    return tuple(sorted(result.items()))


def dtype_name(name: str, value: Any) -> str:
    """The name of a floating dtype.

    >>> import jax.numpy as jnp
    >>> dtype_name("param_dtype", jnp.bfloat16)
    'bfloat16'
    """
    found = value if isinstance(value, str) else getattr(value, "name", None)
    if not isinstance(found, str):
        found = getattr(value, "__name__", None)
    if found not in DTYPES:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(DTYPES)}.")
    return found


def _triplets(keep: Any) -> Any:
    if isinstance(keep, (list, tuple)):
        return tuple(map(_triplets, keep))
    if not isinstance(keep, bool):
        raise TypeError
    return keep
