"""What the programs share: flags, and errors in one line with exit code 2."""

import logging
import os
import re
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.data.records import Fields
from mmjax.errors import EXIT_USER_ERROR, UserError, one_line
from mmjax.files import NO_SPACE

FIELDS = "which of the source's fields are used: image=A,captions=B,captions=C,label=D"  # what --fields means


def run(
    main: Callable[..., int], description: str, argv: Sequence[str] | None = None, positional: Sequence[str] = ()
) -> int:
    """Parses the flags, runs `main`, and turns what goes wrong into an exit code.

    Args:
      main: the program; where there are positional arguments, it is given their list.
      description: what --help shows above the flags.
      argv: the command line; by default this process's own.
      positional: the names of the arguments that are no flags, all of which have to be there.

    Returns:
      What `main` returns; 0 for --help; 2 for a user's mistake, told in one line; 130 for Ctrl-C.
    """
    argv = list(sys.argv if argv is None else argv)
    debug = "--debug" in argv
    absl_logging.set_verbosity(absl_logging.INFO if debug else absl_logging.FATAL)
    logging.getLogger("jax").setLevel(logging.INFO if debug else logging.ERROR)
    if not debug:
        warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    try:
        if {"--help", "-h", "-help"} & set(argv):
            print(f"{description.strip()}\n\nflags:\n{_flag_help()}")
            return 0
        arguments = _parse(argv, positional)
        return main(arguments) if positional else main()
    except (UserError, OSError) as error:
        if debug or not (isinstance(error, UserError) or error.errno in NO_SPACE):
            traceback.print_exc()
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        if error.errno in NO_SPACE:
            print(f"error: no space left on the disk, writing {error.filename or 'run or cache'}", file=sys.stderr)
            return EXIT_USER_ERROR
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _flag_help() -> str:
    return "\n".join(f"  --{name}: {flag.help}" for name, flag in sorted(_own_flags().items()))


def _own_flags() -> dict[str, flags.Flag]:
    """The flags that the program's own module defines, without the keys of its config."""
    return {flag.name: flag for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]) if "." not in flag.name}


def _parse(argv: list[str], positional: Sequence[str]) -> list[str]:
    """Parses absl flags; checks `--config` and its overrides first, for errors a reader understands.

    Returns:
      What is no flag: one argument for each name in `positional`.
    """
    recipes = [arg.partition("=")[2] for arg in argv[1:] if re.match(r"--?config=", arg)]
    recipes += [argv[i + 1] for i, arg in enumerate(argv[:-1]) if re.fullmatch("--?config", arg)]
    recipe = recipes[0] if recipes else None
    if recipe is not None:
        config = load_recipe(recipe)
        for arg in argv[1:]:
            override = re.match(r"--?(?:no)?config\.([^=]+)", arg)
            if override:
                configs.check_key(config, override[1])
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"unknown flag --{error.flagname}; {configs.suggest(error.flagname, [*_own_flags()])}"
        ) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    arguments = rest[1:]
    if len(arguments) > len(positional):
        raise UserError(f'unexpected argument "{arguments[len(positional)]}"; flags are written --name=value')
    if len(arguments) < len(positional):
        raise UserError(f"{positional[len(arguments)]} is missing; the arguments are {' '.join(positional)}")
    return arguments


def load_recipe(recipe: str, flag: str = "config") -> ConfigDict:
    """The config of "file.py" or "file.py:argument", which was given with this flag.

    Raises:
      UserError: there is no such file, or it fails.
    """
    path, colon, argument = recipe.partition(":")
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = [name for name in os.listdir(folder) if name.endswith(".py")] if os.path.isdir(folder) else []
        raise UserError(f"--{flag}: no file {path}; {configs.suggest(os.path.basename(path), near)}")
    try:
        return runpy.run_path(path)["get_config"](*[argument] if colon else [])
    except UserError:
        raise
    except Exception as error:  # a recipe is the user's code: anything may come out of it
        raise UserError(f"--{flag}: {recipe} failed: {type(error).__name__}: {error}") from error


def parse_fields(pairs: Sequence[str]) -> Fields:
    """The value of --fields: ["image=a", "captions=b", "c"] -> Fields(image="a", captions=("b", "c")).

    Raises:
      UserError: it is of another form.
    """
    found: dict[str, list[str]] = {"image": [], "captions": [], "label": []}
    name = ""
    for pair in pairs:
        before, equals, field = pair.rpartition("=")
        name = before if equals else name
        if name not in found or not field:
            raise UserError(f'--fields: "{pair}" is not image=FIELD, captions=FIELD or label=FIELD')
        found[name].append(field)
    for name in ("image", "label"):
        if len(found[name]) > 1:
            raise UserError(f"--fields: {name} is one field, not {len(found[name])}")
    return Fields("".join(found["image"]), tuple(found["captions"]), "".join(found["label"]))
