"""What the value of a config field may be: each check gives it back in the form that is kept."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_INT = 2**31 - 1  # of int32, in which steps and triplets are counted
MAX_NUMBER = 2.0**127 * (2 - 2.0**-23)  # of float32, in which is computed
MIN_NUMBER = 2.0**-126  # the smallest that float32 holds in full precision


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
    """Return ``value`` as an int from ``minimum`` to the largest int32; ``name`` is for messages.

    Raises:
      ValueError: it is not such an integer.

    >>> integer("init_r", 3, minimum=1)
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name}={shown(value)} must be an integer of at least {minimum}.")
    if number > MAX_INT:
        raise ValueError(
            f"{name}={shown(value)} must be at most {MAX_INT}: it is counted in an int32."
        )
    return number


def number(name: str, value: Any, range_: str, ok: Callable[[float], bool]) -> int | float:
    """Return ``value`` as an int or a float that float32 can hold and for which ``ok`` is true.

    Args:
      name: of the field, for the message.
      value: to check.
      range_: what ``ok`` tests, in words.
      ok: a condition.

    Raises:
      ValueError: it is not such a number.

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
        limit = f", and at most {MAX_NUMBER:.3g} in size, as float32 is" if good else ""
        raise ValueError(f"{name}={shown(value)} must be {range_}{limit}.")
    return value if isinstance(value, int) else float(value)


def scaling(name: str, alpha: float, init_r: int) -> None:
    """Refuse an alpha whose ``alpha / init_r`` is not 0 but is so in float32.

    Raises:
      ValueError: naming ``name``, the alpha and the rank.

    >>> scaling("lora_alpha", 5e-324, 12)
    Traceback (most recent call last):
        ...
    ValueError: lora_alpha=5e-324 over init_r=12 is below 1.18e-38, too small a scale for \
float32: raise lora_alpha.
    """
    if alpha > 0 and alpha / init_r < MIN_NUMBER:
        raise ValueError(
            f"{name}={alpha!r} over init_r={init_r} is below {MIN_NUMBER:.3g}, too small a scale "
            f"for float32: raise {name}."
        )


def shown(value: Any) -> str:
    """Return ``repr(value)``, but not the digits of an astronomic integer.

    >>> shown(12), shown(10**5000)
    ('12', 'an integer of 16610 bits')
    """
    # Python itself refuses to print integers of more than 4300 digits.
    huge = isinstance(value, int) and value.bit_length() > 256
    return f"an integer of {value.bit_length()} bits" if huge else repr(value)


def choice(name: str, value: Any, allowed: tuple[Any, ...], or_callable: bool = False) -> Any:
    """Return a value that is ``allowed``, or a function where one may be given.

    Raises:
      ValueError: it is neither; naming all choices.

    >>> choice("init", "zeros", ("gaussian", "lambda_one"))
    Traceback (most recent call last):
        ...
    ValueError: init='zeros' must be one of 'gaussian', 'lambda_one'.
    """
    if or_callable and callable(value):
        return value
    if isinstance(value, (str, type(None))) and value in allowed:
        return allowed[allowed.index(value)]  # a subclass of str has another repr
    options = ", ".join(repr(option) for option in allowed)
    raise ValueError(
        f"{name}={value!r} must be one of {options}{', or a function' if or_callable else ''}."
    )


def regex(name: str, value: str) -> str:
    """Return a regular expression that compiles.

    Raises:
      ValueError: it does not; naming the field it was given for.

    >>> regex("exclude_modules", "(")
    Traceback (most recent call last):
        ...
    ValueError: exclude_modules: '(' is not a regular expression: missing ), unterminated \
subpattern at position 0.
    """
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {value!r} is not a regular expression: {error}.") from None
    return value


def names(name: str, value: Any) -> Any:
    """Return a regex as a string, any other collection of names as a tuple, and a function as is.

    A string is a regex in ``target_modules`` and ``exclude_modules``, and one name elsewhere; the
    names in ``layers_pattern`` are regexes.

    Raises:
      ValueError: it is none of them, or a regex that does not compile.

    >>> names("target_modules", {"value", "query"}), names("target_modules", ".*query")
    (('query', 'value'), '.*query')
    """
    selects = name in ("target_modules", "exclude_modules")
    if value is None or (selects and callable(value)):
        return value
    if isinstance(value, str) and selects:
        return regex(name, str.__str__(value))
    try:
        value = (value,) if isinstance(value, str) else value
        result: Any = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    except TypeError:
        result = (None,)
    if not all(isinstance(entry, str) and entry for entry in result):
        function = ", or a function" if selects else ""
        raise ValueError(f"{name}={value!r} must be a list of names or a string{function}.")
    for entry in result if name == "layers_pattern" else ():
        regex(name, f"(?:{entry})")  # as it is used, in the middle of another
    return tuple(map(str.__str__, result))


def indices(name: str, value: Any) -> int | tuple[int, ...] | None:
    """One index, or several as a tuple.

    >>> indices("layers_to_transform", [0, 2]), indices("layers_to_transform", 3)
    ((0, 2), 3)
    """
    if value is None:
        return None
    many = isinstance(value, (list, tuple, set, frozenset, range))
    result = tuple(integer(name, entry, minimum=0) for entry in (value if many else (value,)))
    if isinstance(value, (set, frozenset)):
        result = tuple(sorted(result))
    return result if many else result[0]


def rank_pattern(value: Any) -> tuple[tuple[str, Any], ...] | None:
    """A hashable form of ``{path: rank}`` or PEFT's ``{path: [True, False, ...]}``, sorted.

    The booleans of a stack of layers are lists in a list. An empty list is rank 0.

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
            f"rank_pattern={value!r} must map each adapter's path to its rank or to a list of "
            "booleans, one per triplet."
        ) from None
    for path, rank in pairs.items():
        if not isinstance(rank, (list, tuple)):
            integer(f"rank_pattern[{path!r}]", rank, minimum=0)
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
    return DTYPES[DTYPES.index(found)]


def _triplets(keep: list[Any] | tuple[Any, ...]) -> tuple[Any, ...]:
    """Booleans, or lists of them at the same depth, as tuples."""
    if all(isinstance(entry, bool) for entry in keep):
        return tuple(keep)
    if not all(isinstance(entry, (list, tuple)) for entry in keep):
        raise TypeError
    return tuple(map(_triplets, keep))
