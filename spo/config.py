"""A dataclass's fields become --key=value flags. Knows nothing of this project."""

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing


def flag(default, help: str, choices=None, positional: bool = False, alone=None):
    """A dataclass field that is a command-line flag: its default, its line in --help, its choices.

    alone  the value of --key without a value; None: it needs one
    """
    metadata = {"help": help, "choices": choices, "positional": positional, "alone": alone}
    return dataclasses.field(default=default, metadata=metadata)


def boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def underscored(word: str) -> str:
    """--dry-run=x -> --dry_run=x; nothing else is changed."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(config_class, argv: list[str], prog: str, description: str = ""):
    """argv -> an instance of the dataclass, each value typed by its field's annotation.

    --key=value, --key value and, for a bool, --key alone. Exits with code 2 and one line on stderr
    for an unknown flag (naming the nearest), a value of the wrong type, or a missing argument.
    """
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False)
    hints = typing.get_type_hints(config_class)
    # a class's own flags first, then those that it inherits
    owners = [vars(owner).get("__annotations__", {}) for owner in config_class.__mro__]
    fields = sorted(
        dataclasses.fields(config_class),
        key=lambda field: [field.name in own for own in owners].index(True),
    )
    names = [field.name for field in fields]
    for field in fields:
        kind, text = hints[field.name], field.metadata["help"].replace("%", "%%")
        if isinstance(
            kind, types.UnionType
        ):  # `float | None`: a float, or None where it is not given
            kind = next(t for t in kind.__args__ if t is not type(None))
        if field.metadata["positional"]:
            parser.add_argument(field.name, type=kind, help=text)
            continue
        if field.default not in (None, ""):
            text += " (default: %(default)s)"
        alone = True if kind is bool else field.metadata["alone"]
        optional = {} if alone is None else {"nargs": "?", "const": alone}
        parser.add_argument(
            f"--{field.name}",
            type=boolean if kind is bool else kind,
            default=field.default,
            choices=field.metadata["choices"],
            metavar=kind.__name__.upper(),
            help=text,
            **optional,
        )
    values, unknown = parser.parse_known_args([underscored(word) for word in argv])
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        near.sort(key=lambda other: other[:1] != name[:1])  # of equals, the one that begins alike
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        parser.error(f"{unknown[0].split('=')[0]}: no such option; {hint}")
    return config_class(**vars(values))


def run(main) -> None:
    """Call main(argv); what the user caused (ValueError, OSError) is one line on stderr and exit code 2.

    A server that cannot be reached (ConnectionError) is exit code 3. SPO_DEBUG=1 shows the traceback instead.
    """
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("SPO_DEBUG"):
            raise
        text = (
            f"{error.strerror}: {error.filename}"
            if getattr(error, "filename", None)
            else str(error)
        )
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(3 if isinstance(error, ConnectionError) else 2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; what was finished is kept", file=sys.stderr)
        sys.exit(130)
