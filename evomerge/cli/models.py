"""merge, demo, schema: what needs no study."""

from __future__ import annotations

import argparse
from pathlib import Path

from evomerge.cli.options import Commands, add_command, build, say_written, seed, shard_option
from evomerge.console import Console


def model_commands(commands: Commands) -> None:
    """merge, demo, schema."""
    p = add_command(
        commands,
        "merge",
        merge,
        "merge a mergekit YAML to a model folder",
        "evomerge merge best.yaml merged/\n  evomerge merge best.yaml merged/ --out-shard-size 2GB --random-seed 42",
    )
    p.add_argument(
        "config",
        type=Path,
        metavar="CONFIG_YAML",
        help="a mergekit configuration; mergekit merges what evomerge does not know",
    )
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    shard_option(p)
    p.add_argument(
        "--random-seed",
        type=seed,
        default=0,
        metavar="N",
        help="decides what DARE drops, as in mergekit (default: 0)",
    )

    p = add_command(
        commands, "demo", demo, "build the tiny pair and its tasks", "evomerge demo demo/"
    )
    p.add_argument("out", type=Path, metavar="DIR")

    does = "print the JSON Schema of study files, for editors that complete and check YAML"
    add_command(commands, "schema", schema, does, "evomerge schema > study.schema.json")


def merge(args: argparse.Namespace) -> None:
    """A YAML file to a model folder: by mergekit, when that is installed, where evomerge does not
    know the method.
    """
    from evomerge.errors import UnsupportedRecipe
    from evomerge.merging.mergekit import is_installed, merge_with_mergekit
    from evomerge.recipe import read_recipe

    try:
        recipe = read_recipe(args.config)
        build(
            recipe,
            args.out,
            args.out_shard_size,
            args.config.read_text(encoding="utf-8"),
            args.random_seed,
        )
    except UnsupportedRecipe as error:  # found before anything is written
        if not is_installed():
            raise
        console = Console()
        found = "" if error.found is None else f" ({error.found})"
        console.say(f"{error.where or args.config}: {error.what}{found} here; mergekit merges it")
        merge_with_mergekit(
            args.config, args.out, args.out_shard_size, args.random_seed, console.status
        )
        say_written(console, [args.out])


def demo(args: argparse.Namespace) -> None:
    from evomerge.demo import build_demo

    console = Console()
    build_demo(args.out, progress=console.status)
    console.say(f"the demo pair and its tasks are in {args.out}")


def schema(args: argparse.Namespace) -> None:
    """The study file's JSON Schema on stdout."""
    from evomerge.study import study_schema

    print(study_schema())
