"""The pictures and clips of a data set, with their captions: what is there, what is wrong with it, and which bucket each gets."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import assign, buckets_for, problems, settings_for
from utils.data.captions import read_folder
from utils.data.files import DataFile
from utils.data.media import CLIPS, PICTURES, MediaError, MediaInfo, frames_at, is_clip, probe
from utils.data.progress import ProgressLog
from utils.data.scan_report import MAX_LISTED, DirectoryReport, ScanReport, count
from utils.data.shards import write_atomically
from utils.data.values import ANY_CONTROLS, Bucket, Caption, Control, ControlRules, Sample, SizeRules
from utils.data.variants import first_caption, variants
from utils.errors import UserError, listed
from utils.stopping import Stopped

log = logging.getLogger(__name__)

NUM_THREADS = 8
_MEMORY_VERSION = 1


@dataclass(frozen=True)
class Scan:
    samples: list[Sample]
    """In the order of their keys."""
    report: ScanReport


def scan(
    dataset: DatasetConfig,
    rules: SizeRules,
    *,
    hash_cache: Path | None,
    controls: ControlRules = ANY_CONTROLS,
    caption_seed: int | None = None,
    stop: Callable[[], str] = lambda: "",
) -> Scan:
    """Look at every file of the data set and make the samples.

    Each file is hashed and probed once and then known by path, size and time of change, in the small file ``hash_cache``.
    ``caption_seed``: the seed that the samples' caption variants are drawn with; None, for evaluation: the first caption alone.
    Raises UserError, before any file is read, for settings that the model cannot take; then one with everything that is wrong:
    missing folders and captions, captions without a file, files that do not decode, nothing left to train on.  A file that no
    bucket takes is a warning.  ``stop`` is asked after each new file; with a reason to stop, what was looked at is remembered and
    Stopped raised.
    """
    if impossible := problems(dataset, rules, controls):
        raise UserError(listed(impossible, "the dataset does not fit the model:"))
    wrong: list[str] = []
    names: list[str] = []
    listings: list[_Listing] = []
    for index, directory in enumerate(dataset.directory):
        # A second folder of the same name gets its place in the file, so that keys stay unique.
        name = directory.path.resolve().name
        while name in names:
            name = f"{name}[{index}]"
        names.append(name)
        listings.append(_list(directory, settings_for(dataset, directory), wrong))
    paths = {path for listing in listings for path in listing.captions}
    paths |= {control for listing in listings for controls in listing.controls.values() for control in controls}
    looks = _look_at_all(sorted(paths), hash_cache, wrong, stop)
    if wrong:
        more = [f"and {len(wrong) - MAX_LISTED} more"] if len(wrong) > MAX_LISTED else []
        raise UserError(listed(wrong[:MAX_LISTED] + more, f"the data set has {count(len(wrong), 'problem')}:"))

    samples: list[Sample] = []
    reports: list[DirectoryReport] = []
    for name, directory, listing in zip(names, dataset.directory, listings, strict=True):
        settings = settings_for(dataset, directory)
        report = DirectoryReport(
            name,
            directory.path,
            num_repeats=settings.num_repeats,
            controls=len(directory.control_paths),
            uncaptioned=listing.uncaptioned,
            ignored=listing.ignored,
        )
        reports.append(report)
        samples += _samples(settings, rules, listing, looks, caption_seed, report)
        _warn_of_unused(report)
    if not samples:
        raise UserError(
            "the data set is empty: nothing in it can be trained on. Add captioned files, or frame_buckets that fit them. Found:\n"
            + "\n".join(ScanReport(reports).lines())
        )
    return Scan(sorted(samples, key=lambda sample: sample.key), ScanReport(reports))


def _samples(
    settings: DatasetConfig,
    rules: SizeRules,
    listing: "_Listing",
    looks: dict[Path, "_Look"],
    caption_seed: int | None,
    report: DirectoryReport,
) -> list[Sample]:
    """The samples of one directory: one for each file and resolution."""
    fps = settings.fps or rules.fps
    groups = buckets_for(settings, rules)
    samples = []
    for path, captions in listing.captions.items():
        look = looks[path]
        first = first_caption(captions, settings)
        texts: tuple[Caption, ...] = ()
        if caption_seed is not None:
            texts = variants(captions, f"{report.name}/{path.name}", caption_seed, settings)
        report.clips += is_clip(DataFile(path))
        report.pictures += not is_clip(DataFile(path))
        assigned = [assign(look.info, group, rules, fps) for group in groups]
        buckets = sorted({bucket for bucket in assigned if isinstance(bucket, Bucket)})
        if not buckets:
            report.unused[path.name] = str(assigned[0])
        for bucket in buckets:
            report.buckets[bucket] += 1
            samples.append(
                Sample(
                    key=f"{report.name}/{path.name}@{bucket}",
                    file=DataFile(path),
                    content=look.content,
                    caption=first,
                    bucket=bucket,
                    fps=fps if is_clip(DataFile(path)) else None,
                    first_frame=_first_frame(settings, look.info, bucket, fps),
                    repeats=Fraction(str(settings.num_repeats)),
                    controls=tuple(Control(DataFile(control), looks[control].content) for control in listing.controls[path]),
                    original_size=(look.info.width, look.info.height),
                    captions=texts if [text.text for text in texts] != [first] else (),
                    caption_dropout=settings.caption_dropout if caption_seed is not None else 0.0,
                )
            )
    return samples


def _first_frame(settings: DatasetConfig, info: MediaInfo, bucket: Bucket, fps: float | None) -> int:
    """Where the sample begins in its clip."""
    if settings.video_clip_mode == "single_beginning" or info.fps is None:
        return 0
    return (frames_at(info, fps) - bucket.frames) // 2


def _warn_of_unused(report: DirectoryReport) -> None:
    if report.unused:
        named = [f"{name}: {reason}" for name, reason in report.unused.items()]
        more = [f"and {len(named) - MAX_LISTED} more"] if len(named) > MAX_LISTED else []
        log.warning(listed(named[:MAX_LISTED] + more, f"{report.path}: {count(len(named), 'file')} cannot be used:"))


# ── what lies in a folder ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Listing:
    captions: dict[Path, tuple[Caption, ...]]
    """Pictures and clips with their captions."""
    uncaptioned: int
    """Those that have an empty one because there is none."""
    controls: dict[Path, list[Path]]
    """For each of them its control pictures, one from each folder of ``control_path``."""
    ignored: Counter[str]


def _list(directory: DirectoryConfig, settings: DatasetConfig, wrong: list[str]) -> _Listing:
    """The files of one folder, not of those in it; what is wrong is added to ``wrong``."""
    media: list[Path] = []
    texts: list[Path] = []
    others: dict[str, Path] = {}
    ignored: Counter[str] = Counter()
    try:
        entries = sorted(directory.path.iterdir())
    except OSError as error:
        wrong.append(
            f"[[directory]] path = {str(directory.path)!r}: the folder cannot be read ({error.strerror}); correct the path"
        )
        entries = []
    for path in entries:
        suffix = path.suffix.lower()
        if path.name.startswith("."):  # hidden; macOS leaves a "._clip.mp4" beside every clip on foreign disks
            continue
        if path.is_dir():
            ignored["/"] += 1
        elif suffix in PICTURES or suffix in CLIPS:
            media.append(path)
        elif suffix in (".txt", ".json"):
            texts.append(path)
        else:
            ignored[suffix] += 1
            others[path.stem] = path

    found = read_folder(media, texts, settings, wrong)
    stems = {path.stem for path in media}
    for path in found.unused:
        if path.suffix.lower() == ".json" or path.stem in stems:  # of another program, or a second one
            ignored[path.suffix.lower()] += 1
        elif path.stem in others:
            kinds = ", ".join(sorted(PICTURES | CLIPS))
            other = others[path.stem]
            wrong.append(f"{other}: it has a caption, but files of this kind are not read; convert it to one of {kinds}")
        else:
            wrong.append(f"{path}: a caption without a picture or clip of the same name; remove it, or add the file")
    return _Listing(found.captions, len(found.missing), _controls(directory, list(found.captions), wrong), ignored)


def _controls(directory: DirectoryConfig, media: list[Path], wrong: list[str]) -> dict[Path, list[Path]]:
    """The control pictures of each file: those of the same name in each folder of ``control_path``."""
    controls: dict[Path, list[Path]] = {path: [] for path in media}
    for folder in directory.control_paths:
        try:
            pictures = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES}
        except OSError as error:
            wrong.append(f"control_path = {str(folder)!r}: the folder cannot be read ({error.strerror}); correct the path")
            continue
        for path in media:
            if path.stem in pictures:
                controls[path].append(pictures[path.stem])
            else:
                wrong.append(f"{path}: there is no control picture of that name in {folder}; add {path.stem}.png or the like")
    return controls


# ── what is in a file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Look:
    """What a file holds."""

    content: str
    """BLAKE2b of its bytes."""
    info: MediaInfo


def _look_at_all(paths: list[Path], hash_cache: Path | None, wrong: list[str], stop: Callable[[], str]) -> dict[Path, _Look]:
    """Hash and probe the files that are new or changed; those that do not decode are added to ``wrong``."""
    remembered, reason = _read_memory(hash_cache), ""
    looks: dict[Path, _Look] = {}
    fresh: dict[str, dict[str, Any]] = {}
    pending: dict[Path, tuple[dict[str, int], Future[_Look]]] = {}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for path in paths:
            try:
                state = path.stat()
            except OSError as error:
                wrong.append(f"{path}: it cannot be read ({error.strerror})")
                continue
            stamp = {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
            known = remembered.get(str(path.resolve()))
            if known and known["stamp"] == stamp:
                looks[path] = _Look(known["content"], MediaInfo(**known["info"]))
            else:
                pending[path] = (stamp, pool.submit(_look, path))
        progress = ProgressLog("reading new files", len(pending))
        for number, (path, (stamp, future)) in enumerate(pending.items(), start=1):
            try:
                looks[path] = future.result()
                fresh[str(path.resolve())] = {"stamp": stamp, **asdict(looks[path])}
            except MediaError as error:
                wrong.append(str(error))
            progress.report(number)
            if reason := stop():
                pool.shutdown(wait=True, cancel_futures=True)
                break
    if hash_cache and fresh:
        # Read again: another run may have written meanwhile, and losing its part only costs time.
        memory = {"version": _MEMORY_VERSION, "files": {**_read_memory(hash_cache), **fresh}}
        write_atomically(hash_cache, json.dumps(memory).encode())
    if reason:
        raise Stopped(reason)
    return looks


def _look(path: Path) -> _Look:
    info = probe(DataFile(path))
    with path.open("rb") as file:
        return _Look(hashlib.file_digest(file, _blake2b).hexdigest(), info)


def _blake2b() -> "hashlib._Hash":
    return hashlib.blake2b(digest_size=20)


def _read_memory(hash_cache: Path | None) -> dict[str, dict[str, Any]]:
    """What is known of files by their path; nothing if the file is absent, broken, or of another version."""
    if hash_cache is None:
        return {}
    try:
        memory = json.loads(hash_cache.read_bytes())
        return memory["files"] if memory["version"] == _MEMORY_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
