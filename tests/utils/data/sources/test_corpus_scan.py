"""Every awkward input of the corpus in a data set: used rightly, or named with its reason; none is lost."""

from pathlib import Path

import pytest

from tests.utils.data.corpus import Awkward, Named, Used, awkward_inputs
from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.sources.scan import Scan, scan
from utils.data.values import SizeRules
from utils.errors import UserError

RULES = SizeRules(multiple=16, frame_step=1, fps=16.0)


@pytest.fixture(scope="module")
def corpus(assets, tmp_path_factory) -> list[Awkward]:
    return awkward_inputs(assets, tmp_path_factory.mktemp("awkward"))


def scan_folder(folder: Path, settings: dict, on_bad_sample: str) -> Scan:
    own = {name: value for name, value in settings.items() if name in DirectoryConfig.model_fields}
    whole = {name: value for name, value in settings.items() if name not in own}
    dataset = DatasetConfig(
        **{"resolutions": [32], "frame_buckets": [1, 2]} | whole,
        on_bad_sample=on_bad_sample,
        directory=[DirectoryConfig(path=folder, **own)],
    )
    return scan(dataset, RULES, hash_cache=None, caption_seed=0)


def complaint(one: Awkward, found: Scan) -> str | None:
    """What is wrong with how the scan took an input."""
    [report] = found.report.directories
    samples = [sample for sample in found.samples if sample.file.path == one.path]
    names = {**report.skipped, **report.unused}
    # Names are written on one line.
    called = one.path.name.encode("unicode_escape").decode() if not one.path.name.isprintable() else one.path.name
    reasons = [reason for name, reason in names.items() if name in (one.path.name, called)]
    if isinstance(one.outcome, Used) and not one.caption_problem:
        if len(samples) != 1 or reasons:
            return f"it has {len(samples)} samples, and is named for {reasons}"
        [sample] = samples
        info = one.outcome.info
        if sample.original_size != (info.width, info.height) or (sample.fps is None) != (info.fps is None):
            return f"its sample is {sample.original_size} at {sample.fps}, and it is {info}"
        if one.caption is not None and sample.caption != one.caption:
            return f"its caption is {sample.caption[:80]!r}"
        return None
    if samples:
        return f"it is a sample: {samples[0].key}"
    if len(reasons) != 1:
        return f"it is named {len(reasons)} times"
    expected = [one.outcome.reason] if isinstance(one.outcome, Named) else []
    expected += [one.caption_problem] if one.caption_problem else []
    return None if all(part in reasons[0] for part in expected) else f"{reasons[0]}, and it should be {expected}"


def test_awkward_inputs_become_samples_or_are_named(corpus: list[Awkward]):
    together = [one for one in corpus if not one.alone]
    found = scan_folder(together[0].path.parent, {}, "skip")
    wrong = [f"{one.name}: {problem}" for one in together if (problem := complaint(one, found))]
    for one in corpus:
        if one.alone:
            found_alone = scan_folder(one.path.parent, dict(one.settings), "skip")
            wrong += [f"{one.name}: {problem}"] if (problem := complaint(one, found_alone)) else []
    assert not wrong, "\n".join(wrong)
    # Nothing in the folder is left over: each file is a sample's, named, a caption, or counted.
    [report] = found.report.directories
    media = {one.path.name for one in together}
    samples = {sample.file.path.name for sample in found.samples}
    assert len(samples) + len(report.skipped) + len(report.unused) >= len(media)
    others = {path.name for path in together[0].path.parent.iterdir() if path.suffix.lower() != ".txt"} - media
    assert report.ignored.total() >= len(others)


def test_all_of_them_are_told_at_once(corpus: list[Awkward], monkeypatch):
    together = [one for one in corpus if not one.alone]
    bad = [one for one in together if isinstance(one.outcome, Named) or one.caption_problem]
    monkeypatch.setattr("utils.data.sources.scan.MAX_LISTED", 1000)
    with pytest.raises(UserError) as raised:
        scan_folder(together[0].path.parent, {}, "stop")
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) == len(bad)
    for one in bad:
        reason = one.outcome.reason if isinstance(one.outcome, Named) else one.caption_problem
        assert any(reason in line for line in lines), one.name
