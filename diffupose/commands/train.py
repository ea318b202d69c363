"""``diffupose train``: one flag per setting of ``TrainConfig``, or a TOML or JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import textwrap
from typing import get_args, get_type_hints

from diffupose.commands.say import say
from diffupose.config import PRESETS
from diffupose.training.config import TrainConfig, make_train_config, read_config_file


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="train a denoiser",
        description="Train on motion capture through virtual cameras, or on Human3.6M's data_3d_h36m.npz. Settings: "
        "the preset's recipe, then --config, then flags. With several processes: torchrun --nproc-per-node=N -m "
        "diffupose.train ...",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="TOML or JSON file of settings")
    parser.add_argument("--resume", action="store_true", default=False, help="go on from OUTPUT/checkpoint.pt")
    parser.add_argument("--quiet", action="store_true", default=False, help="no progress bar")
    texts, types = help_texts(), get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        flag, annotation, text = "--" + item.name.replace("_", "-"), str(item.type), texts.get(item.name)
        if annotation.startswith("bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif annotation.startswith("tuple"):
            parser.add_argument(flag, nargs="*", metavar="NAME", help=text)
        elif item.name == "preset":
            parser.add_argument(flag, choices=sorted(PRESETS), help=text)
        else:
            kind = int if annotation.startswith("int") else float if annotation.startswith("float") else str
            choices = [choice for choice in get_args(types[item.name]) if isinstance(choice, str)]
            metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
            parser.add_argument(flag, type=kind, metavar=metavar, help=text)
    parser.set_defaults(run=run)


def help_texts() -> dict[str, str]:
    """Return what the docstring of ``TrainConfig`` says of each setting."""
    attributes = inspect.cleandoc(TrainConfig.__doc__ or "").partition("Attributes:\n")[2]
    texts = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(attributes)):
        name, _, text = " ".join(entry.split()).partition(": ")
        texts[name] = text.replace("``", "").replace("%", "%%")
    return texts


def run(options: argparse.Namespace) -> None:
    """Train and say where the lifter is."""
    from diffupose.training.trainer import train

    names = {item.name for item in dataclasses.fields(TrainConfig)}
    values = read_config_file(options.config) if options.config is not None else {}
    values |= {name: value for name, value in vars(options).items() if name in names}
    path = train(make_train_config(values), resume=options.resume, progress=not options.quiet)
    # Of several processes, the first one speaks for all.
    if not options.quiet and int(os.environ.get("RANK", "0")) == 0:
        say(f"lifter: {path}")
