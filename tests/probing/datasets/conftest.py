"""The miniature ScanNet++ scene that the tests of captures read, too."""

from tests.data.conftest import scannetpp_scene

__all__ = ["scannetpp_scene"]
