"""What the command line names: ``module:name``, and the arguments that go with it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}
_TENSOR = re.compile(r"\s*(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\]\s*(?:,|$)")


class TargetError(ValueError):
    """A name on the command line names nothing that can be used; the message says what is allowed."""


def load(name: str) -> Callable[..., Any]:
    """The function or module that ``module:name`` or ``path/to/file.py:name`` names.

    A subclass of ``torch.nn.Module`` is called without arguments, to make one, and put into evaluation mode.

    Raises:
        TargetError: there is no such module or name, or it cannot be called.
    """
    target = _named(name)
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        try:
            target = target()
        except TypeError as error:
            raise TargetError(f"{name} cannot be made: {error}; allowed: a class that takes no arguments") from None
    if not callable(target):
        raise TargetError(
            f"{name} is {type(target).__name__}; allowed: a function, or a torch.nn.Module or a class of one"
        )
    return target.eval() if isinstance(target, torch.nn.Module) else target  # type: ignore[no-any-return]


def arguments(target: str, args: str | None, inputs: str | None) -> tuple[Any, ...]:
    """The arguments to call a target with.

    Args:
        target: its ``module:name``.
        args: ``module:name`` of a function that takes nothing and returns the tuple of arguments; None for the function
            ``<name>_args`` beside the target.
        inputs: instead, tensors such as ``bf16[8, 256], bf16[256]``: floats are drawn from a normal distribution.

    Raises:
        TargetError: there is no such function, or the tensors cannot be read.
    """
    if inputs is not None:
        if args is not None:
            raise TargetError("--args and --inputs are both given; allowed: one of them")
        return _tensors(inputs)
    factory = _named(args) if args is not None else _beside(target)
    result = factory() if callable(factory) else factory
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _beside(target: str) -> Any:
    name = f"{target}_args"
    try:
        return _named(name)
    except TargetError:
        raise TargetError(
            f"{target} needs arguments; allowed: a function {name}, --args module:function, or --inputs"
        ) from None


def _named(name: str) -> Any:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise TargetError(f"the target is {name!r}; allowed: module:name or path/to/file.py:name")
    value: Any = _module(place)
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise TargetError(f"{place} has no {attribute!r}")
        value = getattr(value, part)
    return value


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise TargetError(f"there is no file {place}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dynamo imports a function's module by its name.
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and place.startswith(error.name):
            raise TargetError(f"there is no module {place!r}") from None
        raise


def _tensors(text: str) -> tuple[torch.Tensor, ...]:
    """``bf16[8, 256], i64[4]`` as tensors; integers are zeros and ones."""
    tensors, rest = [], text
    while rest.strip():
        match = _TENSOR.match(rest)
        if match is None or match["dtype"] not in _DTYPES:
            raise TargetError(f"--inputs has {rest!r}; allowed: tensors such as bf16[8, 256], of {', '.join(_DTYPES)}")
        dtype = _DTYPES[match["dtype"]]
        sizes = [int(size) for size in match["sizes"].split(",") if size.strip()]
        tensors.append(torch.randn(sizes).to(dtype) if dtype.is_floating_point else torch.randint(2, sizes).to(dtype))
        rest = rest[match.end() :]
    return tuple(tensors)
