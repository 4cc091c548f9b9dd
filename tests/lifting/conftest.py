import pytest

from fit3d_ns.lifting.views import LiftView
from fit3d_ns.scene import ActivatedGaussians
from tests.lifting.lifting_scene import create_gaussians, create_views


@pytest.fixture
def gaussians() -> ActivatedGaussians:
    return create_gaussians()


@pytest.fixture
def views() -> list[LiftView]:
    return create_views()
