"""Builds the one extension, eet_patch._C: the CPU part always, the CUDA part where nvcc is found.

Environment:
    EET_CUDA        0: never build the CUDA part; 1: fail if it can't be built.
                    Default: build it if nvcc is found.
    EET_CUDA_ARCHS  compute capabilities, as "80;90a" (90 is taken as 90a), or "native": those of
                    the GPUs in this machine, and the CPU part alone where there is none. Default:
                    those of the GPUs in this machine, else every one that this nvcc knows out of
                    75 80 86 89 90a 100 120, with PTX for the newest.
    EET_WERROR      1: fail on a warning of any compiler.
    EET_BUILD_JOBS  how many files are compiled at a time. Default: the number of processors.
    CXX, CUDA_HOME  the C++ compiler and the CUDA toolkit to use.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = ("75", "80", "86", "89", "90a", "100", "120")
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-g0"]
# -fopenmp at compile time only: the OpenMP runtime is the one that torch has loaded; a second one
# in the process would fight with it for the processors.
CPU_FLAGS = ["-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
CPU_ARCHS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
    + ["-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


class BuildError(SystemExit):
    """Ends the build with a message that says what to install or set."""

    def __init__(self, message):
        super().__init__(f"\neet_patch: {message}\n")


def run(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.stdout.strip():
        print(result.stdout, flush=True)
    if result.returncode:
        raise BuildError(
            f"this command failed ({result.returncode}):\n  {' '.join(map(str, command))}"
        )


def find_cxx():
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name.split()
    raise BuildError(
        "no C++ compiler found. Install one (Debian, Ubuntu: apt-get install g++; "
        "Fedora: dnf install gcc-c++) "
        "or set CXX to it."
    )


def find_nvcc():
    wanted = os.environ.get("EET_CUDA", "")
    if wanted == "0":
        return None
    candidates = [
        os.path.join(os.environ[v], "bin", "nvcc")
        for v in ("CUDA_HOME", "CUDA_PATH")
        if v in os.environ
    ]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if shutil.which(candidate):
            return shutil.which(candidate)
    if wanted == "1":
        raise BuildError(
            "EET_CUDA=1, but no nvcc was found. Install the CUDA toolkit, set CUDA_HOME to it, "
            "or set EET_CUDA=0 to "
            "build for the CPU alone."
        )
    return None


def cuda_archs(nvcc):
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    supported = set(re.findall(r"compute_(\d+)", listed))
    chosen = os.environ.get("EET_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
    native = chosen == "native"
    if chosen and not native:
        archs = [a for a in chosen.split(";") if a]
        for arch in archs:
            if not re.fullmatch(r"\d+[af]?", arch) or arch.rstrip("af") not in supported:
                raise BuildError(
                    f"EET_CUDA_ARCHS names {arch!r}, which this nvcc does not know; it knows "
                    f"{', '.join(sorted(supported, key=int))} "
                    "(with an a or f suffix where the GPU has one)."
                )
        # Plain 90 lacks warpgroup products, and the kernels can't tell the two apart when they run.
        return list(dict.fromkeys("90a" if arch == "90" else arch for arch in archs))
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout
        present = sorted({c.replace(".", "") for c in re.findall(r"\d+\.\d+", found)}, key=int)
        present = ["90a" if c == "90" else c for c in present if c in supported]
        if present:
            return present
    if native:
        return []
    return [a for a in DEFAULT_ARCHS if a.rstrip("a") in supported]


def gencode(archs):
    flags = []
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    newest = max(archs, key=lambda a: int(a.rstrip("af")))
    if newest.isdigit():  # PTX of an "a" target runs on no other GPU
        flags += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
    return flags


class BuildExtension(build_ext):
    def build_extension(self, ext):
        import pybind11

        cxx, nvcc = find_cxx(), find_nvcc()
        archs = cuda_archs(nvcc) if nvcc else []
        if not archs:
            nvcc = None
        strict = os.environ.get("EET_WERROR") == "1"
        temp = Path(self.build_temp).resolve()
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{CSRC}", *(["-Werror"] if strict else [])]
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        x86 = platform.machine().lower() in ("x86_64", "amd64")

        jobs = []  # (source, object, command)

        def add(source, tag, command):
            obj = temp / f"{source.relative_to(CSRC)}.{tag}.o"
            obj.parent.mkdir(parents=True, exist_ok=True)
            jobs.append((source, obj, [*command, "-c", str(source), "-o", str(obj)]))

        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            base = [*cxx, *CXX_FLAGS, *CPU_FLAGS, *include]
            if source.name == "dispatch.cpp":
                add(source, "cpu", base)
                continue
            for arch, flags in CPU_ARCHS.items():
                if x86 or arch == "portable":
                    add(source, arch, [*base, *flags, f"-DEET_CPU_ARCH={arch}"])
        cuda = []
        if nvcc:
            cuda = ["-DEET_WITH_CUDA", f'-DEET_CUDA_ARCHS="{";".join(archs)}"']
            print(f"eet_patch: building for CUDA with {nvcc}, archs {' '.join(archs)}", flush=True)
            nvcc_flags = [*NVCC_FLAGS, *(["-Werror", "all-warnings"] if strict else [])]
            host = ["-ccbin", cxx[0]] if os.environ.get("CXX") else []
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                add(source, "cuda", [nvcc, *host, *nvcc_flags, f"-I{CSRC}", *gencode(archs)])
        else:
            print("eet_patch: building for the CPU alone", flush=True)
        bindings = [*cxx, *CXX_FLAGS, *include, *python, *cuda]
        if nvcc:
            bindings += [f"-I{path}" for path in cuda_include_dirs(nvcc)]
        for source in sorted(CSRC.glob("bindings*.cpp")):
            add(source, "py" + ("_cuda" if nvcc else ""), bindings)

        headers = [p for pattern in ("*.h", "*.cuh") for p in CSRC.rglob(pattern)]
        newest_header = max(p.stat().st_mtime for p in [*headers, ROOT / "setup.py"])
        stale = [
            (obj, command)
            for source, obj, command in jobs
            if not obj.exists() or obj.stat().st_mtime < max(source.stat().st_mtime, newest_header)
        ]
        workers = int(os.environ.get("EET_BUILD_JOBS") or os.cpu_count() or 1)
        # The slowest files first, so that none is left alone at the end.
        stale.sort(key=lambda item: "cuda" not in item[0].name)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(pool.map(lambda item: run(item[1]), stale))
        objects = [str(obj) for _, obj, _ in jobs]
        if nvcc:
            run([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(out)])
        else:
            run([*cxx, "-shared", *objects, "-o", str(out)])


def cuda_include_dirs(nvcc):
    # nvcc on the PATH may be a wrapper outside its toolkit: ask it where its headers are.
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    dirs = re.findall(r'"-I([^"]+)"', dryrun.stderr + dryrun.stdout)
    return dirs or [str(Path(nvcc).resolve().parent.parent / "include")]


if sys.platform != "linux":
    raise BuildError(f"only Linux is supported, this is {sys.platform}.")

setup(ext_modules=[Extension("eet_patch._C", sources=[])], cmdclass={"build_ext": BuildExtension})
