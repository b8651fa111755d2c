"""Tiny FLUX.2 models, written once."""

import pytest

from models import load_family

VARIANTS = load_family("flux2").variants


@pytest.fixture(scope="session")
def flux2(tmp_path_factory):
    """(variant, layout) -> the folder of the tiny model."""
    root = tmp_path_factory.mktemp("flux2")

    def folder(variant: str, layout: str = "diffusers"):
        place = root / layout / variant
        if not place.exists():
            load_family("flux2").write_tiny(variant, place, layout, seed=0)
        return place

    return folder


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param
