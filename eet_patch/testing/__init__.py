"""What results are checked against: references in plain PyTorch, inputs and the error bound."""

from eet_patch.testing import inputs, reference
from eet_patch.testing.accuracy import (
    ERROR_SLACK,
    MAX_ERROR_RATIO,
    assert_as_accurate_as_torch,
    relative_error,
)

__all__ = [
    "ERROR_SLACK",
    "MAX_ERROR_RATIO",
    "assert_as_accurate_as_torch",
    "inputs",
    "reference",
    "relative_error",
]
