"""Who teaches a run: saved predictors, named by their folders, or recipes, which are trained first.

Knows names, folders and recipes, and refuses what can't teach before anything slow begins; loads no network. What a
teacher says of rows is in `mope.training.teacher`, how a recipe becomes one in `mope.training.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mope import artifact, packaged
from mope.config import PredictorConfig
from mope.errors import ConfigError
from mope.training.config import ModelConfig
from mope.training.recipe import load_recipe, nearest, recipe_names


@dataclass(frozen=True)
class NamedTeacher:
    """A teacher as the user named it.

    Attributes:
        flag: that it was given with.
        name: a recipe's, which goes first, or a folder's.
        config: of the saved predictor; None for a recipe, which is still to be trained.
    """

    flag: str
    name: str
    config: PredictorConfig | None

    @property
    def gives_trunk(self) -> bool:
        """Whether it is `--teacher`, who settles the grid and gives its trunk, too."""
        return self.flag == "--teacher"

    @property
    def folder(self) -> Path:
        """Where the saved predictor lies."""
        return Path(self.name).expanduser()

    def line(self) -> str:
        """Who it is, in one line for a person."""
        return f"{self.flag} {self.name}: {self.about()}"

    def about(self) -> str:
        """What was taken by this name, and what was not."""
        config = self.config
        if config is not None:
            layers = config.encoder_config.get("num_hidden_layers")
            size = f", {layers} layers" if layers else ""
            return (
                f"the predictor saved there (preset {config.preset} on {config.encoder}{size}; {config.num_experts} "
                f"experts; knows {len(config.target_llms)} LLMs and families; counts tokens with "
                f"{config.label_tokenizer})"
            )
        others = []
        if packaged.folder_of(self.name):
            without = ", which has no PyTorch weights to teach with" if self.gives_trunk else ""
            others.append(f"not the packaged predictor{without}")
        if (self.folder / "files.json").exists():
            others.append(f"not the folder of that name: type {self.flag} ./{self.name} for it")
        which = f" ({'; '.join(others)})" if others else ""
        model = load_recipe(self.name).model
        own = ", ".join(name for name in (model.teacher, *model.co_teachers) if name)
        before = f", after the teachers of its own: {own}" if own else ""
        return f"the recipe{which}, which is trained first{before}"


def named_teachers(model: ModelConfig) -> list[NamedTeacher]:
    """The teachers that a model is to have, `--teacher` before the others; none if it has none.

    Raises:
        ArtifactError: a folder that holds no saved predictor, or one without the weights to teach with.
        ConfigError: a name that is neither a recipe's nor a folder's.
    """
    first = [("--teacher", model.teacher)] if model.teacher is not None else []
    return [_named(flag, name) for flag, name in (*first, *(("--co-teachers", name) for name in model.co_teachers))]


def _named(flag: str, name: str) -> NamedTeacher:
    if name in recipe_names():
        return NamedTeacher(flag, name, None)
    folder = Path(name).expanduser()
    if not folder.exists():
        raise ConfigError(
            f"{flag} {name}: no folder there and no recipe of that name{nearest(name, recipe_names())}; expected the "
            f"folder of a predictor that mope-train saved, or one of the recipes {', '.join(recipe_names())}"
        )
    config = artifact.check(folder)
    named = NamedTeacher(flag, name, config)
    if not named.gives_trunk:  # only its answers are wanted
        return named
    recipe = artifact.recipe_of(folder)
    artifact.check_weights(
        folder,
        config,
        "a teacher",
        f"type {flag} {recipe} for the recipe, which is then trained first" if recipe else "",
    )
    return named
