"""A merged model's card: what was merged, how, and the configuration that reproduces it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from evomerge.recipe import METHODS, Recipe

CARD = """---
{front}
---
# {name}

{about}

{extra}## Merge Details
### Merge Method

This model was merged using the {method} merge method{using}.{alone}

### Models Merged

The following models were included in the merge:
{models}

### Configuration

The following YAML configuration was used to produce this model:

{fence}yaml
{configuration}
{fence}
"""
HUB_NAME = re.compile(r"\A[\w.-]+/[\w.-]+(?:@[\w.-]+)?", re.ASCII)
# what Markdown would read as markup; an underscore within a word is none
MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|^[#+=-]")

MODULES = (
    " mergekit takes no such slices of a model with several modules: only evomerge merges the "
    "configuration below."
)
ALONE = " mergekit does not have it: only evomerge merges the configuration below."
ABOUT = (
    "This is a merge of pre-trained language models, found with evomerge; its configuration is "
    "[mergekit](https://github.com/arcee-ai/mergekit)'s."
)


def model_card(
    recipe: Recipe,
    name: str,
    extra_markdown: str = "",
    recipe_text: str | None = None,
    about: str = ABOUT,
    only_here: bool = False,
) -> str:
    """A model card with the front matter and sections of mergekit's cards.

    `extra_markdown` goes before the configuration; `recipe_text` is the configuration as written,
    where that is not `recipe.to_yaml()`; `about` is its first paragraph; with `only_here` mergekit
    cannot merge the model's modules as the recipe says.
    """
    method = METHODS[recipe.merge_method]
    front = {
        "base_model": [model for model in recipe.models if is_hub_name(model)],
        "library_name": "transformers",
        "tags": ["mergekit", "merge"],
    }
    configuration = (recipe_text or recipe.to_yaml()).rstrip("\n")
    longest = max(map(len, re.findall("`+", configuration)), default=0)
    base, using = None, ""
    # a walk has no direction: slerp's base model is a source like the other
    if method.sets_base_apart and not method.walks and recipe.base_model is not None:
        base, using = recipe.base_model, f" using {_link(recipe.base_model)} as a base"
    alone = MODULES if only_here else ""
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=True),
        name=markdown_text(name),
        about=about,
        extra=f"{extra_markdown.strip()}\n\n" if extra_markdown else "",
        method=method.link,
        using=using,
        alone=ALONE if method.only_here else alone,
        models="\n".join(f"* {_link(model)}" for model in recipe.models if model != base),
        configuration=configuration,
        fence="`" * max(3, longest + 1),
    )


def is_hub_name(model: str) -> bool:
    """Whether a model is named `owner/name`, as on the hub, and is not a local folder."""
    local = model.startswith((".", "/", "~")) or Path(model).exists()
    return HUB_NAME.fullmatch(model) is not None and not local


def markdown_text(text: str) -> str:
    """A path or name that Markdown shows as it is, on one line."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _link(model: str) -> str:
    """Markdown; a LoRA (`model+adapter`) links both."""
    links = []
    for part in model.split("+"):
        name = part.partition("@")[0]
        shown = markdown_text(name)
        if is_hub_name(name):
            shown = f"[{shown}](https://huggingface.co/{name})"
        links.append(shown)
    return " + ".join(links)
