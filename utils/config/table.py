"""What the settings are made of: a TOML table, and kinds of values that several of them have."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# TOML has no paths, and the tables are strict about types.
FilePath = Annotated[Path, BeforeValidator(lambda value: Path(value).expanduser() if isinstance(value, str) else value)]
PositiveInt = Annotated[int, Field(ge=1)]


class Table(BaseModel):
    """A TOML table: unknown keys are errors, types are not coerced, values cannot be changed after reading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        validate_default=True,  # the validators of combinations speak up for keys that were not given, too
        allow_inf_nan=False,  # TOML knows inf and nan; no setting means anything with them
    )
