"""Model families.  A folder with an ``__init__.py`` that exports ``Family`` is a family; there is no list to keep."""

import importlib
from pathlib import Path

from models.base import ModelFamily
from utils.config.describe import did_you_mean
from utils.errors import UserError


def family_names() -> list[str]:
    """Names that ``[model] type`` may have."""
    folders = Path(__file__).parent.iterdir()
    return sorted(folder.name for folder in folders if (folder / "family.py").is_file())


def load_family(name: str) -> type[ModelFamily]:
    """The family's class.  Only the family that is asked for is imported."""
    if name not in family_names():
        allowed = ", ".join(family_names())
        raise UserError(f"model.type = {name!r}: there is no such family; allowed: {allowed}{did_you_mean(name, family_names())}")
    return importlib.import_module(f"models.{name}").Family
