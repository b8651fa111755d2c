"""Folders, tar files and lists of real pictures and clips: each file in them is a sample, or is told of."""

import csv
import io
import json
import logging
import os
import tarfile
from fractions import Fraction
from pathlib import Path

import pytest

from tests.utils.data.encode_worker import RULES
from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.media.pixels import load_pixels
from utils.data.sources.folders import Folder
from utils.data.sources.listing import Found
from utils.data.sources.scan import Scan, scan
from utils.data.values import ANY_CONTROLS, Bucket, Caption, ControlRules, SizeRules
from utils.errors import UserError


def found_in(path: Path, rules: SizeRules = RULES, controls: ControlRules = ANY_CONTROLS, **keys) -> Scan:
    own = {name: keys.pop(name) for name in [*keys] if name in DirectoryConfig.model_fields}
    settings = {"resolutions": [64], "frame_buckets": [1, 9]} | keys
    dataset = DatasetConfig(**settings, directory=[DirectoryConfig(path=path, **own)])
    return scan(dataset, rules, hash_cache=None, controls=controls, caption_seed=0)


def captions_in(path: Path, **keys) -> dict[str, str]:
    """Captions by the items' names in the directory."""
    samples = found_in(path, **keys).samples
    return {sample.key.removeprefix(f"{path.name}/").rpartition("@")[0]: sample.caption for sample in samples}


def refusal(path: Path, **keys) -> list[str]:
    with pytest.raises(UserError) as raised:
        found_in(path, **keys)
    return [line.removeprefix("  - ") for line in str(raised.value).splitlines()[1:]]


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folders_below_it_by_choice(small, tmp_path: Path):
    data = tmp_path / "data"
    for name in ("a.png", "sub/a.png", "sub/deep/b.png", ".hidden/c.png", "sub/.git/d.png"):
        small(data / name, name)
    assert captions_in(data) == {"a.png": "a.png"}
    assert found_in(data).report.lines()[-1] == "  not looked at: 1 sub-folder, 1 hidden file"
    assert captions_in(data, recursive=True) == {name: name for name in ("a.png", "sub/a.png", "sub/deep/b.png")}
    (data / "sub" / "captions.json").write_text(json.dumps({"a.png": "in the table", "b.png": "of another folder"}))
    (data / "sub" / "a.txt").unlink()
    assert captions_in(data, recursive=True)["sub/a.png"] == "in the table"


def test_links_in_circles_end(small, tmp_path: Path):
    data = tmp_path / "data"
    small(data / "a.png", "a")
    small(data / "sub" / "b.png", "b")
    elsewhere = tmp_path / "elsewhere"
    small(elsewhere / "c.png", "c")
    (data / "above").symlink_to(data)
    (data / "sub" / "up").symlink_to("..")
    (data / "again").symlink_to(data / "sub")
    (data / "linked").symlink_to(elsewhere)
    (data / "d.png").symlink_to(elsewhere / "c.png")
    (data / "d.txt").symlink_to(elsewhere / "c.txt")
    found = found_in(data, recursive=True)
    assert [sample.key for sample in found.samples] == [
        f"data/{name}@64x64x1" for name in ("a.png", "d.png", "linked/c.png", "sub/b.png")
    ]
    circle = "a link to a folder whose files are taken already"
    assert found.report.unused == {f"data/{name}/": circle for name in ("above", "again", "sub/up")}
    # The link and what it leads to are one content in two places.
    assert found.report.duplicates == [["data/d.png", "data/linked/c.png"]]


def test_what_is_no_file_is_named(small, tmp_path: Path):
    data = tmp_path / "data"
    small(data / "a.png", "a")
    os.mkfifo(data / "pipe.png")
    (data / "itself.png").symlink_to("itself.png")
    (data / "gone.png").symlink_to("nowhere.png")
    (data / "gone.dat").symlink_to("nowhere.dat")
    (data / "folder.png").mkdir()
    assert refusal(data) == [
        f"{data}/gone.png: it cannot be read (No such file or directory)",
        f"{data}/itself.png: it cannot be read (Too many levels of symbolic links)",
        f"{data}/pipe.png: it cannot be read (it is no file, but a folder, a pipe or a device)",
    ]
    report = found_in(data, on_bad_sample="skip").report
    assert {*report.skipped} == {"data/gone.png", "data/itself.png", "data/pipe.png"}
    assert report.unused == {"data/gone.dat": "it cannot be read (No such file or directory)"}


def test_files_that_vanish_meanwhile_are_named(small, tmp_path: Path, monkeypatch):
    data, controls = tmp_path / "data", tmp_path / "controls"
    for name in ("a.png", "b.png", "c.png"):
        small(data / name, name)
        small(controls / name)
    plain = Folder.found

    def vanishing(self: Folder, entry: os.DirEntry[str]) -> Found:
        if entry.path in (f"{data}/a.png", f"{controls}/b.png"):
            Path(entry.path).unlink()
        return plain(self, entry)

    monkeypatch.setattr(Folder, "found", vanishing)
    found = found_in(data, control_path=controls, on_bad_sample="skip")
    assert [sample.file.name for sample in found.samples] == ["c.png"]
    assert found.report.skipped == {
        "data/a.png": "it cannot be read (No such file or directory)",
        "data/b.png": f"there is no control picture of that name in {controls}; add b.png or the like",
    }


NAMES = [
    "with space and 'quotes' \"double\".png",
    "line\nend.png",
    "tab\tand \x7f.png",
    "自行车 🚲 e\u0301.png",
    "two..points.and.more.png",
    "-rf.png",
    "%s {0} $HOME `x` * ?.png",
    "a@64x64x1+5#3.png",
    ("ü" * 123) + ".png",  # 250 bytes
    "UPPER.PNG",
]


def test_names_of_any_kind(small, tmp_path: Path, caplog):
    data = tmp_path / "data"
    for name in NAMES:
        small(data / name, f"caption of {name.strip()}")
    undecodable = os.fsencode(data) + b"/caf\xe9.png"
    small(data / "plain.png").rename(os.fsdecode(undecodable))
    Path(os.fsdecode(undecodable.replace(b".png", b".txt"))).write_text("Latin-1")
    with caplog.at_level(logging.INFO):
        found = found_in(data)
    assert len(found.samples) == len(NAMES) + 1
    for sample in found.samples:
        assert sample.key.isprintable()
        assert sample.key.encode()
        assert load_pixels(sample.file, sample.bucket).shape == (3, 1, 64, 64)
        expected = "Latin-1" if "udce9" in sample.key else "caption of " + " ".join(sample.file.name.split())
        assert " ".join(sample.caption.split()) == expected
    for line in found.report.lines():
        line.encode()


def test_names_that_look_the_same_are_told_apart(small, tmp_path: Path):
    data = tmp_path / "data"
    for name in ("line\nend.png", "line\\nend.png"):
        small(data / name, name)
    keys = [sample.key for sample in found_in(data).samples]
    assert len({*keys}) == 2


def test_kohyas_folder_names(small, tmp_path: Path):
    data = tmp_path / "train"
    small(data / "10_sks dog" / "a.png")
    small(data / "10_sks dog" / "b.png", "its own")
    small(data / "3_cat" / "a.png")
    small(data / "3_cat" / "deep" / "c.png")
    small(data / "other" / "d.png", "d")
    small(data / "outside.png", "outside")
    found = found_in(data, kohya_folder_names=True, num_repeats=0.5)
    assert {sample.key: (sample.caption, sample.repeats) for sample in found.samples} == {
        "train/10_sks dog/a.png@64x64x1": ("sks dog", 5),
        "train/10_sks dog/b.png@64x64x1": ("its own", 5),
        "train/3_cat/a.png@64x64x1": ("cat", Fraction(3, 2)),
    }
    assert {*found.report.unused} == {"train/other/", "train/outside.png"}
    assert found.report.directories[0].shown == Fraction(23, 2)
    assert "train/3_cat/deep/c.png@64x64x1" in {
        sample.key for sample in found_in(data, kohya_folder_names=True, recursive=True).samples
    }
    assert "kohya_folder_names = true, and no folder in it is called" in refusal(data / "3_cat", kohya_folder_names=True)[0]
    assert captions_in(data / "10_sks dog", on_missing_caption="empty") == {"a.png": "", "b.png": "its own"}


# ── tar files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_members_of_one_stem_belong_together(small, assets, tmp_path: Path):
    pictures = {name: small(tmp_path / f"{name}.png").read_bytes() for name in "abcde"}
    clip = assets.clips["bikes.mp4"].read_bytes()
    long = "x" * 200
    tar = write_tar(
        tmp_path / "shard.tar",
        [
            ("0001.png", pictures["a"]),
            ("0001.txt", "a café".encode("utf-16")),
            ("./sub/0001.png", pictures["b"]),
            ("./sub/0001.json", b'{"caption": "in JSON"}'),
            ("0002.left.png", pictures["c"]),
            ("0002.txt", b"of both"),
            ("0002.cls", b"3"),
            (f"{long}/{long}.png", pictures["d"]),
            (f"{long}/{long}.txt", b"a long name"),
            ("._0001.png", b"of another system"),
            ("walk.mp4", clip),
            ("captions.json", b'{"walk.mp4": "a walk"}'),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    found = found_in(tar)
    assert captions_in(tar) == {
        "0001.png": "a café",
        "sub/0001.png": "in JSON",
        "0002.left.png": "of both",
        f"{long}/{long}.png": "a long name",
        "walk.mp4": "a walk",
    }
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked"
    by_name = {sample.file.member.removeprefix("./"): sample for sample in found.samples}
    assert by_name["sub/0001.png"].file.open().read() == pictures["b"]
    assert by_name["walk.mp4"].bucket == Bucket(64, 64, 9)
    assert by_name["walk.mp4"].file.open().read() == clip
    assert found.report.directories[0].kind == "tar"
    assert found.report.lines()[-1] == "  not looked at: 1 .cls, 1 hidden file"


def test_tar_files_in_a_folder_are_read_there(small, tmp_path: Path):
    data = tmp_path / "data"
    small(data / "a.png", "a")
    picture = small(tmp_path / "b.png").read_bytes()
    write_tar(data / "shard.tar", [("b.png", picture), ("b.txt", b"b"), ("c.png", picture + b"c")])
    (data / "captions.json").write_text('{"c.png": "c"}')
    assert captions_in(data) == {"a.png": "a", "shard.tar/b.png": "b", "shard.tar/c.png": "c"}


def test_tar_files_that_are_wrong(small, tmp_path: Path):
    picture, other = (small(tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    files = [("a.png", picture), ("a.txt", b"a"), ("b.png", other), ("b.txt", b"b")]
    tar = write_tar(tmp_path / "whole.tar", files)
    whole = tar.read_bytes()
    assert captions_in(tar) == {"a.png": "a", "b.png": "b"}

    cut = tmp_path / "cut.tar"
    with tarfile.open(tar) as opened:
        second = opened.getmember("b.png")
    cut.write_bytes(whole[: second.offset_data + 100])
    assert any("cut.tar" in line for line in refusal(cut)), refusal(cut)
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(whole[: second.offset] + b"\xff" * 512 + whole[second.offset + 512 :])
    assert refusal(damaged) == [
        f"{damaged}: its files behind byte {second.offset} of {len(whole)} cannot be found: it is damaged there, or several tar "
        "files were put into one"
    ]
    assert [sample.file.member for sample in found_in(damaged, on_bad_sample="skip").samples] == ["a.png"]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(whole + write_tar(tmp_path / "more.tar", [("c.png", picture)]).read_bytes())
    assert "several tar files were put into one" in refusal(joined)[0]
    none = tmp_path / "none.tar"
    none.write_bytes(b"no tar file" * 100)
    assert f"{none}: it does not read as a tar file" in refusal(none)[0]

    twice = write_tar(tmp_path / "twice.tar", [("a.png", other), *files[:2]])
    found = found_in(twice)
    assert found.samples[0].file.open().read() == picture, "as unpacking it would give"
    [(name, reason)] = found.report.unused.items()
    assert (name.partition(" at ")[0], reason) == ("twice.tar/a.png", "a later file of the same name in the tar file replaces it")
    with tarfile.open(tmp_path / "links.tar", "w") as opened:
        opened.add(tmp_path / "a.png", "a.png")
        opened.addfile(tarfile.TarInfo("a.txt"))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        opened.addfile(link)
    assert "it is a link" in found_in(tmp_path / "links.tar").report.unused["links.tar/b.png"]


@pytest.mark.parametrize(("suffix", "mode"), [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.xz", "w:xz"), (".tar", "w:bz2")])
def test_compressed_tar_files_are_refused(small, tmp_path: Path, suffix: str, mode: str):
    tar = write_tar(tmp_path / f"data{suffix}", [("a.png", small(tmp_path / "a.png").read_bytes())], mode)
    [message] = refusal(tar)
    assert str(tar) in message
    assert "uncompress it" in message


def test_other_files_are_no_directories(tmp_path: Path):
    (tmp_path / "data.parquet").write_bytes(b"?")
    advice = "name a folder, a .tar file, or a list of files that ends in .jsonl or .csv"
    assert refusal(tmp_path / "data.parquet") == [f"[[directory]] path = '{tmp_path}/data.parquet': {advice}"]
    (tmp_path / "data.jsonl").write_text("")
    assert refusal(tmp_path / "data.jsonl", recursive=True) == [
        f"[[directory]] path = '{tmp_path}/data.jsonl': recursive = true is for folders; remove it"
    ]


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_list(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
        )
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_list_says_everything(small, tmp_path: Path, suffix: str):
    a = small(tmp_path / "pictures" / "a.png", size=(160, 120))
    small(tmp_path / "pictures" / "b.png", "beside it")
    for name in ("mask.png", "left.png", "right.png"):
        small(tmp_path / "other" / name, size=(160, 120))
    rows = [
        {
            "path": "pictures/a.png",
            "caption": 'a "quoted",\nlong one',
            "mask": "other/mask.png",
            "control": ["other/left.png", "other/right.png"],
            "repeats": 2.5,
            "crop": [10, 20, 138, 116],
        },
        {"path": "pictures/b.png", "control": "other/left.png"},
        {"path": str(a), "caption": "the same again"},
    ]
    found = found_in(write_list(tmp_path / f"all{suffix}", rows), num_repeats=2)
    first, again, second = found.samples
    assert (first.key, again.key) == (f"all{suffix}/pictures/a.png@64x64x1", f"all{suffix}/pictures/a.png[2]@64x64x1")
    assert (first.caption, first.repeats, first.framing.box) == ('a "quoted",\nlong one', 5, (10, 20, 138, 116))
    assert first.mask.file.path == tmp_path / "other" / "mask.png"
    assert [control.file.name for control in first.controls] == ["left.png", "right.png"]
    assert (second.caption, second.repeats, [control.file.name for control in second.controls]) == ("beside it", 2, ["left.png"])
    assert (again.caption, again.controls, again.framing.box, again.mask) == ("the same again", (), None, None)
    report = found.report.directories[0]
    assert (report.kind, report.masked, report.unmasked) == ("list", 1, 0)
    assert report.cropped_most == pytest.approx(1 - 96 * 96 / (160 * 120), rel=0.01)


def test_captions_of_a_list_may_be_several(small, tmp_path: Path):
    small(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": ["one", {"caption": "two", "weight": 3}]}
    [sample] = found_in(write_list(tmp_path / "all.jsonl", [row])).samples
    assert sample.captions == (Caption("one", 1.0), Caption("two", 3.0))
    (tmp_path / "utf16.csv").write_bytes("path,text\r\na.png,a café\r\n".encode("utf-16"))
    assert captions_in(tmp_path / "utf16.csv") == {"a.png": "a café"}


def test_wrong_rows_are_named_with_their_lines(small, tmp_path: Path, caplog):
    small(tmp_path / "a.png", "a")
    small(tmp_path / "b.png", "b")
    path = tmp_path / "all.jsonl"
    lines = [
        '{"path": "a.png", "caption": "a", "colour": "red"}',
        "",
        '{"path": "gone.png", "caption": "a"}',
        "not JSON",
        "[]",
        '{"caption": "of nothing"}',
        '{"path": "b.png", "crop": [0, 0, 0, 9]}',
        '{"path": "b.png", "repeats": -1}',
        '{"path": "b.png", "repeats": "many"}',
        '{"path": "b.png", "mask": "gone.png"}',
        '{"path": "b.png", "control": [1]}',
        '{"path": "b.txt"}',
        '{"path": 3}',
        '{"path": "a.png", "caption": {"weight": 1}, "colour": "blue"}',
        '{"path": "a.png", "crop": [0, 0, 999, 10]}',
    ]
    path.write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        messages = refusal(path)
    assert [message.removeprefix(f"{path}:").partition(":")[0] for message in messages] == [
        str(line) for line in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ]
    assert messages[0] == f"{path}:3: gone.png: it cannot be read (No such file or directory)"
    assert messages[4] == f"{path}:7: crop is [left, top, right, bottom] in whole pixels, not the list [0, 0, 0, 9]"
    assert messages[-1] == f"{path}:15: crop = [0, 0, 999, 10] is no part of its 80x64 pixels"
    assert caplog.messages == [f"{path}: columns that are not read: colour"]
    assert captions_in(path, on_bad_sample="skip") == {"a.png": "a"}


def test_a_csv_that_is_wrong(small, tmp_path: Path):
    small(tmp_path / "a.png", "a")
    path = tmp_path / "all.csv"
    path.write_text('path,caption\na.png,one,two\na.png,"open\n')
    assert refusal(path) == [
        f"{path}:2: it has 3 cells, and the first line names 2 columns",
        f"{path}:3: it is not CSV (unexpected end of data)",
    ]
    path.write_text("path,path\na.png,one\n")
    assert refusal(path) == [f"{path}: the list cannot be read (its first line must name each column, and each once); correct it"]
    path.write_bytes(b"path,caption\na.png,caf\xe9\n")
    assert "all.csv: the list cannot be read (the list is not UTF-8 (byte" in refusal(path)[0]
    assert captions_in(path, caption_encoding="latin-1") == {"a.png": "café"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_hugging_faces_image_folders(small, tmp_path: Path, name: str):
    data = tmp_path / "data"
    small(data / "a.png")
    small(data / "b.png", "beside it")
    small(data / "train" / "c.png")
    small(data / "masks_a.png")
    rows = [
        {"file_name": "a.png", "text": "from the list", "mask": "masks_a.png"},
        {"file_name": "train/c.png", "text": "in a folder below"},
    ]
    write_list(data / name, rows)
    found = found_in(data)
    assert captions_in(data) == {"a.png": "from the list", "b.png": "beside it", "train/c.png": "in a folder below"}
    assert found.report.directories[0].lists == [name]
    assert f"  read from {name}" in found.report.lines()
    assert found.samples[0].mask.file.name == "masks_a.png"
    # Also where it is one of several folders.
    assert captions_in(tmp_path, recursive=True) == {
        "data/a.png": "from the list",
        "data/b.png": "beside it",
        "data/train/c.png": "in a folder below",
    }


def test_controls_of_a_list_are_as_many_as_the_model_takes(small, tmp_path: Path):
    for name in "abc":
        small(tmp_path / f"{name}.png", name)
    path = write_list(tmp_path / "all.jsonl", [{"path": "a.png", "control": ["b.png", "c.png"]}, {"path": "b.png"}])
    assert refusal(path, controls=ControlRules(1, 1)) == [
        f"{path}:1: it has 2 control pictures, and this model takes one control picture for each item",
        f"{path}:2: it has no control pictures, and this model takes one control picture for each item",
    ]
    path = write_list(tmp_path / "all.jsonl", [{"path": "a.png", "first_frame": "b.png"}])
    assert refusal(path) == [f"{path}:1: first_frame: this model is not shown any first frame; remove it"]
