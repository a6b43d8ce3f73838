"""One check of positive integers serves every count that a user gives."""

import numpy as np
import pytest

from ecanet import ECA
from ecanet.errors import ConfigError, check_positive_int


def test_integers_of_numpy_are_integers():
    count = check_positive_int("channels", np.int64(64))
    assert count == 64
    assert type(count) is int
    assert type(ECA(np.int32(64)).channels) is int


@pytest.mark.parametrize("value", [0, -3, True, np.True_, 2.0, "2", None])
def test_other_values_are_refused_in_one_line(value):
    with pytest.raises(ConfigError) as error:
        check_positive_int("channels", value)
    assert str(error.value) == f"channels must be a positive integer, got {value!r}"
