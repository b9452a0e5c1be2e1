"""What holds for every op: the same bits twice, any number of threads, several callers at once,
every CPU build, and an import that starts no CUDA.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from eet_patch._C import build_info

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference


def cases(dtype, device, scale=1):
    """Every op, in sizes that are worth several threads: {name: (op, reference, arguments)}."""
    few, many = 3 * scale, 70 * scale

    def attention(batch_size, q_len, kv_len, **options):
        names = ("query", "key", "value")
        tensors = inputs.attention_inputs(batch_size, 4, q_len, kv_len, 64, dtype, device)
        return dict(zip(names, tensors, strict=True)) | options

    def block(shape, **options):
        return inputs.attention_block_inputs(shape, 4, dtype, device, **options)

    x, weight, bias = inputs.layernorm_inputs((many, 768), dtype, device)
    packed = inputs.randn(3, 2 * many, 4, 40, dtype=dtype, device=device)
    starts = inputs.cu_seqlens_of([many - 1, 0, many + 1], device)
    made = {
        "embedding": inputs.embedding_inputs((scale, 128, 768), dtype, device),
        "layernorm": {"hidden_states": x, "weight": weight, "bias": bias},
        "bias_residual_layernorm": inputs.bias_residual_layernorm_inputs(
            (many, 768), dtype, device
        ),
        "bias_activation": {"hidden_states": x, "bias": bias},
        "linear few": inputs.linear_inputs((few, 256), 768, dtype, device, norm=True),
        "linear few in_out": inputs.linear_inputs(
            (few, 256), 768, dtype, device, weight_layout="in_out", residual=True
        ),
        "linear many": inputs.linear_inputs((many, 256), 768, dtype, device, norm=True),
        "linear many in_out": inputs.linear_inputs(
            (many, 256), 768, dtype, device, weight_layout="in_out", residual=True
        ),
        "attention prefill": attention(2, many, many, is_causal=True),
        "attention decoding": attention(2, 1, 700),
        "attention packed": {
            "query": packed[0], "key": packed[1], "value": packed[2],
            "cu_seqlens": starts, "max_seqlen": many + 1,
        },
        "multi_head_attention few": block((1, few, 256)),
        "multi_head_attention many": block((2, many, 256)),
        "masked_multi_head_attention few": block((few, 1, 256), norm="pre"),
        "masked_multi_head_attention many": block((2, many, 256), norm="pre"),
        "cross_multi_head_attention": inputs.cross_attention_block_inputs(
            (few, 1, 256), 90, 4, dtype, device
        ),
        "ffn few": inputs.ffn_inputs((few, 256), 1024, dtype, device),
        "ffn many": inputs.ffn_inputs((many, 256), 1024, dtype, device, norm="pre"),
    }  # fmt: skip
    return {
        name: (getattr(ops, name.split()[0]), getattr(reference, name.split()[0]), given)
        for name, given in made.items()
    }


def soil_free_memory(device):
    """Leaves NaN in memory that the next allocations are likely to get."""
    blocks = [torch.full((n,), float("nan"), device=device) for n in (64, 4096, 65536, 1 << 20)]
    del blocks


def test_two_runs_give_the_same_bits(device, dtype):
    for name, (op, _, given) in cases(dtype, device).items():
        first = op(**given)
        soil_free_memory(device)
        assert torch.equal(first, op(**given)), name


def test_a_row_does_not_depend_on_its_batch(device, dtype):
    """Element-wise ops alone: products and attention may choose another kernel for another size."""
    x, weight, bias = inputs.layernorm_inputs((70, 768), dtype, device)
    for op in (ops.layernorm, lambda x, weight, bias: ops.bias_activation(x, bias)):
        whole = op(x, weight, bias)
        assert torch.equal(whole[:1], op(x[:1], weight, bias))
        assert torch.equal(whole[7:40], op(x[7:40], weight, bias))


def test_any_number_of_threads(dtype, num_threads):
    """On CPU. Three threads are more than many machines have processors, and divide few sizes."""
    for op, reference_fn, given in cases(dtype, "cpu").values():
        out = op(**given)
        assert_as_accurate_as_torch(out, reference_fn, **given)
        assert torch.equal(out, op(**given))


def test_four_callers_at_once(device, dtype):
    """The GIL is released in the extension, so calls overlap; each caller has its own values."""
    sets = [cases(dtype, device, scale) for scale in (1, 2, 1, 1)]
    results = [{} for _ in sets]
    errors = []
    barrier = threading.Barrier(len(sets))

    def call(mine, results):
        try:
            barrier.wait()
            for _ in range(2):
                for name, (op, _, given) in mine.items():
                    results.setdefault(name, []).append(op(**given))
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    callers = [threading.Thread(target=call, args=pair) for pair in zip(sets, results, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors
    for mine, outs in zip(sets, results, strict=True):
        for name, (_, reference_fn, given) in mine.items():
            assert all(torch.equal(out, outs[name][0]) for out in outs[name]), name
            assert_as_accurate_as_torch(outs[name][0], reference_fn, **given)


def test_calls_in_inference_mode_and_with_grad_parameters(device, dtype):
    for name, (op, _, given) in cases(dtype, device).items():
        expected = op(**given)
        with torch.inference_mode():
            assert torch.equal(op(**given), expected), name
        asking = {
            k: torch.nn.Parameter(v) if "weight" in k and isinstance(v, torch.Tensor) else v
            for k, v in given.items()
        }
        with torch.no_grad():
            out = op(**asking)
        assert torch.equal(out, expected) and not out.requires_grad, name


def run_python(code, **environment):
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600
    )


RUN_SANITIZE_SELECTION = """
import sys
import pytest
import torch
from eet_patch import _C

capability = _C.build_info()["cpu_capability"]
if capability != {wanted!r}:
    sys.exit(f"EET_CPU_CAPABILITY had no effect: the extension runs {{capability}}")
torch.set_num_threads({threads})
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "sanitize", {folder!r}]))
"""


@pytest.mark.parametrize("capability", ["avx2", "portable"])
def test_every_cpu_build(capability):
    """The selection for compute-sanitizer, which reaches every kernel, on the lesser builds."""
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    code = RUN_SANITIZE_SELECTION.format(
        wanted=capability, threads=torch.get_num_threads(), folder=str(Path(__file__).parent)
    )
    done = run_python(code, EET_CPU_CAPABILITY=capability, EET_TEST_DEVICES="cpu")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


def test_an_unknown_cpu_capability_is_ignored():
    code = "import torch; from eet_patch import _C; print(_C.build_info()['cpu_capability'])"
    expected = build_info()["cpu_capability"]
    if os.environ.get("EET_CPU_CAPABILITY"):
        pytest.skip("EET_CPU_CAPABILITY is set")
    done = run_python(code, EET_CPU_CAPABILITY="sse9")
    assert done.returncode == 0 and done.stdout.strip() == expected


IMPORT_ONLY = """
import os
import torch

def nvidia_files():
    open_files = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if "nvidia" in target:
            open_files.add(target)
    return open_files

before = nvidia_files()
import eet_patch.ops
eet_patch.ops.layernorm(torch.zeros(2, 8), None, None)
assert not torch.cuda.is_initialized(), "torch has started CUDA"
assert nvidia_files() == before, f"the driver was opened: {nvidia_files() - before}"
"""


def test_import_starts_no_cuda():
    """Nor does an op on CPU tensors: after it has started, forked workers can't use CUDA."""
    done = run_python(IMPORT_ONLY)
    assert done.returncode == 0, done.stderr
