"""Value types that several sections share: byte sizes, store addresses, the base class of a section."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from cache_store.errors import UserError
from cache_store.storage.open import parse_address

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B", re.IGNORECASE)
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
    return int(float(number) * base ** _UNITS[unit.lower().rstrip("i")])


def _known_store(value: str) -> str:
    try:
        parse_address(value)
    except UserError as error:
        raise ValueError(error.message) from None
    return value


StoreAddress = Annotated[str, AfterValidator(_known_store)]
Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def default_store(run_dir: str) -> str:
    return f"{run_dir}/store"
