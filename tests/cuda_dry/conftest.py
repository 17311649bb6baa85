import pytest

from configurator import InputError
from sologpt.nullgpu.build import build_library


@pytest.fixture(scope='session', autouse=True)
def null_gpu():
    """Skips all tests of this folder where the null GPU cannot be built."""
    try:
        build_library()
    except InputError as error:
        pytest.skip(str(error))
