"""YAML files of a run's configuration."""

import os
from dataclasses import asdict, fields
from pathlib import Path
from reprlib import repr as short
from typing import get_origin

from ditfast.command import option_of
from ditfast.optional import import_optional
from ditfast.small_files import read_text
from ditfast.suggest import did_you_mean
from ditfast.training import TrainError
from ditfast.training.config import Config

YES, NO, NULL = ("true", "yes", "on"), ("false", "no", "off"), ("", "~", "null", "Null", "NULL")  # in YAML


def flags_from_yaml(path: str | Path) -> list[str]:
    """Options of a YAML file as flags, so both get the same checks.

    Raises:
        TrainError: the file cannot be read, is not a mapping, or has an unknown name or invalid value.
    """
    try:
        yaml = import_optional("yaml")
        found = yaml.load(read_text(path), yaml.BaseLoader) or {}  # all strings: "on" stays "on", "007" stays "007"
    except RecursionError as error:
        raise TrainError(f"--config {path} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError, import_optional("yaml").YAMLError) as error:
        raise TrainError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise TrainError(f"--config {path} must be a mapping, got {type(found).__name__}")
    known = {f.name: f.type for f in fields(Config)}
    flags: list[str] = []
    for name, value in found.items():
        if name not in known:
            raise TrainError(f"--config {path}: unknown name {name!r}{did_you_mean(name, known)}")
        flag = option_of(name)
        if get_origin(known[name]) is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
            flags += [flag, *value]
            continue
        if not isinstance(value, str):
            raise TrainError(f"--config {path}: {name} must be a single value, got {short(value)}")
        if value in NULL:  # keep the default
            continue
        if known[name] is not bool:
            flags += [flag, os.path.expanduser(value)]
        elif value.lower() in (*YES, *NO):
            flags.append(flag if value.lower() in YES else flag.replace("--", "--no-", 1))
        else:
            raise TrainError(f"--config {path}: {name} must be true or false, got {value!r}")
    return flags


def to_yaml(config: Config) -> str:
    """The config as YAML for `flags_from_yaml`."""
    kept = {name: value for name, value in asdict(config).items() if name != "take_over"}  # for one run only
    return import_optional("yaml").safe_dump(kept, sort_keys=False)
