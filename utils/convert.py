"""Say what a file of weights is, and write it in another layout.

python -m utils.convert FILE                                           what it is
python -m utils.convert FILE --to comfy|diffusers|kohya|peft [--out OUT] [--family NAME] [--base PATH]

FILE is a LoRA (of any kind) or a whole model; a folder of shards or of PEFT will do.  The exit code is 2 for what cannot be
converted whole.
"""

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from utils.errors import UserError
from utils.formats.adapter_convert import LayoutName, converted
from utils.formats.adapter_files import ReadWeight, open_adapter_file, read_adapters, refuse
from utils.formats.adapter_writing import file_tensors
from utils.formats.export import PLACE_FOR_HASH, on_meta, write_checked
from utils.formats.inspect_files import adapter_lines, has_adapters, model_lines
from utils.formats.model_convert import entries_of, leftover, open_model_files, to_comfy, to_diffusers
from utils.formats.peft_config import PEFT_CONFIG, PEFT_FILE, peft_config
from utils.formats.recognise import KnownFamily, recognise_adapter, recognise_model, the_one
from utils.weights.tensor_files import TensorFile


def known_families(package: str, only: str | None = None) -> list[KnownFamily]:
    """The families of the package, which this one does not know.  UserError for a name that is none of them."""
    families = importlib.import_module(package)
    names = [only] if only else families.family_names()
    classes = {name: families.load_family(name) for name in names}
    return [KnownFamily(name, Family.file_facts, Family.lora_format) for name, Family in classes.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  Returns the exit code: 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.convert", description=__doc__.partition("\n\n")[0], epilog=__doc__.rpartition("\n\n")[2]
    )
    parser.add_argument("file", type=Path, help="a LoRA or a model: a file, or a folder of shards or of PEFT")
    parser.add_argument("--inspect", action="store_true", help="say what it is (what happens without --to)")
    parser.add_argument(
        "--to",
        choices=get_args(LayoutName),
        help="comfy and kohya: a file; peft: a folder; diffusers: a LoRA's file, a model's folder",
    )
    parser.add_argument("--out", type=Path, help="what to write; default: beside FILE, its name with the layout")
    parser.add_argument("--family", help="the [model] type, where the keys are those of several")
    parser.add_argument("--base", type=Path, help="the model that a DoRA is for, where its magnitudes take another form")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    told: list[str] = []
    try:
        families = known_families("models", given.family)
        path = given.file / PEFT_FILE if (given.file / PEFT_FILE).is_file() else given.file
        files = open_model_files(path)
        is_adapter = has_adapters(entries_of(files))
        if given.inspect or not given.to:
            sys.stdout.write("\n  ".join([str(given.file), *inspect_file(path, files, families)]) + "\n")
            return 0
        out = given.out or default_out(given.file, given.to, is_folder=given.to == ("peft" if is_adapter else "diffusers"))
        if out.exists():
            raise UserError(f"{out} exists; name another file with --out")
        if is_adapter:
            convert_adapter(path, given.to, out, families, given.base)
        else:
            told = convert_model(path, given.to, out, families)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("\n  ".join([f"{out}: {given.file.name} in the layout {given.to}", *told]) + "\n")
    return 0


def inspect_file(path: Path, files: Sequence[TensorFile], families: Sequence[KnownFamily]) -> list[str]:
    """What is to be said of a file, line by line."""
    entries = entries_of(files)
    if has_adapters(entries):
        return adapter_lines(open_adapter_file(path), families)
    return model_lines(entries, getattr(files[0], "metadata", {}), families)


def default_out(path: Path, layout: LayoutName, *, is_folder: bool) -> Path:
    """Beside the file."""
    return path.with_name(f"{path.name if path.is_dir() else path.stem}-{layout}{'' if is_folder else '.safetensors'}")


def convert_adapter(path: Path, layout: LayoutName, out: Path, families: Sequence[KnownFamily], base: Path | None) -> None:
    """Write the adapters of a file in a layout.  UserError, and nothing is written, if some of it would be lost."""
    file = open_adapter_file(path)
    found = the_one(recognise_adapter(file.entries, file.metadata, families), path)
    places, problems = read_adapters(file, found.key_map)
    refuse(f"{path} is a LoRA of {found.family.name}, but not all of it is understood, so it was not converted:", problems)
    kinds = {adapter.kind for adapter in places.values()}
    if layout == "diffusers" and (strange := sorted(kinds - found.family.facts.diffusers_kinds)):
        raise UserError(f"diffusers' loader of {found.family.name} takes no adapters of kind {', '.join(strange)}; {path} has them")
    if layout == "peft" and any(module.startswith("text_encoder") for place in places for module in place.modules):
        raise UserError(f"{path} has adapters of text encoders too; a file of PEFT is for one network. Use --to diffusers")
    try:
        adapters, metadata = converted(places, found.key_map, found.family, layout, file.metadata, base_reader(base, found.family))
        config = peft_config({path: adapter for (_, path), adapter in adapters.items()}) if layout == "peft" else None
    except ValueError as error:
        raise UserError(f"{path} cannot be written as {layout}: {error}") from error
    tensors = file_tensors(adapters)
    target = out / PEFT_FILE if config else out
    write_checked(target, tensors, on_meta({key: tensor.shape for key, tensor in tensors.items()}), {**metadata, **PLACE_FOR_HASH})
    if config:
        (out / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def base_reader(path: Path | None, family: KnownFamily) -> ReadWeight | None:
    """Reads the weights of the model at ``path`` by diffusers name."""
    return family.facts.networks["transformer"].open(path).source.read if path else None


def convert_model(path: Path, layout: LayoutName, out: Path, families: Sequence[KnownFamily]) -> list[str]:
    """Write a model's networks in a layout.  UserError, and nothing is written, if some of the file is not understood.

    Returns what is to be told.
    """
    if layout not in ("comfy", "diffusers"):
        raise UserError(f"{path} holds no adapters; {layout} is a layout of LoRA files. A model goes --to comfy or diffusers")
    files = open_model_files(path)
    entries = entries_of(files)
    networks = recognise_model(entries, families)
    if not networks:
        raise UserError(
            f"{path} holds no model that is known here; it has {len(entries)} tensors such as {', '.join(list(entries)[:3])}"
        )
    title = networks[0].family.facts.networks[networks[0].part].title
    refuse(f"{path} holds a {title}, but not all of it is understood, so it was not converted:", leftover(entries, networks))
    metadata = getattr(files[0], "metadata", {})
    if layout == "comfy":
        return to_comfy(path, out, networks, metadata)
    return to_diffusers(path, out, networks, metadata)


if __name__ == "__main__":
    sys.exit(main())
