"""A dataclass's fields become --key=value flags with bounds; functions become commands."""

import argparse
import dataclasses
import difflib
import functools
import math
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """What a flag is, besides its name, type and default.

    least, above, most, below  bounds of its value, of which any may be None
    alone     the value of --key without a value; None: it needs one
    free      a run that is resumed may change it: it changes nothing of what is computed
    path      of an input: a run that is resumed may spell it otherwise, if its content is the same
    required  it has to be given
    heading   begins a section of --help
    also      words of other programs for it, for the hint after a wrong flag
    """

    help: str
    choices: list | None = None
    positional: bool = False
    alone: object = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    free: bool = False
    path: bool = False
    required: bool = False
    heading: str = ""
    also: str = ""


def flag(default, help: str, **more):
    """Declare a dataclass field that is a flag; `more` as in Flag."""
    return dataclasses.field(default=default, metadata={"flag": Flag(help, **more)})


def flags_of(config_class) -> dict[str, Flag]:
    """Return {name: Flag} of a dataclass."""
    return {field.name: field.metadata["flag"] for field in dataclasses.fields(config_class)}


def non_default(config, config_class=None) -> dict[str, object]:
    """Return {name: value} of the flags, those of config_class only, that were changed."""
    fields = dataclasses.fields(config_class or config)
    values = {field.name: getattr(config, field.name) for field in fields}
    return {f.name: values[f.name] for f in fields if values[f.name] != f.default}


def extended(config_class, flags: dict[str, tuple[type, str]], heading: str):
    """Add flags to a dataclass: {name: (kind, help)}, None by default, under a heading."""
    fields = [
        (name, kind | None, flag(None, text, heading=heading))
        for name, (kind, text) in flags.items()
    ]
    made = dataclasses.make_dataclass(config_class.__name__, fields, bases=(config_class,))
    made.__module__ = config_class.__module__
    return made


# --- bounds --------------------------------------------------------------------------------------


def check_bounds(config) -> None:
    """ValueError, naming flag, value and bounds, for the first value that is out of bounds."""
    for name, declared in flags_of(config).items():
        value = getattr(config, name)
        if value is None:
            continue
        if declared.required and value == "":
            raise ValueError(f"--{name} is missing: {declared.help}")
        if isinstance(value, int | float) and not _is_within(value, declared):
            raise ValueError(f"--{name}={value}: must be {_bounds_in_words(declared, value)}")


def counted(count: int, thing: str) -> str:
    """count=1, thing="group" -> "1 group"; 2 -> "2 groups"; 1234 -> "1,234 groups"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def refuse_if(wrong, message: str) -> None:
    """ValueError with the message, if something is wrong."""
    if wrong:
        raise ValueError(message)


def _is_within(value: float, bounds: Flag) -> bool:
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (bounds.least is None or value >= bounds.least)
        and (bounds.above is None or value > bounds.above)
        and (bounds.most is None or value <= bounds.most)
        and (bounds.below is None or value < bounds.below)
    )


def _bounds_in_words(bounds: Flag, value: float) -> str:
    """least=0, below=1 -> "0 or more and below 1"; of a float: "finite, 0 or more and below 1"."""
    words = []
    if bounds.least is not None:
        words.append(f"{bounds.least:g} or more")
    if bounds.above is not None:
        words.append(f"above {bounds.above:g}")
    if bounds.most is not None:
        words.append(f"at most {bounds.most:g}")
    if bounds.below is not None:
        words.append(f"below {bounds.below:g}")
    finite = ["finite"] if isinstance(value, float) else []
    return ", ".join([*finite, " and ".join(words)] if words else finite)


# --- command lines -------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def or_none(kind: type) -> Callable:
    """Return the reader of a `kind | None`: the word "none" is None."""

    def read(text: str):
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # for argparse's message
    return read


def underscored(word: str) -> str:
    """--dry-run=a-b -> --dry_run=a-b; a word that is no flag is not changed."""
    name, equals, value = word.partition("=")
    if not word.startswith("--"):
        return word
    return "--" + name[2:].replace("-", "_") + equals + value


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(config_class, argv: list[str], prog: str, description: str = ""):
    """Return an instance of the dataclass, each value typed by its annotation and within bounds.

    Reads --key=value, --key value and, for a bool, --key alone. Exits with code 2 and one line on
    stderr for an unknown flag (naming the nearest), a value of the wrong type, or a missing
    argument. ValueError for a value that is out of its bounds.
    """
    flags = flags_of(config_class)
    words = [
        prog,
        *(name.upper() for name in flags if flags[name].positional),
        "[--FLAG=VALUE ...]",
    ]
    usage = " ".join(words)
    parser = OneLineParser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    # A class's own flags first, those that it declares anew among them, then those it inherits.
    owners = [vars(owner).get("__annotations__", {}) for owner in config_class.__mro__]
    order = list(dict.fromkeys(name for names in owners for name in names))
    fields = sorted(dataclasses.fields(config_class), key=lambda field: order.index(field.name))
    section = parser
    sections = {}
    for field in fields:
        heading = field.metadata["flag"].heading
        if heading:
            if heading not in sections:
                sections[heading] = parser.add_argument_group(heading)
            section = sections[heading]
        _add_argument(section, field, hints[field.name])
    values, unknown = parser.parse_known_args([underscored(word) for word in argv])
    if unknown:
        given = unknown[0].split("=")[0]
        if not given.startswith("-"):
            parser.error(f"{given}: every value belongs to an option, as in --NAME={given}")
        name = given.lstrip("-").replace("-", "_")
        also = {word: f for f, flag in flags.items() for word in flag.also.split()}
        hint = _nearest(name, [field.name for field in fields])
        if name in also:
            hint = f"did you mean --{also[name]}? ({flags[also[name]].help})"
        parser.error(f"{given}: no such option; {hint}")
    config = config_class(**vars(values))
    check_bounds(config)
    return config


def _add_argument(parser: argparse._ActionsContainer, field: dataclasses.Field, kind) -> None:
    declared: Flag = field.metadata["flag"]
    text = declared.help.replace("%", "%%")
    read = kind
    if isinstance(kind, types.UnionType):  # `float | None`: a float; None for `none`, or not given
        kind = next(t for t in kind.__args__ if t is not type(None))
        read = or_none(kind)
    if declared.positional:
        parser.add_argument(field.name, type=read, help=text)
        return
    if declared.choices:
        text += f"; one of {', '.join(str(choice) for choice in declared.choices if choice != '')}"
    if field.default not in (None, ""):
        text += "; default: %(default)s"
    alone = True if kind is bool else declared.alone
    parser.add_argument(
        f"--{field.name}",
        type=boolean if kind is bool else read,
        default=field.default,
        choices=declared.choices,
        metavar=kind.__name__.upper(),
        help=text,
        **({} if alone is None else {"nargs": "?", "const": alone}),
    )


def _nearest(name: str, names: list[str]) -> str:
    """name="bata", names=["beta", "data"] -> "did you mean --beta?"; "lr" is --learning_rate"""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near.sort(key=lambda other: other[:1] != name[:1])  # of equals, the one that begins alike
    near = [other for other in names if "".join(w[:1] for w in other.split("_")) == name] or near
    return f"did you mean --{near[0]}?" if near else "see --help"


class Commands:
    """The commands of a script: functions of a dataclass of flags, registered by @commands.add."""

    def __init__(self, script: str, documentation: str):
        self.script = script
        self.documentation = documentation
        self.functions: dict[str, Callable] = {}

    def add(self, function: Callable) -> Callable:
        """Register a function under its name; its argument's annotation says its flags."""
        self.functions[function.__name__] = function
        return function

    def config_class(self, name: str):
        return next(iter(typing.get_type_hints(self.functions[name]).values()))

    def run(self, argv: list[str]) -> None:
        """Call the command that the first word names. ValueError if there is no such command."""
        if not argv or argv[0] in ("-h", "--help"):
            names = ", ".join(self.functions)
            print(f"{self.documentation}\ncommands: {names}; `COMMAND --help` lists its flags")
            return
        name = argv[0]
        if name not in self.functions:
            raise ValueError(f"{name}: no such command; there are {', '.join(self.functions)}")
        self.functions[name](parse(self.config_class(name), argv[1:], f"{self.script} {name}"))


def one_line(error: Exception) -> str:
    """Return what a script says of an error: its own name, the file or flag, the reason."""
    file = getattr(error, "filename", None)
    text = f"{file}: {error.strerror}" if file else str(error)
    return f"{os.path.basename(sys.argv[0])}: {' '.join(text.split())}"


def exit_code(error: Exception) -> int:
    """Return 2 for what the user can mend, 3 for a server that cannot be reached."""
    return 3 if isinstance(error, ConnectionError) else 2


class Terminated(BaseException):
    """SIGTERM, where nothing else listens to it."""


def terminate(*_) -> None:
    raise Terminated


def main_program(main: Callable) -> None:
    """Call main(argv); what the user caused is one line on stderr, and an exit code.

    Ctrl-C and SIGTERM end with one line, too. With several processes SIGTERM keeps its default,
    since one that waits for the others could not answer. SPO_DEBUG=1 shows the traceback instead.
    A character that the terminal or the pipe cannot show is printed as its number: files are UTF-8,
    whatever the terminal is.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what tests put there may not be a text file
            stream.reconfigure(errors="backslashreplace")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
        if hasattr(os, "register_at_fork"):  # a worker of a pool would take it for a job's result
            default = functools.partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
            os.register_at_fork(after_in_child=default)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("SPO_DEBUG"):
            raise
        print(one_line(error), file=sys.stderr)
        sys.exit(exit_code(error))
    except KeyboardInterrupt as interrupt:
        kept = str(interrupt) or "what was finished is kept"
        print(f"\nstopped by Ctrl-C; {kept}", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        print("\nstopped by SIGTERM; what was finished is kept", file=sys.stderr)
        sys.exit(143)
