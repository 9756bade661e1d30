"""Validation of config fields, and their conversion to the stored form."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, SupportsIndex, cast

DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_INT = 2**31 - 1  # the largest int32, the dtype that counts steps and triplets
MAX_NUMBER = 2.0**127 * (2 - 2.0**-23)  # the largest float32, the dtype of the computation
MIN_NUMBER = 2.0**-126  # the smallest normal float32


@dataclasses.dataclass(frozen=True)
class MissingFunction:
    """Placeholder for a function that could not be saved with its config.

    Calling it raises a ValueError.

    Attributes:
      name: qualified name of the function.
    """

    name: str

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError(
            f"`config`: the function {self.name} was not saved with it; pass it again, with "
            "config.replace."
        )


def integer(name: str, value: SupportsIndex, *, minimum: int) -> int:
    """Return ``value`` as an int from ``minimum`` to the largest int32.

    Args:
      name: name of the field, for the message.
      value: the value to check; bool is not accepted.
      minimum: the smallest valid value.

    Raises:
      ValueError: ``value`` is not an integer in this range.

    >>> integer("init_r", 3, minimum=1)
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ValueError(
            f"`{name}={shown(value)}`: must be an integer of at least {minimum}; pass one."
        )
    if number > MAX_INT:
        raise ValueError(
            f"`{name}={shown(value)}`: must be at most {MAX_INT}, since it is counted in an int32; "
            "pass a smaller integer."
        )
    return number


def number(name: str, value: float, range_: str, ok: Callable[[float], bool]) -> int | float:
    """Return ``value`` as an int or float that satisfies ``ok`` and is within float32's range.

    Args:
      name: name of the field, for the message.
      value: the value to check; bool and str are not accepted.
      range_: description of ``ok``, for the message.
      ok: predicate on ``float(value)``.

    Raises:
      ValueError: ``value`` is not a number, does not satisfy ``ok``, or exceeds float32's range.

    >>> number("beta1", 0.85, "below 1", lambda v: v < 1)
    0.85
    """
    try:
        good = not isinstance(value, (bool, str)) and ok(float(value))
        fits = good and abs(float(value)) <= MAX_NUMBER
    except OverflowError:
        good, fits = True, False
    except (TypeError, ValueError):
        good = fits = False
    if not fits:
        limit = f", and at most {MAX_NUMBER:.3g}, the largest float32, in size" if good else ""
        raise ValueError(f"`{name}={shown(value)}`: must be {range_}{limit}; pass such a number.")
    return value if isinstance(value, int) else float(value)


def scaling(name: str, alpha: float, init_r: int) -> None:
    """Check that ``alpha / init_r``, if positive, is at least the smallest normal float32.

    Raises:
      ValueError: it is smaller; the message has ``name``, alpha and rank.

    >>> scaling("lora_alpha", 5e-324, 12)
    Traceback (most recent call last):
        ...
    ValueError: `lora_alpha=5e-324`: divided by init_r=12 it is below 1.18e-38, the smallest \
scale that float32 can represent; pass a larger lora_alpha.
    """
    if alpha > 0 and alpha / init_r < MIN_NUMBER:
        raise ValueError(
            f"`{name}={alpha!r}`: divided by init_r={init_r} it is below {MIN_NUMBER:.3g}, the "
            f"smallest scale that float32 can represent; pass a larger {name}."
        )


def shown(value: object) -> str:
    """Return ``repr(value)``, or the bit length of an integer of more than 256 bits.

    >>> shown(12), shown(10**5000)
    ('12', 'an integer of 16610 bits')
    """
    # Python raises an error for the repr of an integer of more than 4300 digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def choice(
    name: str, value: object, allowed: tuple[str | None, ...], or_callable: bool = False
) -> Any:
    """Return ``value`` if it is one of ``allowed``, or a function with ``or_callable``.

    Raises:
      ValueError: it is neither; the message has all choices.

    >>> choice("init", "zeros", ("gaussian", "lambda_one"))
    Traceback (most recent call last):
        ...
    ValueError: `init='zeros'`: must be one of 'gaussian', 'lambda_one'; pass one of these.
    """
    if or_callable and callable(value):
        return value
    if isinstance(value, (str, type(None))) and value in allowed:
        return allowed[allowed.index(value)]  # a subclass of str may have another repr
    options = ", ".join(repr(option) for option in allowed)
    raise ValueError(
        f"`{name}={value!r}`: must be one of {options}{', or a function' if or_callable else ''}; "
        "pass one of these."
    )


def regex(name: str, value: str) -> str:
    """Return ``value`` if it compiles as a regular expression.

    Raises:
      ValueError: it does not compile; the message has the field's name.

    >>> regex("exclude_modules", "(")
    Traceback (most recent call last):
        ...
    ValueError: `exclude_modules`: '(' is not a regular expression, missing ), unterminated \
subpattern at position 0; put a backslash before a special character that is meant literally.
    """
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"`{name}`: {value!r} is not a regular expression, {error}; put a backslash before a "
            "special character that is meant literally."
        ) from None
    return value


def names(
    name: str, value: str | Iterable[str] | Callable[..., Any] | None
) -> str | tuple[str, ...] | Callable[..., Any] | None:
    """Return a regex as a str, names as a tuple, and a function or None unchanged.

    In ``target_modules`` and ``exclude_modules`` a string is a regex and a function is accepted; in
    other fields a string is one name. The names in ``layers_pattern`` are regexes. Sets are sorted.

    Raises:
      ValueError: ``value`` is none of these, or a regex does not compile.

    >>> names("target_modules", {"value", "query"}), names("target_modules", ".*query")
    (('query', 'value'), '.*query')
    """
    selects = name in ("target_modules", "exclude_modules")
    if value is None or (selects and callable(value)):
        return value
    if isinstance(value, str) and selects:
        return regex(name, str.__str__(value))
    several = (value,) if isinstance(value, str) else value
    entries = None if isinstance(several, Mapping) or not isinstance(several, Iterable) else several
    result = tuple(entries or ())
    if entries is None or not all(isinstance(entry, str) and entry for entry in result):
        function = ", or a function" if selects else ""
        raise ValueError(
            f"`{name}={value!r}`: must be a list of names or a string{function}; use names such as "
            "['query', 'value']."
        )
    if isinstance(entries, (set, frozenset)):
        result = tuple(sorted(result))
    for entry in result if name == "layers_pattern" else ():
        regex(name, f"(?:{entry})")  # in a group, as it is used inside a longer regex
    return tuple(map(str.__str__, result))


def indices(name: str, value: int | Iterable[int] | None) -> int | tuple[int, ...] | None:
    """Return one index as an int, several as a tuple, and None unchanged. Sets are sorted.

    Raises:
      ValueError: an index is not an integer of at least 0.

    >>> indices("layers_to_transform", [0, 2]), indices("layers_to_transform", 3)
    ((0, 2), 3)
    """
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        return integer(name, cast("int", value), minimum=0)
    result = tuple(integer(name, entry, minimum=0) for entry in value)
    return tuple(sorted(result)) if isinstance(value, (set, frozenset)) else result


def rank_pattern(
    value: Mapping[str, Any] | Iterable[tuple[str, Any]] | None,
) -> tuple[tuple[str, Any], ...] | None:
    """Return ``{path: rank}`` or PEFT's ``{path: [True, False, ...]}`` as sorted, hashable pairs.

    A stack of layers has nested lists of booleans. An empty list is rank 0. None stays None.

    Raises:
      ValueError: ``value`` is not such a mapping, or a rank is negative or above int32.

    >>> rank_pattern({"query": 2, "key": [True, False]})
    (('key', (True, False)), ('query', 2))
    """
    if value is None:
        return None
    try:
        pairs = dict(value)
        result = {
            str(path): _triplets(rank) if isinstance(rank, (list, tuple)) else operator.index(rank)
            for path, rank in pairs.items()
        }
    except (TypeError, ValueError):
        raise ValueError(
            f"`rank_pattern={value!r}`: must map each adapter's path to its rank or to a list of "
            "booleans, one per triplet; pass a dict such as {'encoder/query': 4}."
        ) from None
    for path, rank in pairs.items():
        if not isinstance(rank, (list, tuple)):
            integer(f"rank_pattern[{path!r}]", rank, minimum=0)
    return tuple(sorted(result.items()))


def dtype_name(name: str, value: object) -> str:
    """Return the name of a dtype, which must be in :data:`DTYPES`.

    Raises:
      ValueError: it is not.

    >>> import jax.numpy as jnp
    >>> dtype_name("param_dtype", jnp.bfloat16)
    'bfloat16'
    """
    found = value if isinstance(value, str) else getattr(value, "name", None)
    if not isinstance(found, str):
        found = getattr(value, "__name__", None)
    if found not in DTYPES:
        raise ValueError(
            f"`{name}={value!r}`: must be one of {', '.join(DTYPES)}; pass one of these."
        )
    return DTYPES[DTYPES.index(found)]


def _triplets(keep: list[Any] | tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a list of booleans, or nested lists of them, as tuples.

    Raises:
      TypeError: a list mixes booleans with lists, or has other entries.
    """
    if all(isinstance(entry, bool) for entry in keep):
        return tuple(keep)
    if not all(isinstance(entry, (list, tuple)) for entry in keep):
        raise TypeError
    return tuple(map(_triplets, keep))
