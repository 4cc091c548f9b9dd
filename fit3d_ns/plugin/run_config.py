"""A run's `config.yml`: where it lies, and reading it without running anything it says.

nerfstudio writes the config as YAML that names Python classes, and reads it with a loader that builds any object and
calls any function. Here, only config dataclasses of nerfstudio and of this package are built, and only classes of
theirs and of torch's optimizers may be referred to; the rest is refused, unless the user trusts the file.
"""

import dataclasses
import enum
import importlib
from pathlib import Path, PurePath
from typing import Any

import yaml
from nerfstudio.cameras.camera_optimizers import CameraOptimizer
from nerfstudio.data.dataparsers.base_dataparser import DataParser
from nerfstudio.engine.trainer import TrainerConfig

from fit3d_ns.data.layouts import RUN_CONFIG, find_runs
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.progress import notice

CONFIG_PACKAGES = ("nerfstudio", "fit3d_ns")
"""Packages whose dataclasses and enumerations a config may hold."""
REFERRED_PACKAGES = (*CONFIG_PACKAGES, "torch.optim")
"""Packages whose classes a config may name, for example as `_target`."""
REFERRED_FUNCTIONS = ("nerfstudio.data.utils.nerfstudio_collate.nerfstudio_collate",)
"""The one function that configs of nerfstudio's data managers name."""
MAX_BYTES = 4_000_000


class UntrustedConfig(ValueError):
    """The config names something that is neither nerfstudio's nor ours."""


def find_config(path: Path) -> Path:
    """The config.yml that a path means: the file itself, its folder's, or the one run's below a folder.

    ValueError where there is none, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"No such run: {path}; give a run's config.yml or its folder.")
    if (path / RUN_CONFIG).is_file():
        return path / RUN_CONFIG
    found = find_runs(path)
    if not found:
        raise ValueError(
            f"{path} holds no run: no {RUN_CONFIG} lies next to nerfstudio_models/ in it, or up to three folders below."
        )
    if len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} runs; give one of them, such as {found[-1]}.")
    return found[0]


def load_config(path: Path, trust: bool = False) -> Any:
    """Reads the config.yml of a run of nerfstudio or of ours, a `TrainerConfig`.

    `trust` reads it with nerfstudio's loader, which runs what it says; for methods of other packages. ValueError where
    it is not such a config, or names classes of other packages and is not trusted.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        text = path.read_text(encoding="utf-8")
        if trust:
            notice(f"Running what {path} says, because --trust-config is given.")
        config: Any = yaml.load(text, Loader=yaml.Loader if trust else _ConfigLoader)
    except UntrustedConfig as error:
        problem = f"{path} names {error}, which is neither nerfstudio's nor ours, so that reading it could run anything"
        raise ValueError(f"{problem}; add --trust-config if you trust whoever made this run.") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a nerfstudio config ({first_line(error)}).") from error
    if not isinstance(config, TrainerConfig):
        raise ValueError(f"{path} is not a nerfstudio run: it holds a {type(config).__name__}.")
    if not trust:
        _check_targets(config, path)
    return config


class _ConfigLoader(yaml.SafeLoader):
    """Builds plain values, paths, enumerations, and dataclasses of `CONFIG_PACKAGES`."""


def _check_targets(config: Any, path: Path) -> None:
    """Raises ValueError where what reading a run sets up is no data parser or no camera optimizer."""
    try:
        parser = config.pipeline.datamanager.dataparser._target
        optimizer = config.pipeline.model.camera_optimizer._target
    except AttributeError as error:
        raise ValueError(f"{path} is not the config of a splatting method ({error}).") from error
    for target, kind in ((parser, DataParser), (optimizer, CameraOptimizer)):
        if not (isinstance(target, type) and issubclass(target, kind)):
            raise ValueError(f"{path} names {target!r} where a {kind.__name__} belongs; restore the file.")


def _resolve(name: str, packages: tuple[str, ...]) -> Any:
    """The object of a dotted name, if it lies in one of the packages."""
    module, _, attribute = name.rpartition(".")
    if not any(module == package or module.startswith(f"{package}.") for package in packages):
        raise UntrustedConfig(name)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} does not exist in what is installed here") from error
    # A module of ours may hold somebody else's function under its own name.
    origin = f"{getattr(found, '__module__', '')}."
    if not any(origin.startswith(f"{package}.") for package in packages):
        raise UntrustedConfig(name)
    return found


def _construct_object(loader: Any, name: str, node: Any) -> Any:
    kind = _resolve(name, CONFIG_PACKAGES)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UntrustedConfig(name)
    made = object.__new__(kind)
    yield made
    made.__dict__.update(loader.construct_mapping(node, deep=True))


def _construct_name(loader: Any, name: str, node: Any) -> Any:
    found = _resolve(name, REFERRED_PACKAGES)
    if not isinstance(found, type) and name not in REFERRED_FUNCTIONS:
        raise UntrustedConfig(name)
    return found


def _construct_call(loader: Any, name: str, node: Any) -> Any:
    if not isinstance(node, yaml.SequenceNode):
        raise UntrustedConfig(name)
    arguments = loader.construct_sequence(node, deep=True)
    if name.startswith("pathlib.") and name.endswith("Path"):
        return (PurePath if "Pure" in name else Path)(*map(str, arguments))
    # Debian 12's Python 3.11.2 wrote enumerations as `getattr`; only members are looked up here, no attributes.
    is_by_name = name == "builtins.getattr" and len(arguments) == 2
    kind = arguments[0] if is_by_name else _resolve(name, CONFIG_PACKAGES)
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise UntrustedConfig(name)
    return kind[arguments[1]] if is_by_name else kind(*arguments)


_PYTHON = "tag:yaml.org,2002:python/"
_CONSTRUCTORS: dict[str, Any] = {
    "tuple": lambda loader, _, node: tuple(loader.construct_sequence(node, deep=True)),
    "object:": _construct_object,
    "object/apply:": _construct_call,
    "name:": _construct_name,
    "": lambda _, name, __: _resolve(name, ()),
}
for _suffix, _construct in _CONSTRUCTORS.items():
    _ConfigLoader.add_multi_constructor(_PYTHON + _suffix, _construct)
