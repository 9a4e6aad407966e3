"""Building blocks of the parsers of all command lines."""

from __future__ import annotations

import argparse
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

ArgumentContainer = argparse.ArgumentParser | argparse._ArgumentGroup


def whole_number(least: int = 0, most: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers in this range, for argparse."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} is not {_describe_range(least, most)}")
        return value

    # argparse names it where the text is no number at all.
    parse.__name__ = "whole number"
    return parse


def number(least: float = 0.0, most: float | None = None) -> Callable[[str], float]:
    """Return a parser of finite numbers in this range, for argparse."""

    def parse(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and value >= least and (most is None or value <= most)):
            raise argparse.ArgumentTypeError(f"{text} is not {_describe_range(least, most)}")
        return value

    parse.__name__ = "number"
    return parse


def _describe_range(least: float, most: float | None) -> str:
    return f"between {least:g} and {most:g}" if most is not None else f"a number of at least {least:g}"


# How the text of an option becomes a value of its default's type.
NUMBER_PARSERS: dict[type, Callable[[str], Any]] = {int: whole_number(), float: number()}


def add_option(parser: ArgumentContainer, option: str, help_text: str, *, default: Any = None, **keywords: Any) -> None:
    """Add an option that takes a value.

    Args:
        option: the option and the placeholder of its value, such as `--threads N`.
        default: also gives the type, unless `keywords` do: numbers must not be negative then; the help shows it.
        keywords: further arguments of `add_argument`.
    """
    flag, _, metavar = option.partition(" ")
    if default is not None:
        keywords = {"type": NUMBER_PARSERS.get(type(default), type(default)), "default": default, **keywords}
        help_text += f" (default: %(default){'g' if isinstance(default, float) else 's'})"
    if not metavar and isinstance(default, int):
        metavar = "N"
    parser.add_argument(flag, metavar=metavar or None, help=help_text, **keywords)


def add_flag(parser: ArgumentContainer | argparse._MutuallyExclusiveGroup, option: str, help_text: str) -> None:
    """Add an option without a value, which is off unless it is given."""
    parser.add_argument(option, action="store_true", help=help_text)


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for, which takes longer than parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import importlib.metadata

        print(parser.prog, importlib.metadata.version("flexspec"))
        parser.exit()


def add_version_option(parser: argparse.ArgumentParser) -> None:
    """Add `--version` to the parser of a program."""
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and exit")


def add_action(
    actions: Any, name: str, run: Callable[[argparse.Namespace], int | Awaitable[int]], help_text: str, **keywords: Any
) -> argparse.ArgumentParser:
    """Add an action of a command, such as `list` of `bundle`; `keywords` are further arguments of its parser."""
    action: argparse.ArgumentParser = actions.add_parser(name, help=help_text, **keywords)
    action.set_defaults(run=run)
    return action


def add_removed_option(parser: ArgumentContainer, option: str, feature: str, warn: Callable[[str], None]) -> None:
    """Accept an option that does nothing, because its feature was removed; a use of it is a warning.

    Args:
        option: the option and the placeholder of its value, if it takes one, such as `--threads N`.
        feature: in words.
    """
    flag, _, metavar = option.partition(" ")
    parser.add_argument(
        flag,
        action=FormerOption,
        nargs=None if metavar else 0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
        advice=describe_removal(feature),
        warn=warn,
    )


def describe_removal(feature: str) -> str:
    """Return what to say after the name of an option or setting that does nothing: its feature was removed."""
    return f"does nothing: the {feature} was removed; leave it out and delete its files"


class FormerOption(argparse.Action):
    """An option that is not to be used any more: warns with `advice`, and stores its value if it has a destination."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, advice: str, warn: Callable[[str], None], **keywords: Any
    ) -> None:
        super().__init__(option_strings, dest, **keywords)
        self._advice, self._warn = advice, warn

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        self._warn(f"{option_string} {self._advice}")
        if self.dest != argparse.SUPPRESS:
            setattr(namespace, self.dest, values)
