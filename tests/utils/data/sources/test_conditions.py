"""Masks, control pictures and given frames: which file belongs to which item, what is missing, and what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.sources.scan import Scan, scan
from utils.data.values import SizeRules
from utils.errors import UserError

RULES = SizeRules(multiple=16, frame_step=4, fps=16.0)
SHOWN_FIRST = SizeRules(multiple=16, frame_step=4, fps=16.0, known_frames=("first",))


def scanned(path: Path, rules: SizeRules = RULES, **keys) -> Scan:
    own = {name: keys.pop(name) for name in [*keys] if name in DirectoryConfig.model_fields}
    dataset = DatasetConfig(resolutions=[64], frame_buckets=[1, 9], **keys, directory=[DirectoryConfig(path=path, **own)])
    return scan(dataset, rules, hash_cache=None)


def refusal(path: Path, **keys) -> list[str]:
    with pytest.raises(UserError) as raised:
        scanned(path, **keys)
    return [line.removeprefix("  - ") for line in str(raised.value).splitlines()[1:]]


def with_alpha(path: Path, alpha: int) -> None:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.putalpha(Image.fromarray(np.full((image.height, image.width), alpha, np.uint8)))
    image.save(path)


def test_masks_are_found_by_name_and_may_be_missing(small, tmp_path: Path):
    data, masks = tmp_path / "data", tmp_path / "masks"
    for name in ("a", "b", "c"):
        small(data / f"{name}.png", name)
    small(masks / "a.jpg")
    small(masks / "b.webp")
    small(masks / "lost.png")
    (masks / "notes.txt").write_text("not looked at")
    found = scanned(data, mask_path=masks)
    a, b, c = found.samples
    assert (a.mask.file.name, b.mask.file.name, c.mask) == ("a.jpg", "b.webp", None)
    assert len({a.mask.content, b.mask.content, a.content}) == 3
    [report] = found.report.directories
    assert (report.masked, report.unmasked, report.stray) == (2, 1, {str(masks): ["lost.png"]})
    assert "  with a mask: 2 files; without one, and counted everywhere: 1" in report.lines()


def test_masks_that_do_not_lie_on_their_items(small, mixed: Path, assets, tmp_path: Path, write_clip):
    masks = tmp_path / "masks"
    small(masks / "astronaut.png", size=(64, 64))
    small(masks / "coffee.png", size=(64, 64))
    masks_clip = write_clip("bikes.mp4", frames=40)
    masks_clip.rename(masks / "bikes.mp4")
    (masks / "carphone_pristine.png").write_bytes(b"no picture")
    messages = refusal(mixed, mask_path=masks)
    assert messages == [
        f"{mixed}/bikes.mp4: its mask {masks}/bikes.mp4: it has 26 frames at 16 fps, and the item has 160",
        f"{mixed}/carphone_pristine.mp4: its mask: {masks}/carphone_pristine.png: it is no picture that is read",
        f"{mixed}/coffee.png: its mask {masks}/coffee.png: it has 64x64 pixels, another shape than the item's 600x400",
    ]
    (masks / "astronaut.png").unlink()
    (masks / "bikes.mp4").rename(masks / "astronaut.mp4")
    assert any(
        line.startswith(f"{mixed}/astronaut.png: its mask {masks}/astronaut.mp4") for line in refusal(mixed, mask_path=masks)
    )
    kept = scanned(mixed, mask_path=masks, on_bad_sample="skip")
    assert {sample.file.name for sample in kept.samples} == {"bikes.mp4"}
    assert len(kept.report.skipped) == 3


def test_alpha_is_a_mask(small, tmp_path: Path):
    data, masks = tmp_path / "data", tmp_path / "masks"
    for name, alpha in (("half", 128), ("full", 255), ("both", 100)):
        with_alpha(small(data / f"{name}.png", name), alpha)
    small(data / "plain.png", "plain")
    small(masks / "both.png")
    memory = tmp_path / "files.json"
    for again in (False, True):
        dataset = DatasetConfig(resolutions=[64], directory=[DirectoryConfig(path=data, alpha_mask=True, mask_path=masks)])
        found = scan(dataset, RULES, hash_cache=memory)
        by_name = {sample.file.stem: (sample.alpha_mask, sample.mask is not None) for sample in found.samples}
        assert by_name == {"half": (True, False), "full": (False, False), "both": (False, True), "plain": (False, False)}, again
        assert (found.report.directories[0].masked, found.report.directories[0].unmasked) == (2, 2)
    # What is known of files whose transparency nobody asked for is not enough.
    plain = tmp_path / "plain.json"
    scan(DatasetConfig(resolutions=[64], directory=[DirectoryConfig(path=data)]), RULES, hash_cache=plain)
    assert [sample.alpha_mask for sample in scan(dataset, RULES, hash_cache=plain).samples] == [False, False, True, False]


def test_what_belongs_to_an_item_lies_at_its_place_or_under_its_name(small, tmp_path: Path):
    data, controls = tmp_path / "data", tmp_path / "controls"
    for name in ("one/a", "two/a", "two/b"):
        small(data / f"{name}.png", name)
    small(controls / "b.png")
    small(controls / "one" / "a.png", size=(48, 48))
    small(controls / "a.png")
    # Two items are called a: the one without a file at its place is not given the other's.
    assert refusal(data, control_path=controls, recursive=True) == [
        f"{data}/two/a.png: there is no control picture of that name in {controls}; add a.png or the like"
    ]
    small(controls / "two" / "a.jpg", size=(32, 48))
    found = scanned(data, control_path=controls, recursive=True)
    assert [sample.controls[0].file.path.relative_to(controls).as_posix() for sample in found.samples] == [
        "one/a.png",
        "two/a.jpg",
        "b.png",
    ]
    assert found.report.directories[0].stray == {str(controls): ["a.png"]}
    small(controls / "two" / "a.webp")
    assert refusal(data, control_path=controls, recursive=True) == [
        f"{data}/two/a.png: {controls} has two/a.jpg and two/a.webp for it; keep one of them"
    ]


def test_given_frames_are_for_models_that_are_shown_them(mixed: Path, small, tmp_path: Path):
    frames = tmp_path / "frames"
    small(frames / "bikes.png")
    small(frames / "coffee.png")
    assert refusal(mixed, first_frame_path=frames) == [
        f"[[directory]] {mixed}: first_frame_path = '{frames}': this model is shown no frame of a clip; remove the key"
    ]
    assert refusal(mixed, rules=SHOWN_FIRST, last_frame_path=frames) == [
        f"[[directory]] {mixed}: last_frame_path = '{frames}': this model is shown only the first frame of a clip; remove the key"
    ]
    missing = f"{mixed}/carphone_pristine.mp4: there is no picture of the first frame of that name in {frames}"
    assert refusal(mixed, rules=SHOWN_FIRST, first_frame_path=frames)[0].startswith(missing)
    small(frames / "carphone_pristine.png")
    found = scanned(mixed, rules=SHOWN_FIRST, first_frame_path=frames)
    given = {sample.file.name: [(end, control.file.name) for end, control in sample.known_frames] for sample in found.samples}
    assert given == {
        "astronaut.png": [],
        "bikes.mp4": [("first", "bikes.png")],
        "carphone_pristine.mp4": [("first", "carphone_pristine.png")],
        "coffee.png": [],  # a picture is one frame itself
    }
    assert found.report.directories[0].known_frames == 2
    rows = [
        {"path": "mixed/bikes.mp4", "first_frame": "frames/bikes.png"},
        {"path": "mixed/coffee.png", "first_frame": "frames/bikes.png"},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refusal(path, rules=SHOWN_FIRST) == [
        f"{path}:2: first_frame: it is a picture, and only a clip has a given first frame; remove it"
    ]
    [sample] = scanned(path, rules=SHOWN_FIRST, on_bad_sample="skip").samples
    assert [(end, control.file.name) for end, control in sample.known_frames] == [("first", "bikes.png")]
