"""Settings of several results as short texts: what they share, and in what they differ."""

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def find_differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings in which those that have them differ, or that only some have."""
    names = dict.fromkeys(name for item in settings for name in item)
    return [name for name in names if len({repr(item.get(name)) for item in settings}) > 1]


def describe_settings(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """`name=value` of the chosen settings that are there."""
    return ", ".join(f"{name.split('.')[-1]}={_plain(settings[name])}" for name in names if name in settings)


def describe_versions(versions: Sequence[Mapping[str, str]]) -> str:
    """Packages with their versions; several where rows differ."""
    parts = []
    for package in dict.fromkeys(name for item in versions for name in item):
        found = sorted({item[package] for item in versions if package in item})
        parts.append(f"{package} {' and '.join(found)}")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
