"""The awkward clips: frames of a real one, written with times, sizes, turns and headers that the original lacks, or broken."""

import math
import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.utils.data.corpus import Corpus, Used
from utils.data.media.pixels import MediaInfo

SIZE = (160, 68)
FPS = 16.0


def real_frames(source: Path, number: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """uint8 [height, width, 3] each."""
    with av.open(str(source)) as container:
        return [
            frame.to_ndarray(width=size[0], height=size[1], format="rgb24") for frame in islice(container.decode(video=0), number)
        ]


def stored_frames(path: Path, stream: int = 0) -> list[np.ndarray]:
    """All frames as they lie in the file, with a plain loop."""
    with av.open(str(path)) as container:
        return [np.asarray(frame.to_image()) for frame in container.decode(container.streams.video[stream])]


def encode(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    shown_at: Callable[[int], int] = lambda index: index,
    prepare: Callable[[av.VideoStream], None] = lambda stream: None,
    beside: Callable[[av.container.OutputContainer], Callable[[], None]] = lambda container: lambda: None,
) -> Path:
    """A clip of 25 fps, frame ``i`` shown at ``shown_at(i) / 25`` seconds.  ``beside`` adds a stream, and returns what fills it."""
    frames = list(frames)
    channels = {3: "rgb24", 4: "rgba"}[frames[0].shape[2]]
    with av.open(str(path), "w", options=container_options or {}) as target:
        fill_first = beside(target)
        stream = target.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        prepare(stream)
        fill_first()
        for index, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(values, channels).reformat(format=pixels)
            frame.pts, frame.time_base = shown_at(index), Fraction(1, 25)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


def at_16_fps(number: int, times: list[Fraction] | None = None, first: int = 0) -> list[int]:
    """Source frames nearest to ``number`` times a sixteenth of a second apart, of two equally near the earlier."""
    if times is None:
        return [math.ceil(Fraction(25, 16) * (first + i) - Fraction(1, 2)) for i in range(number)]
    targets = [times[0] + Fraction(first + i, 16) for i in range(number)]
    return [min(range(len(times)), key=lambda index: (abs(times[index] - target), index)) for target in targets]


def clip(
    frames: int = 24,
    turn: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
    stored: Callable[[Path], list[np.ndarray]] = stored_frames,
    times: list[Fraction] | None = None,
    shown: int = 9,
    tolerance: int = 0,
) -> Callable[[Path], Used]:
    """A clip of which ``shown`` frames at 16 fps must be the stored ones nearest in time, turned."""

    def outcome(path: Path) -> Used:
        upright = [np.ascontiguousarray(turn(frame)) for frame in stored(path)]
        assert len(upright) == frames, (path, len(upright))
        height, width = upright[0].shape[:2]
        fps = 25.0 if times is None else float((frames - 1) / (times[-1] - times[0]))
        indices = at_16_fps(shown, times)
        return Used(MediaInfo(width, height, frames, fps), np.stack([upright[i] for i in indices]), tolerance, FPS)

    return outcome


def rotated(degrees: int, **mirror: bool) -> Callable[[av.VideoStream], None]:
    return lambda stream: stream.set_display_rotation(degrees, **mirror)


def add_clips(corpus: Corpus) -> None:
    bikes = corpus.clips["bikes.mp4"]
    frames = real_frames(bikes, 24)

    def written(**options) -> Callable[[Path], Path]:
        return lambda path: encode(path, options.pop("frames", frames), **options)

    phone = corpus.clips["carphone_distorted.mp4"]
    corpus.add("pixels that are not square", phone.name, phone.read_bytes(), square(phone))

    # Each frame is shown a little later than at 25 fps, and two stand still for long.
    delays = [index + index // 5 + (6 if index >= 7 else 0) + (9 if index >= 15 else 0) for index in range(24)]
    times = [Fraction(delay, 25) for delay in delays]
    corpus.add("variable frame rate", "vfr.mkv", written(shown_at=delays.__getitem__), clip(times=times, shown=21))
    corpus.add("variable frame rate in mp4", "vfr.mp4", written(shown_at=delays.__getitem__), clip(times=times, shown=21))
    corpus.add("streamed MKV", "live.mkv", written(container_options={"live": "1"}), clip())
    corpus.add("begins late", "late.mkv", written(shown_at=lambda index: index + 50), clip())
    for degrees in (90, 180, -90):
        corpus.add(
            f"turned by {degrees} degrees",
            f"turned {degrees}.mp4",
            written(prepare=rotated(degrees)),
            clip(turn=lambda frame, degrees=degrees: np.rot90(frame, degrees // 90)),
        )
    corpus.add("mirrored", "mirrored.mov", written(prepare=rotated(0, hflip=True)), clip(turn=lambda frame: frame[:, ::-1]))
    odd = real_frames(bikes, 24, (161, 67))
    corpus.add("odd size", "odd.mp4", written(frames=odd, pixels="yuv444p"), clip())
    corpus.add("odd size, halved colours", "odd.avi", written(frames=odd, codec="mpeg4"), clip())
    corpus.add("AVI with B-frames", "b.avi", written(options={"bf": "3"}), clip())
    corpus.add("MPEG program stream", "dvd.mpg", written(codec="mpeg2video"), clip())
    corpus.add("Flash", "old.flv", written(codec="flv"), clip())
    corpus.add(
        "colours of BT.709",
        "hd.mp4",
        written(pixels="yuv444p", options={"crf": "0"}, prepare=_tagged(colorspace=1, primaries=1, transfer=1)),
        clip(),
    )
    alpha = np.zeros((68, 160, 1), np.uint8)
    alpha[:, 80:] = 255
    with_alpha = [np.concatenate([frame, alpha], axis=-1) for frame in frames]
    over_white = [np.where(alpha == 255, frame, 255).astype(np.uint8) for frame in frames]
    corpus.add(
        "transparent clip",
        "alpha.mov",
        written(frames=with_alpha, codec="png", pixels="rgba"),
        clip(stored=lambda path: over_white),
    )
    corpus.add("10 bits", "ten.mkv", written(codec="ffv1", pixels="yuv420p10le"), clip())
    corpus.add("one frame", "one.mp4", written(frames=frames[:1]), _one_frame)
    corpus.add("cover picture", "cover.mp4", written(beside=_cover(frames[0])), clip())
    corpus.add("two video streams", "two.mkv", written(beside=_second_stream(frames[::-1])), clip())
    corpus.add("with sound", "sound.mp4", written(beside=_sound), clip())
    corpus.add("edit list", "edited.mp4", lambda path: _with_edit_list(path, frames), _edited(frames))
    corpus.add("wrong count in the header", "count.avi", lambda path: _with_wrong_count(path, frames), clip())
    corpus.add("wrong length in the header", "length.mp4", lambda path: _with_wrong_length(path, frames), clip())
    _add_broken(corpus, frames)


def _add_broken(corpus: Corpus, frames: list[np.ndarray]) -> None:
    folder = corpus.folder / "parts"
    folder.mkdir(exist_ok=True)
    whole = {
        name: encode(folder / name, frames, **options).read_bytes()
        for name, options in (
            ("a.mp4", {}),
            ("fast.mp4", {"container_options": {"movflags": "faststart"}}),
            ("a.mkv", {}),
        )
    }
    cut = {name: data[: len(data) * 2 // 3] for name, data in whole.items()}
    damaged = "it does not decode (Invalid data found when processing input): it is cut off, damaged, or no clip"
    corpus.add("truncated MP4", "cut.mp4", cut["a.mp4"], damaged)
    corpus.add("truncated MP4 with its index", "cut fast.mp4", cut["fast.mp4"], "it is cut off or damaged: frame ")
    corpus.add("truncated MKV", "cut.mkv", cut["a.mkv"], "it is cut off: ")
    corpus.add("header alone", "header.mkv", whole["a.mkv"][:300], "it is cut off: ")
    corpus.add("zero bytes called MP4", "empty.mp4", b"", "the file is empty")
    corpus.add("text called MP4", "text.mp4", b"no clip\n" * 100, damaged)
    corpus.add("sound alone", "sound alone.mp4", lambda path: _sound_alone(path), "it has no video stream")
    corpus.add(
        "sound with a cover picture",
        "song.m4v",
        lambda path: _sound_alone(path, cover=frames[0]),
        "it has no video stream, only a cover picture",
    )
    with (folder / "a.mp4").open("rb") as file:
        data = bytearray(file.read())
    start = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 4
    data[start : start + 400] = bytes(400)
    corpus.add("damaged in the middle", "damaged.mp4", bytes(data), damaged)


def square(source: Path) -> Callable[[Path], Used]:
    """The real clip of 176x144 pixels which are 128:117, at 29.97 fps."""

    def outcome(path: Path) -> Used:
        with av.open(str(source)) as container:
            images = [frame.to_image().resize((193, 144), Image.Resampling.LANCZOS) for frame in container.decode(video=0)]
        indices = [math.ceil(Fraction(30000, 1001) * Fraction(i, 16) - Fraction(1, 2)) for i in range(9)]
        pixels = np.stack([np.asarray(images[index]) for index in indices])
        return Used(MediaInfo(193, 144, len(images), 30000 / 1001), pixels, fps=FPS)

    return outcome


def _one_frame(path: Path) -> Used:
    [frame] = stored_frames(path)
    return Used(MediaInfo(frame.shape[1], frame.shape[0], 1, 1.0), frame[None], fps=FPS)


def _tagged(**colours: int) -> Callable[[av.VideoStream], None]:
    def prepare(stream: av.VideoStream) -> None:
        stream.codec_context.colorspace = colours["colorspace"]
        stream.codec_context.color_primaries = colours["primaries"]
        stream.codec_context.color_trc = colours["transfer"]

    return prepare


def _cover(picture: np.ndarray):
    def beside(container) -> Callable[[], None]:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic

        def fill() -> None:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[::-1]), "rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())

        return fill

    return beside


def _second_stream(pictures: list[np.ndarray]):
    """The one of the file's two streams that comes first, so that it is the one that is used."""

    def beside(container) -> Callable[[], None]:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"

        def fill() -> None:
            for index, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

        return fill

    return beside


def _sound(container) -> Callable[[], None]:
    stream = container.add_stream("aac", rate=16000)

    def fill() -> None:
        for index in range(15):
            wave = np.sin(np.arange(1024 * index, 1024 * (index + 1)) / 20).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * index, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    return fill


def _sound_alone(path: Path, cover: np.ndarray | None = None) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        fill_cover = _cover(cover)(container) if cover is not None else lambda: None
        fill = _sound(container)
        fill_cover()
        fill()


def _with_edit_list(path: Path, frames: list[np.ndarray]) -> None:
    """The frames from the fifth on are shown: the four before are in the file, for decoding, and hidden by an edit list."""
    whole = encode(path.with_name("whole.mp4"), frames, options={"bf": "0", "g": "100"})
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        back = int(Fraction(4, 25) / source.streams.video[0].time_base)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, stream
                target.mux(packet)
    whole.unlink()


def _edited(frames: list[np.ndarray]) -> Callable[[Path], Used]:
    def outcome(path: Path) -> Used:
        hidden = encode(path.with_name("whole.mp4"), frames, options={"bf": "0", "g": "100"})
        expected = clip(frames=20, stored=lambda _: stored_frames(hidden)[4:])(path)
        hidden.unlink()
        return expected

    return outcome


def _with_wrong_count(path: Path, frames: list[np.ndarray]) -> None:
    data = bytearray(encode(path, frames).read_bytes())
    # Of all frames in the file's head, and of this stream's in its own.
    place = data.index(b"avih") + 8 + 16
    data[place : place + 4] = struct.pack("<I", 9999)
    place = data.index(b"strh") + 8 + 32
    data[place : place + 4] = struct.pack("<I", 9999)
    path.write_bytes(data)


def _with_wrong_length(path: Path, frames: list[np.ndarray]) -> None:
    """An hour, says the head; the index has 24 frames."""
    data = bytearray(encode(path, frames).read_bytes())
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20)):
        place = data.index(box) + offset
        scale = struct.unpack(">I", data[place - 4 : place])[0]
        data[place : place + 4] = struct.pack(">I", 3600 * scale)
    path.write_bytes(data)
