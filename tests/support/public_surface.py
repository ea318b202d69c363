"""The public names and their parameters, one a line: ``python tests/support/public_surface.py`` prints them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from diffupose import Lifter
from diffupose.cli import make_parser
from diffupose.training.config import TrainConfig

MODULES = (
    "diffupose",
    "diffupose.ops",
    "diffupose.keypoints",
    "diffupose.datasets.cameras_h36m",
    "diffupose.datasets.exchange_limbs",
    "diffupose.datasets.h36m",
    "diffupose.datasets.mocap",
    "diffupose.datasets.unpickle",
    "diffupose.datasets.virtual_cameras",
    "diffupose.metrics",
    "diffupose.schedule",
    "diffupose.lifting.aggregation",
)
# The flags of ``train`` have none of their own: those that are not given leave the settings of the preset.
TRAINING_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def public_surface() -> str:
    """Return the whole text."""
    lines = [line for name in MODULES for line in module_lines(name)]
    attributes = sorted(name for name in vars(Lifter.from_pretrained(device="cpu")) if not name.startswith("_"))
    lines += [f"attribute diffupose.Lifter.{name}" for name in attributes]
    lines += parser_lines(make_parser())
    return "\n".join(lines) + "\n"


def module_lines(name: str) -> Iterator[str]:
    """Yield the names that a module lists in ``__all__``, or else defines."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None) or defined_names(ast.parse(inspect.getsource(module)))
    for item in sorted(name for name in names if not name.startswith("_")):
        value = getattr(module, item)
        if item == "PackedDenoiser":  # its methods are those of every engine
            yield f"class {name}.{item}"
        elif inspect.isclass(value):
            yield from class_lines(f"{name}.{item}", value)
        elif callable(value) and get_origin(value) is None:
            yield f"function {name}.{item}{parameters(value)}"
        elif get_origin(value) is Literal:
            yield f"literal {name}.{item} = {' | '.join(map(repr, get_args(value)))}"
        else:
            yield f"constant {name}.{item} = {plain(value)}"


def defined_names(module: ast.Module) -> Iterator[str]:
    """Yield what a module defines itself, unlike what it imports."""
    for statement in module.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield statement.name
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))


def class_lines(name: str, cls: type) -> Iterator[str]:
    """Yield a class with the parameters of its constructor, and its public methods and properties."""
    yield f"class {name}{parameters(cls)}"
    for item, value in sorted(vars(cls).items()):
        if item.startswith("_") and item != "__call__":
            continue
        if isinstance(value, (classmethod, staticmethod)) or inspect.isfunction(value):
            yield f"method {name}.{item}{parameters(getattr(cls, item))}"
        elif not dataclasses.is_dataclass(cls) or item not in {field.name for field in dataclasses.fields(cls)}:
            yield f"property {name}.{item}"


def parameters(function: Any) -> str:
    """Return the signature without types, which a reader sees in the code."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_Plain(parameter.default))
        if parameter.default is not inspect.Parameter.empty
        else parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


class _Plain:
    """A default as it stands in a signature."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return plain(self.value)


def plain(value: object) -> str:
    """Return a value's text, without addresses and without the content of tables."""
    if isinstance(value, dict):
        return f"a dictionary of {', '.join(map(str, value))}"
    if hasattr(value, "joint_names"):
        return str(getattr(value, "name"))  # noqa: B009 - a skeleton or a layout
    return "a function" if inspect.isroutine(value) else repr(value)


def parser_lines(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the arguments of a command and of its subcommands: names, type, number, choices and default."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parser_lines(child)
        elif not isinstance(action, argparse._HelpAction):
            kind = getattr(action.type, "__name__", "")
            parts = ["/".join(action.option_strings) or action.dest, kind, "required" if action.required else ""]
            parts.append("" if action.nargs is None else f"nargs={action.nargs}")
            parts.append("" if action.choices is None else f"choices={','.join(map(str, action.choices))}")
            parts.append(f"metavar={action.metavar}" if "{" in str(action.metavar) else "")
            default = action.default
            if default == argparse.SUPPRESS:
                default = TRAINING_DEFAULTS.get(action.dest)
            parts.append(f"default={default!r}")
            yield f"{parser.prog} {' '.join(filter(None, parts))}"


if __name__ == "__main__":
    print(public_surface(), end="")
