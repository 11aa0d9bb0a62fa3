"""merge, demo, schema: the commands that need no study."""

from __future__ import annotations

import argparse
from pathlib import Path

from evomerge.cli.options import Commands, add_command, say_written, seed, shard_option
from evomerge.console import Console


def model_commands(commands: Commands) -> None:
    """merge, demo, schema."""
    p = add_command(
        commands,
        "merge",
        merge,
        "merge a mergekit YAML to a model folder",
        "evomerge merge best.yaml merged/\n"
        "evomerge merge best.yaml merged/ --out-shard-size 2GB --random-seed 42",
    )
    p.add_argument(
        "config",
        type=Path,
        metavar="CONFIG_YAML",
        help="a mergekit configuration; mergekit merges what evomerge does not support",
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
        commands,
        "demo",
        demo,
        "build a tiny pair of models, its tasks and its study",
        "evomerge demo demo/",
    )
    p.add_argument("out", type=Path, metavar="DIR", help="a new or empty folder")

    does = "print the JSON Schema of study files, for editors that complete and check YAML"
    add_command(commands, "schema", schema, does, "evomerge schema > study.schema.json")


def merge(args: argparse.Namespace) -> None:
    """Merge a YAML file to a model folder."""
    import evomerge

    console = Console()
    evomerge.merge(
        args.config,
        args.out,
        shard_size=args.out_shard_size,
        random_seed=args.random_seed,
        console=console,
    )
    say_written(console, [args.out])


def demo(args: argparse.Namespace) -> None:
    """Build the demo pair, its tasks and its study file."""
    from evomerge.demo import STUDY, build_demo

    console = Console()
    build_demo(args.out, progress=console.status)
    study = Path(args.out, STUDY)
    console.say(f"the demo pair and its tasks are in {args.out}: evomerge search {study}")


def schema(args: argparse.Namespace) -> None:
    """Print the study file's JSON Schema."""
    from evomerge.study import study_schema

    print(study_schema())
