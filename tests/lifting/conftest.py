import pytest

from fit3d_ns.lifting import LiftGaussians, LiftView
from tests.lifting.lifting_scene import create_gaussians, create_views


@pytest.fixture
def gaussians() -> LiftGaussians:
    return create_gaussians()


@pytest.fixture
def views() -> list[LiftView]:
    return create_views()
