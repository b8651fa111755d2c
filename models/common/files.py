"""Finding the parts of a model in whatever layout the user has: one look for all of them, which collects what is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.common.networks import Network, OpenedNetwork, StrangerError, open_network, stranger_at
from models.common.text_encoders import NAMES, TokenizerFile, find_tokenizer, tokenizer_inside
from utils.config.schema import ModelOptions
from utils.errors import UserError, listed

NAMED = 8
"""At most so many files are named in a message."""


@dataclass(frozen=True)
class Place:
    """Files below ``[model] path`` that may be a part: each of them, or all of them as one folder."""

    pattern: str
    as_folder: bool = False

    def candidates(self, root: Path) -> list[Path]:
        found = sorted(path for path in root.glob(self.pattern) if path.is_file())
        return sorted({path.parent for path in found}) if self.as_folder else found


STRANGERS = (
    *(Place(f"{folder}/*.safetensors", as_folder=True) for folder in ("transformer", "high_noise_model")),
    Place("diffusion_pytorch_model*.safetensors", as_folder=True),
    *(Place(f"{folder}/**/*.safetensors") for folder in ("diffusion_models", "unet", "checkpoints")),
    Place("*.safetensors"),
)
"""Where the transformers of all families are."""
ANY_FILE = Place("*.safetensors")
"""The last place of every part: a folder of single files.  What does not fit there is not worth a word."""


class FileSearch:
    """The parts that ``[model]`` names, or that lie below its ``path``.  Each part ``x`` has a key ``x_path``."""

    def __init__(self, options: ModelOptions, networks: Mapping[str, Network], places: Mapping[str, Sequence[Place]]):
        self.options, self.networks, self.places = options, networks, places
        self.found: dict[str, Path] = {}
        self.problems: list[str] = []
        self.strangers: list[str] = []
        """Transformers of other families, if there is none of this one.  Then no other part of the model is looked for."""
        self.root = options.path
        if self.root and not self.root.is_dir():
            use = "is a file; single files are named with model.transformer_path, model.vae_path, …"
            self.problems.append(f"model.path = {self.root} {use if self.root.exists() else 'does not exist'}")
            self.root = None

    def finish(self) -> None:
        """Raises UserError with every part that is missing, ambiguous, damaged or does not fit."""
        if self.problems:
            raise UserError(listed(self.problems, "[model] cannot be used:"))

    def part(self, name: str, width: int | None = None, *, inside: str | None = None) -> OpenedNetwork | None:
        """Find and open one part.  ``width``: what its size must be to fit the transformer, if that is known.

        ``inside``: a part that was searched before, in whose file this one is looked for first: an all-in-one file holds both.
        """
        chosen: Path | None = getattr(self.options, f"{name}_path")
        if self.strangers:
            return None
        if chosen:
            opened, problem = self._open(name, chosen, width)
            if opened:
                self.found[name] = chosen
            self.problems += [_indented(f"model.{name}_path: {problem}")] if problem else []
            return opened
        checkpoint = self.found.get(inside) if inside else None
        if checkpoint and checkpoint.is_file():
            opened, _ = self._open(name, checkpoint, width)
            if opened:
                self.found[name] = checkpoint
                return opened
        title = self.networks[name].title
        if self.root is None:
            if self.options.path is None:
                self.problems.append(f"no {title}: set model.path (a folder) or model.{name}_path")
            return None
        rejected: list[str] = []
        for place in self.places[name]:
            tried = [(path, *self._open(name, path, width)) for path in place.candidates(self.root)]
            fitting = [(path, opened) for path, opened, _ in tried if opened]
            if len(fitting) == 1:
                self.found[name], opened = fitting[0]
                return opened
            if fitting:
                several = ", ".join(str(path.relative_to(self.root)) for path, _ in fitting[:NAMED])
                self.problems.append(
                    f"model.path = {self.root} holds {len(fitting)} that may be the {title}: {several}; "
                    f"choose one with model.{name}_path"
                )
                return None
            if place is not ANY_FILE:
                rejected += [problem for _, _, problem in tried if problem and problem not in rejected]
        strangers = self._strangers(self.networks[name].family)
        if strangers and set(rejected) <= set(strangers):
            self.strangers = strangers
            self.problems += strangers[:NAMED]
            return None
        looked = ", ".join(place.pattern for place in self.places[name])
        problem = f"no {title} in {self.root}; looked for {looked}; name it with model.{name}_path"
        self.problems.append(_indented("\n".join([problem, *rejected[:NAMED]])))
        return None

    def _strangers(self, family: str | None) -> list[str]:
        """What transformers of other families lie below the path.  ``family`` None: it is no transformer that is looked for."""
        if family is None:
            return []
        paths = dict.fromkeys(path for place in STRANGERS for path in place.candidates(self.root))
        return list(filter(None, (stranger_at(path, family) for path in paths)))

    def _open(self, name: str, path: Path, width: int | None) -> tuple[OpenedNetwork | None, str | None]:
        network = self.networks[name]
        try:
            opened = open_network(network, path)
        except UserError as error:
            problem = str(error)
            if isinstance(error, StrangerError) and path == getattr(self.options, f"{name}_path"):
                self.strangers = [problem]
            return None, problem if str(path) in problem else f"{path}: {problem}"
        own_width = network.width(opened.config) if network.width else width
        if width and own_width != width:
            return None, f"{path} has the width {own_width}, the transformer wants {width}; it belongs to another model"
        return opened, None

    def tokenizer(
        self,
        folders: Sequence[str],
        source: str,
        *,
        name: str = "tokenizer",
        encoder: str = "text_encoder",
        names: Mapping[str, str] = NAMES,
    ) -> TokenizerFile | None:
        """The tokenizer that is named, or in one of ``folders`` below ``[model] path``, or beside or in the encoder's file.

        ``source``: a sentence that says where to get it.  ``names``: the files it may be in, and their kinds.
        """
        if self.strangers:
            return None
        no_file = " and ".join(f"no {file}" for file in names)
        chosen: Path | None = getattr(self.options, f"{name}_path")
        if chosen:
            found = find_tokenizer(chosen, names)
            missing = f"model.{name}_path = {chosen}: there is {no_file}"
        else:
            roots = self._tokenizer_roots(encoder)
            found = next(filter(None, (find_tokenizer(root / folder, names) for root in roots for folder in folders)), None)
            if found is None and encoder in self.found:
                found = tokenizer_inside(self.found[encoder])
            below = ", ".join(folder for folder in folders if folder != ".")
            where = f" ({no_file}) in {', '.join(map(str, roots))}, nor below in {below}" if roots else ""
            missing = f"no {name}{where}; name its folder with model.{name}_path"
        if found:
            self.problems += filter(None, [found.problem()])
        elif chosen or self.root or self.options.path is None:  # else the path is the problem, and was reported
            self.problems.append(f"{missing}. {source}")
        return found

    def _tokenizer_roots(self, encoder: str) -> list[Path]:
        weights = self.found.get(encoder)
        beside = [weights if weights.is_dir() else weights.parent] if weights else []
        return list(dict.fromkeys([*([self.root] if self.root else []), *beside]))


def _indented(problem: str) -> str:
    """The further lines of a problem below its first one."""
    return problem.replace("\n", "\n      ")
