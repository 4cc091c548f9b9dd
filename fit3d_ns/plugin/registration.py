"""Whether nerfstudio sees the plugin."""

from nerfstudio.plugins.registry import discover_methods

METHODS = ("fit3d-features", "fit3d-features-paper")


def is_listed_by_ns_train() -> bool:
    """True if `ns-train` offers every method of ours."""
    methods = discover_methods()[0]
    return all(name in methods for name in METHODS)
