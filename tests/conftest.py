"""Shapes are checked while the tests run: every annotated function of course_lib is wrapped by jaxtyping and beartype."""

from jaxtyping import install_import_hook

install_import_hook("course_lib", "beartype.beartype")

import pytest
import torch
from hypothesis import HealthCheck, settings

# No clock decides a test, on a busy machine either. (`--timeout` in pyproject.toml ends what hangs.)
settings.register_profile("course", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("course")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos():
    """The real photographs, fetched once into the data folder of the checkout."""
    from course_lib.worlds.photographs import photographs

    return photographs()


class Inline:
    """A pool that works in this process, so that what runs can be counted."""

    def __init__(self, workers, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)


@pytest.fixture
def inline_pool() -> type[Inline]:
    """In the place of a ProcessPoolExecutor."""
    return Inline
