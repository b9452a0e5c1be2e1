"""Fixtures of every integration test: devices, dtypes, seeds, threads and a clean patch state.

Environment:
    EET_TEST_DEVICES    devices to test, as "cpu" or "cpu,cuda". Default: both, CUDA skipped where
                        it is missing; if it is named here and missing, its tests fail.
"""

import os
import sys

# Threads that wait must not spin: with other jobs on the machine that more than doubles the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

SEED = 20250
ALL_DEVICES = ("cpu", "cuda")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "sanitize: small cases that reach every kernel, for compute-sanitizer"
    )


def requested_devices():
    named = os.environ.get("EET_TEST_DEVICES", "")
    devices = tuple(name.strip() for name in named.split(",") if name.strip())
    unknown = set(devices) - set(ALL_DEVICES)
    if unknown:
        raise pytest.UsageError(
            f"EET_TEST_DEVICES must name devices out of {', '.join(ALL_DEVICES)}, got {named!r}"
        )
    return devices or ALL_DEVICES


def why_no_cuda():
    """The reason why CUDA can't be tested here, or None."""
    if not torch.cuda.is_available():
        return "torch.cuda is not available"
    from eet_patch.ops._extension import has_cuda

    return None if has_cuda() else "eet_patch was built without CUDA"


@pytest.fixture(params=requested_devices())
def device(request):
    """torch.device("cpu"), then torch.device("cuda", 0)."""
    if request.param == "cpu":
        return torch.device("cpu")
    reason = why_no_cuda()
    if reason is not None and os.environ.get("EET_TEST_DEVICES"):
        pytest.fail(f"EET_TEST_DEVICES names cuda, but {reason}")
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda", 0)


# A test that wants fewer: @pytest.mark.parametrize("dtype", [torch.float32]).
@pytest.fixture(
    params=[torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    """Leaves no patch, and no count of what ran, to the next test."""
    yield
    package = sys.modules.get("eet_patch")
    for name in ("disable", "reset_report"):
        undo = getattr(package, name, None)
        if undo is not None:
            undo()


@pytest.fixture(params=[1, 2, 3])
def num_threads(request):
    """Threads of torch's CPU work, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
