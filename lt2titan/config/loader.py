"""From TOML files and command-line overrides to a validated JobConfig.

Precedence: command line > file > its ``base`` > defaults. Keys are strict: an unknown one is an error that names the
file and the nearest valid key.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from lt2titan.config.job import JobConfig
from lt2titan.config.section import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMAND_LINE = "command line"


class ConfigFileError(ValueError):
    """A configuration that cannot be read; the message names the file and the way out."""


def load_config(config_file: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> JobConfig:
    """Read ``config_file`` and what it inherits, apply ``overrides`` (``--section.field value``) and validate.

    With ``world_size``, also check what only shows in a run on that many processes (batch, tokenizer).

    Raises:
        ConfigFileError: a file is missing, is no TOML, inherits in a circle, or holds an unknown or wrongly typed
            key; or a value is refused. The message names key, value and the file that set it.
        SystemExit: ``overrides`` cannot be parsed (status 2, after a message) or hold ``--help`` (status 0).
    """
    config, origins = JobConfig(), {}
    for path, values in _with_bases(Path(config_file)):
        for key, value in _flatten(values):
            _assign(config, key, value, path)
            origins[key] = str(path)
    overrides = _with_underscores(overrides)
    _refuse_boolean_values(config, overrides)
    config = tyro.cli(
        JobConfig,
        prog="./run_train.sh",
        description=f"{JobConfig.__doc__}\n\nDefaults shown are those of {config_file}.",
        default=config,
        args=list(overrides),
        use_underscores=True,
    )
    origins |= {arg.removeprefix("--").split("=")[0]: COMMAND_LINE for arg in overrides if arg.startswith("--")}
    try:
        config.validate()
        if world_size is not None:
            config.validate_run(world_size)
    except ConfigError as error:
        raise ConfigFileError(f"{error} [{origins.get(error.key, 'default')}]") from None
    return config


def to_toml(config: JobConfig, header: Sequence[str] = ()) -> str:
    """The resolved configuration as TOML that loads to the same values; ``header`` lines become comments."""
    return "".join(f"# {line}\n" for line in header) + tomli_w.dumps(asdict(config))


def from_toml(text: str, origin: str) -> JobConfig:
    """The inverse of `to_toml`: a complete configuration, as kept in checkpoints. ``origin`` names it in errors."""
    config = JobConfig()
    for key, value in _flatten(_parse(text, origin)):
        _assign(config, key, value, origin)
    return config


def _with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file and everything it inherits from, furthest ancestor first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ConfigFileError(f"{path}: inherits from itself through {' -> '.join(str(p) for p in seen)}")
        seen.append(path.resolve())
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raised_by = f" (base of {chain[0][0]})" if chain else ""
            raise ConfigFileError(f"{path}{raised_by}: cannot be read: {reason}") from None
        values = _parse(text, path)
        base = values.pop("base", None)
        chain.insert(0, (path, values))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ConfigFileError(f"{path}: base = {base!r}: must be the path of another TOML file")
        path = path.parent / base


def _parse(text: str, origin: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigFileError(f"{origin}: is no valid TOML: {error}") from None


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _assign(config: JobConfig, key: str, value: Any, origin: str | Path) -> None:
    section: Any = config
    *parents, leaf = key.split(".")
    for name in parents:
        section = getattr(section, name, None) if is_dataclass(section) else None
    if not is_dataclass(section) or leaf not in {f.name for f in fields(section)}:
        nearest = difflib.get_close_matches(key, [k for k, _ in _flatten(asdict(config))], n=1, cutoff=0.0)
        raise ConfigFileError(f"{origin}: unknown key {key}; the nearest valid key is {nearest[0]}")
    hint = get_type_hints(type(section))[leaf]
    if is_dataclass(hint):
        if value == {}:
            return
        raise ConfigFileError(f"{origin}: {key} = {value!r}: is a table, write [{key}]")
    try:
        setattr(section, leaf, _typed(value, hint))
    except TypeError as error:
        raise ConfigFileError(f"{origin}: {key} = {value!r}: {error}") from None


def _typed(value: Any, hint: Any) -> Any:
    """``value`` if TOML gave it the type that the field declares; whole numbers pass for floats."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            nearest = difflib.get_close_matches(str(value), [str(a) for a in get_args(hint)], n=1)
            suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise TypeError(f"must be one of {list(get_args(hint))}{suggestion}")
        return value
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise TypeError("must be a list")
        return [_typed(item, get_args(hint)[0]) for item in value]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError(f"must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def parse_arguments(arguments: Sequence[str], world_size: int | None = None) -> JobConfig:
    """The entry points' command line: ``--job.config_file FILE`` and overrides, checked as `load_config` does.

    Prints one message and exits with status 2 when the configuration cannot be used.
    """
    config_file, arguments = JobConfig().job.config_file, _with_underscores(arguments)
    for i, argument in enumerate(arguments):
        if argument == "--job.config_file" and i + 1 < len(arguments):
            config_file = arguments[i + 1]
        elif argument.startswith("--job.config_file="):
            config_file = argument.split("=", 1)[1]
    return load_config_or_exit(config_file, arguments, world_size)


def load_config_or_exit(config_file: str | Path, overrides: Sequence[str], world_size: int | None = None) -> JobConfig:
    """`load_config` for a command: a refusal is one message on standard error and status 2."""
    try:
        return load_config(config_file, overrides, world_size)
    except ConfigFileError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)


def world_size_from_environment() -> int:
    """Processes of the coming run: NGPU per node times NNODES, as run_train.sh sets them.

    Prints one message and exits with status 2 when they are no numbers.
    """
    world_size = 1
    for name in ("NGPU", "NNODES"):
        text = os.environ.get(name, "1")
        if not text.isdecimal() or int(text) < 1:
            print(f"configuration error: {name} = {text!r}: must be a whole number of at least 1", file=sys.stderr)
            sys.exit(2)
        world_size *= int(text)
    return world_size


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """Option names as the fields are written; ``--job.config-file`` is ``--job.config_file`` too."""
    normal = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = argument.startswith("--") and "." in name
        normal.append(name[:2] + name[2:].replace("-", "_") + equals + value if is_option else argument)
    return normal


def _refuse_boolean_values(config: JobConfig, arguments: Sequence[str]) -> None:
    """``--x.y False`` would be refused as a stray word; say how switches are written."""
    values = dict(_flatten(asdict(config)))
    for argument, following in pairwise(arguments):
        key = argument.removeprefix("--")
        if isinstance(values.get(key), bool) and following.lower() in ("true", "false"):
            section, _, name = key.rpartition(".")
            raise ConfigFileError(
                f"{argument} {following}: a switch takes no value; write {argument} or --{section}.no_{name}"
            )
