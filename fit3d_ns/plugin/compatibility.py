"""One check, when the plugin is loaded, that the hosts are versions it was written for."""

import warnings
from importlib import metadata

from packaging.version import Version

SUPPORTED = {"nerfstudio": ("1.1.5", "1.2"), "gsplat": ("1.4.0", "1.6"), "timm": ("1.0.20", "2")}
"""Package to the first supported version and the first that is not, `[from, to)`."""


def check_versions() -> None:
    """Warns, in one sentence each, of packages that are too old or too new; a wrong guess must not stop `ns-train`."""
    for package, (first, beyond) in SUPPORTED.items():
        problem = describe_problem(package, first, beyond)
        if problem:
            warnings.warn(problem, stacklevel=2)


def describe_problem(package: str, first: str, beyond: str) -> str | None:
    """What is wrong with the installed version of a package, or None.

    Args:
        package: Name of the distribution.
        first: Oldest version that works.
        beyond: Oldest version that is not known to work.
    """
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"fit3d_ns needs {package} >= {first}, which is not installed; see the README's install section."
    if Version(installed) < Version(first):
        return f"fit3d_ns needs {package} >= {first}, found {installed}, too old; see the README's install section."
    if Version(installed) >= Version(beyond):
        return f"fit3d_ns is tried with {package} < {beyond}, found {installed}, which is newer; expect differences."
    return None
