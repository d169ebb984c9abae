"""Value types that several sections share: byte sizes, times, store addresses, names out of a table; and their base
class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import PydanticKnownError, core_schema

from cache_store.errors import UserError
from cache_store.storage.open import parse_address
from orchestrator.units import TIMES, seconds_of

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B", re.IGNORECASE)
#: No store holds as much.
MOST_BYTES = 1 << 63
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(value: Any) -> Any:
    """Bytes as a number, or text such as `20GB`, `32 MiB`."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be bytes as a whole number, or text such as 20GB or 32MiB")
    number, unit = match.groups()
    base = 1024 if unit.lower().endswith("i") else 1000
    size = float(number) * base ** _UNITS[unit.lower().rstrip("i")]
    # As bounded as every number of a file; what is beyond a float is infinite here.
    if size >= MOST_BYTES:
        raise ValueError(f"must be less than {MOST_BYTES >> 60} EiB")
    return int(size)


def not_blank(value: str) -> str:
    """`value`; ValueError where it is empty or blank, and so names nothing."""
    if not value.strip():
        raise ValueError("must not be blank")
    return value


def _known_store(value: str) -> str:
    try:
        parse_address(value)
    except UserError as error:
        raise ValueError(error.message) from None
    return value


#: A path, id or address: what names something is not blank.
NonBlank = Annotated[str, AfterValidator(not_blank)]
StoreAddress = Annotated[NonBlank, AfterValidator(_known_store)]


def parse_seconds(value: Any) -> Any:
    """Seconds as a number, or text such as `90s`, `12h`, `7d`."""
    if not isinstance(value, str):
        return value
    seconds = seconds_of(value.strip())
    if seconds is None:
        raise ValueError(f"must be seconds as a number, or text such as {TIMES}")
    return seconds


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=1)]


@dataclass(frozen=True, eq=False)
class OneOf:
    """Allow the keys of a table, read when a value is checked. Refuses others in the words of a `Literal`."""

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.table:
            return value
        *names, last = [repr(name) for name in self.table]
        expected = f"{', '.join(names)} or {last}" if names else last
        raise PydanticKnownError("literal_error", {"expected": expected})


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def default_store(run_dir: str) -> str:
    return f"{run_dir}/store"
