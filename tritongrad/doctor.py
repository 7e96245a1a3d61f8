"""``tritongrad doctor``: what this machine has, what runs on it, and what is wrong with it.

``examine`` looks, ``diagnose`` judges what it found. Nothing here needs more than torch and triton:
a doctor is asked where other things are missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import runtime
from .op import OPS

MINIMUM = {"torch": (2, 11), "triton": (3, 7)}
"""The oldest versions that tritongrad runs with."""

CAPABILITY = (8, 0)
"""The least compute capability that Triton compiles for on NVIDIA GPUs."""

REPORTED = ("tritongrad", "torch", "triton", "numpy")


@dataclass(frozen=True)
class Device:
    """A GPU that torch sees.

    Attributes:
        capability: CUDA compute capability; on ROCm the architecture counts (``gfx942``).
    """

    name: str
    architecture: str
    capability: tuple[int, int]
    gigabytes: float


@dataclass(frozen=True)
class Findings:
    """What ``examine`` found.

    Attributes:
        versions: version by package, None for one that is not installed.
        platform: "cuda", "rocm" or "cpu": what torch was built for.
        driver: version of the GPU's driver.
        gpus: GPUs that the system has, whether torch sees them or not.
        devices: GPUs that torch sees.
        interpreted: whether kernels run in Triton's interpreter.
        compiler: the C compiler that Triton builds its launchers with.
        cache: directory that Triton keeps compiled kernels in.
        cache_problem: why nothing can be written there.
        trial_problem: why a kernel does not run forward and backward.
    """

    python: str
    system: str
    versions: dict[str, str | None]
    platform: str
    platform_version: str | None
    driver: str | None
    gpus: int
    devices: tuple[Device, ...]
    interpreted: bool
    compiler: str | None
    cache: str
    cache_problem: str | None
    trial_problem: str | None

    @property
    def mode(self) -> str:
        """How kernels run, and why."""
        if self.interpreted:
            why = "TRITON_INTERPRET is set" if self.devices else "torch sees no GPU"
            return f"interpreted ({why})"
        why = "torch sees a GPU" if self.devices else "TRITON_INTERPRET is set to 0"
        return f"compiled ({why})"


@dataclass(frozen=True)
class Problem:
    """Something wrong with the environment, and what to do about it."""

    what: str
    remedy: str


# ------------------------------------------------------------------------------------------ looking


def examine() -> Findings:
    """Look at this machine; runs one small kernel forward and backward on each device."""
    cache = cache_directory()
    built_for = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    return Findings(
        python=platform.python_version(),
        system=platform.platform(),
        versions={package: installed(package) for package in REPORTED},
        platform=built_for,
        platform_version=torch.version.hip or torch.version.cuda,
        driver=driver_version(),
        gpus=count_gpus(),
        devices=visible_devices(),
        interpreted=runtime.INTERPRETED,
        compiler=find_compiler(),
        cache=str(cache),
        cache_problem=try_cache(cache),
        trial_problem=try_kernel(),
    )


def installed(package: str) -> str | None:
    """Version of an installed package."""
    # Asked of the module: what brings triton may be called pytorch-triton, or otherwise.
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return None


def visible_devices() -> tuple[Device, ...]:
    """The GPUs that torch sees."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        capability = (properties.major, properties.minor)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        found.append(
            Device(
                properties.name,
                architecture or f"sm_{capability[0]}{capability[1]}",
                capability,
                round(properties.total_memory / 2**30, 1),
            )
        )
    return tuple(found)


def _ask(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def driver_version() -> str | None:
    """Version of the NVIDIA or AMD driver."""
    lines = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    if lines:
        return lines[0]
    amd = Path("/sys/module/amdgpu/version")
    return amd.read_text().strip() if amd.is_file() else None


def count_gpus() -> int:
    """GPUs that the system lists, independently of torch."""
    nvidia = sum(line.startswith("GPU ") for line in _ask("nvidia-smi", "-L").splitlines())
    return nvidia or len(re.findall(r"^GPU\[\d+\].*Card Series", _ask("rocm-smi", "-i"), re.M))


def find_compiler() -> str | None:
    """The C compiler that Triton will call (``triton.runtime.build``)."""
    wanted = os.environ.get("CC")
    return shutil.which(wanted) if wanted else shutil.which("gcc") or shutil.which("clang")


def cache_directory() -> Path:
    """Where Triton keeps what it has compiled."""
    from triton import knobs

    return Path(knobs.cache.dir)


def try_cache(directory: Path) -> str | None:
    """Why a file cannot be written in ``directory``, None if it can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as problem:
        return f"{problem.strerror or problem}"


def try_kernel() -> str | None:
    """Multiply on every device, forward and backward. Returns what goes wrong."""
    launched = 0

    def count(*launch: object) -> None:
        nonlocal launched
        launched += 1

    # Without a GPU, compiled kernels are tried all the same: torch says best why there is none.
    gpus = range(max(torch.cuda.device_count(), 1))
    device = ""
    try:
        for device in ["cpu"] if runtime.INTERPRETED else [f"cuda:{i}" for i in gpus]:
            launched = 0
            x = torch.arange(4.0, device=device, requires_grad=True)
            with runtime.observe(count):
                y = OPS["mul"](x, x)
                y.backward(torch.ones_like(y))
            if y.tolist() != [0, 1, 4, 9] or x.grad is None or x.grad.tolist() != [0, 2, 4, 6]:
                return f"{device}: a product of two vectors, or its gradient, is wrong"
            if launched < 2:
                return f"{device}: launched {launched} kernels, not one forward and one backward"
    except Exception as problem:
        return f"{device}: {type(problem).__name__}: {problem}"
    return None


# ------------------------------------------------------------------------------------------ judging


def diagnose(found: Findings) -> list[Problem]:
    """What is wrong, most fundamental first."""
    problems = []
    for package, minimum in MINIMUM.items():
        version = found.versions[package]
        least = ".".join(map(str, minimum))
        if version is not None and release(version) < minimum:
            problems.append(
                Problem(
                    f"{package} {version} is older than {least}, the oldest that is supported",
                    f"pip install --upgrade '{package}>={least}'",
                )
            )
    problems += _diagnose_devices(found)
    if not found.interpreted and found.devices:
        problems += _diagnose_compilation(found)
    if found.trial_problem is not None:
        problems.append(
            Problem(
                f"a kernel does not run: {found.trial_problem}",
                "mend what is named above first; if nothing is, this is a bug: please report it "
                "with the output of `tritongrad doctor --json FILE`",
            )
        )
    return problems


def release(version: str) -> tuple[int, ...]:
    """``(2, 11, 0)`` for ``2.11.0+cu130``."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _diagnose_devices(found: Findings) -> list[Problem]:
    problems = []
    if found.devices and found.interpreted:
        problems.append(
            Problem(
                "kernels are interpreted although there is a GPU: thousands of times slower",
                "unset TRITON_INTERPRET",
            )
        )
    if not found.devices and not found.interpreted:
        problems.append(
            Problem(
                "no GPU to compile kernels for, and the interpreter is off",
                "unset TRITON_INTERPRET",
            )
        )
    if found.gpus and not found.devices:
        there = f"the machine has {found.gpus} GPU{'s' if found.gpus > 1 else ''}"
        if found.platform == "cpu":
            problems.append(
                Problem(
                    f"{there}, but this is torch's CPU build",
                    "install a CUDA or ROCm build of torch: https://pytorch.org/get-started/locally",
                )
            )
        else:
            problems.append(
                Problem(
                    f"{there}, but torch, built for {found.platform} {found.platform_version}, "
                    f"sees none (driver {found.driver or 'unknown'})",
                    "unset CUDA_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES if they hide it; else "
                    "update the driver, or install a build of torch for an older one",
                )
            )
    if found.platform == "cuda":
        problems += [
            Problem(
                f"{device.name} is {device.architecture}; Triton compiles for sm_80 and newer",
                "hide it with CUDA_VISIBLE_DEVICES, so that another GPU or the interpreter is used",
            )
            for device in found.devices
            if device.capability < CAPABILITY
        ]
    return problems


def _diagnose_compilation(found: Findings) -> list[Problem]:
    problems = []
    if found.compiler is None:
        problems.append(
            Problem(
                "no C compiler for Triton's launchers: neither $CC nor gcc nor clang",
                "install gcc (apt-get install gcc, dnf install gcc), or set CC to a compiler",
            )
        )
    if found.cache_problem is not None:
        problems.append(
            Problem(
                f"Triton's cache {found.cache} is not writable: {found.cache_problem}",
                "set TRITON_CACHE_DIR to a directory that is",
            )
        )
    return problems


# ---------------------------------------------------------------------------------------- reporting


def report(found: Findings, problems: Sequence[Problem]) -> str:
    """Findings and problems for people."""
    built = f"{found.platform} {found.platform_version or ''}".strip()
    lines = [
        ("python", f"{found.python} on {found.system}"),
        *((package, version or "not installed") for package, version in found.versions.items()),
        ("torch built for", built),
        ("driver", found.driver or "none found"),
        *(
            (f"device {i}", f"{d.name}, {d.architecture}, {d.gigabytes} GiB")
            for i, d in enumerate(found.devices)
        ),
        ("kernels", found.mode),
        ("C compiler", found.compiler or "none"),
        ("cache", found.cache),
        ("trial", found.trial_problem or "a kernel ran forward and backward"),
    ]
    text = [f"{name:<16}{value}" for name, value in lines]
    for problem in problems:
        text += ["", f"problem: {problem.what}", f"remedy:  {problem.remedy}"]
    text += ["", f"problems: {len(problems)}" if problems else "nothing is wrong"]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="tritongrad doctor", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    options = parser.parse_args(arguments)
    found = examine()
    problems = diagnose(found)
    print(report(found, problems))
    if options.json is not None:
        facts = asdict(found) | {"mode": found.mode, "problems": [asdict(p) for p in problems]}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if problems else 0
