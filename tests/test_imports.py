"""Who may import whom.  The tables are the rules; every import of every file is held against them, also those inside functions."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A dependency -> the only places that may import it.
OWNERS = {
    "deepspeed": ("utils/pipeline/",),
    "peft": ("utils/adapters/",),
    "diffusers": ("models/",),
    "transformers": ("models/",),
    "torch.distributed": ("utils/topology.py",),
    "torch.utils.tensorboard": ("utils/metrics.py",),
    "wandb": ("utils/metrics.py",),
    "torchvision": (),
}

# The parts of utils, lowest first: a part imports from its own line and the lines above.
LEVELS = [
    {"errors", "draw", "diffusion", "stopping", "words"},
    {"config"},
    {"runtime", "topology", "weights"},
    {"adapters", "checkpoints", "formats", "control", "data", "metrics", "optim", "pipeline"},
    {"report", "watchdog"},
    {"bad_steps", "convert", "evaluation", "requests", "resume", "run", "saving", "schedule", "trained", "trainer"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def imports() -> Iterator[tuple[str, int, str]]:
    """Every import of the program: file, line, and the dotted name of what is imported."""
    for path in sorted([ROOT / "train.py", *ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")]):
        file = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = [*file.parts[: -node.level]] if node.level else []
                names = [".".join(filter(None, [*package, node.module, alias.name])) for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)] if ast.unparse(node) == "torch.distributed" else []
            else:
                continue
            yield from ((file.as_posix(), node.lineno, name) for name in names)


def test_each_dependency_is_imported_in_one_place():
    wrong = [
        f"{file}:{line} imports {name}, which belongs to {' and '.join(places) or 'nobody'}"
        for file, line, name in imports()
        for owned, places in OWNERS.items()
        if f"{name}.".startswith(f"{owned}.") and not file.startswith(places)
    ]
    assert not wrong, "\n".join(wrong)


def test_utils_import_neither_models_nor_higher_parts():
    wrong = []
    for file, line, name in imports():
        here, there = Path(file).with_suffix("").parts, name.split(".")
        if here[0] != "utils" or here == ("utils", "__init__"):
            continue
        assert here[1] in LEVEL_OF, f"give utils/{here[1]} a line in LEVELS"
        if there[0] in ("models", "train") or (there[0] == "utils" and LEVEL_OF[there[1]] > LEVEL_OF[here[1]]):
            wrong.append(f"{file}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_a_family_imports_no_other_family():
    wrong = []
    for file, line, name in imports():
        here, there = Path(file).with_suffix("").parts, name.split(".")
        if here[0] == "models" and there[0] == "train":
            wrong.append(f"{file}:{line} imports {name}")
        if len(here) < 3 or here[0] != "models" or there[0] != "models":
            continue
        family = {here[1]} if here[1] == "common" else {here[1], "common"}
        if there[1] not in {"base", *family}:
            wrong.append(f"{file}:{line} imports {name}; its own folder, models.common and models.base are allowed")
    assert not wrong, "\n".join(wrong)


def test_torchvision_is_absent_or_imports():
    """One of another build than torch breaks transformers, diffusers and peft at their import."""
    if importlib.util.find_spec("torchvision"):
        importlib.import_module("torchvision")
