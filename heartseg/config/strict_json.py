"""JSON values to dataclasses, strictly: an unknown key or a value of another kind is refused by name; NaN to null."""

import math

import cattrs
import numpy as np

from heartseg.errors import UserError


def none_if_nan(value: object) -> object:
    """A value as JSON can hold it: None for NaN and infinity, a Python float for NumPy's; anything else as it is."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def structure(value: object, kind: type, origin: str):
    """Build a dataclass `kind` from JSON values; raises UserError that names `origin` and the field that is wrong."""
    if not isinstance(value, dict):
        raise UserError(f"Bad configuration: {origin} is not a JSON object.")
    try:
        return _converter.structure(value, kind)
    except UserError:
        raise
    except Exception as error:
        problems = cattrs.transform_error(error, path=origin, format_exception=_say)
        raise UserError(f"Bad configuration: {problems[0].rstrip('.')}.") from error


def _say(error: BaseException, kind: type | None) -> str:
    """A problem in our own words if we raised it, otherwise in the converter's."""
    if isinstance(error, UserError):
        return str(error).rstrip(".")
    return str(error) if isinstance(error, ValueError) else cattrs.v.format_exception(error, kind)


def _strict(kind: type):
    def check(value, _):
        # bool is an int to Python, and an int is a fine float; nothing else passes for another kind.
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        raise ValueError(f"{value!r} is not of type {kind.__name__}")

    return check


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (int, float, str, bool):
    _converter.register_structure_hook(_kind, _strict(_kind))
