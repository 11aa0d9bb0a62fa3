"""A merged model's card: what was merged, how, and the configuration that does it again."""

from __future__ import annotations

from pathlib import Path

import yaml

from evomerge.recipe import METHODS, Recipe


def model_card(
    recipe: Recipe, name: str, extra_markdown: str = "", recipe_text: str | None = None
) -> str:
    """A model card with the front matter and sections of mergekit's cards; `extra_markdown` goes
    before the configuration.
    """
    front = yaml.safe_dump(
        {
            "base_model": [m for m in recipe.models if is_hub_name(m)],
            "library_name": "transformers",
            "tags": ["mergekit", "merge"],
        },
        sort_keys=True,
    )
    # slerp has no direction
    base = (
        recipe.base_model
        if METHODS[recipe.merge_method].base and recipe.merge_method != "slerp"
        else None
    )
    using = f" using {_link(base)} as a base" if base is not None else ""
    bullets = "\n".join(f"* {_link(model)}" for model in recipe.models if model != base)
    extra = f"{extra_markdown.strip()}\n\n" if extra_markdown else ""
    text = (recipe_text or recipe.to_yaml()).rstrip("\n")
    return (
        f"---\n{front}\n---\n# {name}\n\n"
        "This is a merge of pre-trained language models, found with evomerge; its configuration is "
        "[mergekit](https://github.com/arcee-ai/mergekit)'s.\n\n"
        f"{extra}## Merge Details\n### Merge Method\n\n"
        f"This model was merged using the {METHODS[recipe.merge_method].link} merge method{using}.\n\n"
        f"### Models Merged\n\nThe following models were included in the merge:\n{bullets}\n\n"
        f"### Configuration\n\nThe following YAML configuration was used to produce this model:\n\n```yaml\n{text}\n```\n"
    )


def is_hub_name(model: str) -> bool:
    """True for `owner/name`, which is no folder here."""
    return (
        model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()
    )


def _link(model: str) -> str:
    """Markdown; a LoRA (`model+adapter`) links both."""
    parts = [part.partition("@")[0] for part in model.split("+")]
    return " + ".join(
        f"[{part}](https://huggingface.co/{part})" if is_hub_name(part) else part for part in parts
    )
