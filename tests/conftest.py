"""Shapes are checked while the tests run: jaxtyping and beartype wrap every annotated function of course_lib."""

from jaxtyping import install_import_hook

install_import_hook("course_lib", "beartype.beartype")

import os  # noqa: E402  (course_lib is imported after the hook)
import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# What tests compute stays out of the folder of the user's cache; tests of the cache name folders of their own.
os.environ.setdefault("COURSE_CACHE", "off")
os.environ["NO_COLOR"] = "1"  # what notebooks say is compared as text

ROOT = Path(__file__).resolve().parents[1]

# No clock decides a test, on a busy machine either. (`--timeout` in pyproject.toml ends what hangs.)
# Examples are drawn anew by whoever develops; CI repeats its own.
settings.register_profile(
    "course",
    settings.default,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=os.environ.get("CI") == "true",
)
settings.load_profile("course")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos():
    """The real photographs, fetched once into the data folder of the checkout."""
    from course_lib.worlds.photographs import photographs

    return photographs()


@pytest.fixture(scope="session")
def installable(tmp_path_factory):
    """A copy of all that an installation is built from: a build leaves its own files behind."""
    copy = tmp_path_factory.mktemp("installable")
    shutil.copytree(ROOT / "course_lib", copy / "course_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shelf = [*(ROOT / "data" / "evidence").glob("*.json"), *(ROOT / "data" / "licences").glob("*.txt")]
    tables = [file.relative_to(ROOT) for file in shelf]
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-text", "data/photographs.json", *tables):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


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
