import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))  # for simtest and oracles

from simtest import ptxsim


@pytest.fixture
def sim():
    return ptxsim
