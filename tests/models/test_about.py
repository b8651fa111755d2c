"""What the cache tells of its encoders: what they are and how they were set, nothing of the user's."""

import json

import pytest

from models import family_names, load_family


@pytest.mark.parametrize("name", family_names())
def test_encoders_tell_what_they_are_without_paths(name, tmp_path):
    Family = load_family(name)
    folder = tmp_path / "a place of the user"
    Family.write_tiny(Family.variants[0], folder, "diffusers", seed=0)
    for file in folder.glob("*/config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": "/home/somebody/model"}))
    for encoder in Family(Family.Options(type=name, path=folder, dtype="bfloat16")).encoders():
        about = encoder.about()
        text = json.dumps(about)
        assert about["encoder"] == encoder.name
        assert about["dtype"] in ("float32", "bfloat16")
        assert about["settings"]
        assert "a place of the user" not in text
        assert "somebody" not in text
