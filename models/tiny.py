"""Write a tiny random model in the layout of a real release, to try or to test with.

python -m models.tiny NAME OUT [--layout diffusers|released|comfy] [--seed N] [--scale N] [--force]
python -m models.tiny --list
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from models import family_names, load_family
from models.base import Layout, ModelFamily
from utils.errors import UserError

log = logging.getLogger("models.tiny")

MARK = "tiny.json"
"""File that tells a tiny model from anything else; it lists the files that belong to it."""


def variants() -> dict[str, type[ModelFamily]]:
    """The family of each variant that any family offers."""
    families = [load_family(name) for name in family_names()]
    return {variant: family for family in families for variant in family.variants}


def write(name: str, out: Path, layout: Layout = "released", seed: int = 0, scale: int = 1, force: bool = False) -> None:
    """Write the variant ``name`` to ``out``.

    UserError for an unknown name, and for a folder that holds something: an older tiny model is replaced only with ``force``,
    anything else never.
    """
    known = variants()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        advice = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no tiny model {name!r}{advice} Known are: {', '.join(sorted(known))}")
    if scale < 1:
        raise UserError(f"--scale {scale}: it multiplies the model's size; allowed are 1, 2, 3, …")
    _clear(out, force)
    try:
        out.mkdir(parents=True, exist_ok=True)
        known[name].write_tiny(name, out, layout, seed, scale)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    told = {"variant": name, "layout": layout, "seed": seed, "scale": scale, "files": files}
    (out / MARK).write_text(json.dumps(told, indent=2) + "\n")


def _clear(out: Path, force: bool) -> None:
    """Take an older tiny model away, and nothing else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / MARK).is_file():
        raise UserError(f"{out} is not empty and holds no tiny model; name a new folder")
    if not force:
        raise UserError(f"{out} holds a tiny model already; --force writes it anew")
    for name in json.loads((out / MARK).read_text())["files"]:
        (out / name).unlink(missing_ok=True)
    (out / MARK).unlink()
    for folder in sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    if left := sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()):
        raise UserError(f"{out} held a tiny model, and holds other files too: {', '.join(left[:5])}; take them away first")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  Returns the exit code: 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m models.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="the variant, one of --list")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write")
    parser.add_argument("--layout", choices=get_args(Layout), default="released", help="default: released")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights; default: 0")
    parser.add_argument("--scale", type=int, default=1, help="multiplies the transformer's width and depth; default: 1")
    parser.add_argument("--force", action="store_true", help="replace a tiny model that was written there before")
    parser.add_argument("--list", action="store_true", help="name the variants")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    if given.list:
        for name in sorted(variants()):
            log.info(name)
        return 0
    if given.out is None:
        parser.error("NAME and OUT are needed, or --list")
    try:
        write(given.name, given.out, given.layout, given.seed, given.scale, given.force)
    except UserError as error:
        log.error("%s", error)
        return 2
    log.info("%s: a tiny %s in the %s layout", given.out, given.name, given.layout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
