"""Whatever lies in a folder: each file is a sample or its caption, or is named, or counted."""

import io
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.captions.parsing import TABLE
from utils.data.sources.listing import MEDIA, divided
from utils.data.sources.report import FOLDERS
from utils.data.sources.scan import scan
from utils.data.values import SizeRules
from utils.errors import UserError

RULES = SizeRules(multiple=16, frame_step=None, fps=None)


def picture() -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).save(stream, "PNG")
    return stream.getvalue()


GOOD, BAD = picture(), b"no picture"

stems = st.sampled_from(["a", "b", "a.b", "A", "é"])
kinds = st.sampled_from([".png", ".PNG", ".txt", ".TXT", ".json", ".mp4", ".psd", "", ".tmp"])
names = st.one_of(
    st.builds("{}{}".format, stems, kinds),
    st.builds(".{}{}".format, stems, kinds),
    st.sampled_from([TABLE, "LICENSE", "Thumbs.db"]),
)
paths = st.builds("{}{}".format, st.sampled_from(["", "sub/", "sub/deep/", ".hidden/"]), names)
contents = st.sampled_from([GOOD, BAD, b"", b'"a caption"', b"\xff\xfe\x00", b"{}"])


@settings(max_examples=60)
@given(
    files=st.dictionaries(paths, contents, max_size=14),
    recursive=st.booleans(),
    missing=st.sampled_from(["error", "empty"]),
)
def test_every_file_is_accounted_for(files: dict[str, bytes], recursive: bool, missing: str):
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / "data"
        for name, content in {"good.png": GOOD, "good.txt": b"good"}.items():
            files.setdefault(name, content)
        for name, content in files.items():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_bytes(content)
        dataset = DatasetConfig(
            resolutions=[32],
            on_bad_sample="skip",
            on_missing_caption=missing,
            directory=[DirectoryConfig(path=top, recursive=recursive)],
        )
        refusal = ""
        try:
            found = scan(dataset, RULES, hash_cache=None)
        except UserError as error:
            refusal = str(error)
    if refusal:
        assert TABLE in refusal, "a broken table of captions is the one thing that no file can be skipped for"
        return
    [report] = found.report.directories
    seen = {name for name in files if "/" not in name or (recursive and not name.startswith(".hidden"))}
    samples = {sample.file.path.relative_to(top).as_posix() for sample in found.samples}
    assert samples <= seen
    assert not {*report.skipped} & {*report.unused}
    assert not ({*report.skipped} | {*report.unused}) & samples
    named = {*report.skipped, *report.unused}
    assert named <= seen
    items = {name for name in seen if divided(name)[1] in MEDIA and not Path(name).name.startswith(".")}
    assert items <= samples | named, "no picture and no clip is lost"

    # Of what is neither a sample nor named, a caption for each name of an item is used; the rest is counted.
    captions = set()
    for stem in {divided(name)[0] for name in items}:
        beside = sorted(name for name in seen if divided(name)[0] == stem and divided(name)[1] == ".txt")
        beside = beside or sorted(name for name in seen if divided(name)[0] == stem and divided(name)[1] == ".json")
        captions |= {name for name in beside[:1] if Path(name).name != TABLE}
    tables = {name for name in seen if Path(name).name == TABLE}
    counted = report.ignored.total() - report.ignored[FOLDERS]
    hidden_folders = any(name.startswith(".hidden/") for name in files)
    rest = seen - samples - named - captions
    assert len(rest - tables) <= counted - hidden_folders <= len(rest)
