"""Tiny models of every variant, written once."""

import pytest

from models import load_family


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """``tiny_qwen(variant, layout)``: the folder of a tiny model, not to be changed by tests."""
    root = tmp_path_factory.mktemp("qwen_image")

    def folder(variant, layout="diffusers"):
        path = root / variant / layout
        if not path.exists():
            load_family("qwen_image").write_tiny(variant, path, layout, seed=0)
        return path

    return folder
