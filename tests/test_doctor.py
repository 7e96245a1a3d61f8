"""``tritongrad doctor``: what is wrong with an environment is named, with a remedy."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tritongrad import doctor, runtime
from tritongrad.__main__ import main
from tritongrad.doctor import Device, Findings

ROOT = Path(__file__).parents[1]

H200 = Device("NVIDIA H200", "sm_90", (9, 0), 139.8)
V100 = Device("Tesla V100", "sm_70", (7, 0), 15.8)

GPU = Findings(
    python="3.12.3",
    system="Linux",
    versions={"tritongrad": "0.1.0", "torch": "2.11.0+cu130", "triton": "3.7.1", "numpy": None},
    platform="cuda",
    platform_version="13.0",
    driver="580.82",
    gpus=1,
    devices=(H200,),
    interpreted=False,
    compiler="/usr/bin/gcc",
    cache="/home/user/.triton/cache",
    cache_problem=None,
    trial_problem=None,
)
"""A machine with a GPU and nothing wrong."""

LAPTOP = dataclasses.replace(
    GPU, platform="cpu", platform_version=None, driver=None, gpus=0, devices=(), interpreted=True
)
"""A machine without a GPU and nothing wrong."""


@pytest.mark.parametrize(
    ("healthy", "change", "what", "remedy"),
    [
        (GPU, {"versions": GPU.versions | {"torch": "2.10.1"}}, "torch 2.10.1 is older", "2.11"),
        (GPU, {"versions": GPU.versions | {"triton": "3.6.0"}}, "triton 3.6.0 is older", "3.7"),
        (GPU, {"interpreted": True}, "interpreted although", "unset TRITON_INTERPRET"),
        (LAPTOP, {"interpreted": False}, "interpreter is off", "unset TRITON_INTERPRET"),
        (LAPTOP, {"gpus": 2}, "2 GPUs, but this is torch's CPU build", "pytorch.org"),
        (
            GPU,
            {"devices": (), "interpreted": True},
            "1 GPU, but torch, built for cuda 13.0, sees none (driver 580.82)",
            "CUDA_VISIBLE_DEVICES",
        ),
        (GPU, {"devices": (H200, V100)}, "Tesla V100 is sm_70", "CUDA_VISIBLE_DEVICES"),
        (GPU, {"compiler": None}, "no C compiler", "install gcc"),
        (GPU, {"cache_problem": "Read-only file system"}, "not writable: Read", "TRITON_CACHE_DIR"),
        (GPU, {"trial_problem": "cuda:0: it burnt"}, "does not run: cuda:0: it burnt", "report"),
    ],
)
def test_problem(healthy: Findings, change: dict[str, Any], what: str, remedy: str) -> None:
    assert doctor.diagnose(healthy) == []
    found = dataclasses.replace(healthy, **change)
    (problem,) = doctor.diagnose(found)
    assert what in problem.what
    assert remedy in problem.remedy
    text = doctor.report(found, [problem])
    assert f"problem: {problem.what}\nremedy:  {problem.remedy}\n" in text
    assert text.endswith("problems: 1")


def test_what_only_compiling_needs_is_no_problem_for_the_interpreter() -> None:
    found = dataclasses.replace(LAPTOP, compiler=None, cache_problem="Permission denied")
    assert doctor.diagnose(found) == []


def test_old_amd_capabilities_are_not_nvidias() -> None:
    mi100 = Device("MI100", "gfx908", (9, 0), 32.0)
    found = dataclasses.replace(GPU, platform="rocm", devices=(mi100, V100))
    assert doctor.diagnose(found) == []


@pytest.mark.parametrize(
    ("found", "mode"),
    [
        (GPU, "compiled (torch sees a GPU)"),
        (LAPTOP, "interpreted (torch sees no GPU)"),
        (dataclasses.replace(GPU, interpreted=True), "interpreted (TRITON_INTERPRET is set)"),
        (
            dataclasses.replace(LAPTOP, interpreted=False),
            "compiled (TRITON_INTERPRET is set to 0)",
        ),
    ],
)
def test_mode(found: Findings, mode: str) -> None:
    assert found.mode == mode
    text = doctor.report(found, [])
    assert re.search(rf"^kernels +{re.escape(mode)}$", text, re.M)
    assert text.endswith("nothing is wrong")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.11.0+cu130", (2, 11, 0)), ("2.13.0a0+git1f", (2, 13, 0)), ("3.6", (3, 6))],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(version) == numbers


def test_minimum_versions_are_those_that_pip_demands() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for package, minimum in doctor.MINIMUM.items():
        assert f'"{package}>={".".join(map(str, minimum))}"' in pyproject


# ------------------------------------------------------------------------------------------ looking


def test_this_machine() -> None:
    found = doctor.examine()
    assert found.versions["torch"] == torch.__version__
    assert found.interpreted == runtime.INTERPRETED
    assert found.trial_problem is None
    assert (found.platform == "cpu") == (torch.version.cuda is None and torch.version.hip is None)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Pretend that programs print something, and that there are no others."""

    def install(outputs: dict[str, str]) -> None:
        def run(command: list[str], **options: Any) -> Any:
            return SimpleNamespace(returncode=0, stdout=outputs[" ".join(command)])

        there = {command.split()[0] for command in outputs}
        monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
        monkeypatch.setattr("subprocess.run", run)

    return install


def test_nvidia_smi(programs: Callable[[dict[str, str]], None]) -> None:
    programs(
        {
            "nvidia-smi --query-gpu=driver_version --format=csv,noheader": "580.82.07\n580.82.07\n",
            "nvidia-smi -L": "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n",
        }
    )
    assert doctor.driver_version() == "580.82.07"
    assert doctor.count_gpus() == 2


def test_rocm_smi(programs: Callable[[dict[str, str]], None]) -> None:
    programs({"rocm-smi -i": "GPU[0]\t\t: Card Series: MI300X\nGPU[0]\t\t: GUID: 1\n"})
    assert doctor.count_gpus() == 1


def test_programs_that_are_missing_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.count_gpus() == 0
    assert doctor.find_compiler() is None

    def hang(*arguments: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", hang)
    assert doctor.count_gpus() == 0


def test_compiler_is_tritons_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name != "gcc" else None)
    assert doctor.find_compiler() == "/bin/clang"
    monkeypatch.setenv("CC", "tcc")
    assert doctor.find_compiler() == "/bin/tcc"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 * 10**9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    assert doctor.visible_devices() == (Device("NVIDIA H200", "sm_90", (9, 0), 139.7),)


def test_cache(tmp_path: Path) -> None:
    assert doctor.try_cache(tmp_path / "new" / "cache") is None
    file = tmp_path / "file"
    file.touch()
    assert doctor.try_cache(file / "cache") == "Not a directory"


def test_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert doctor.installed("numpy") is None


def test_trial_sees_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def burn(*launch: Any) -> None:
        raise RuntimeError("it burnt")

    monkeypatch.setattr("tritongrad.runtime._run", burn)
    assert re.fullmatch(r"(cpu|cuda:0): RuntimeError: it burnt", str(doctor.try_kernel()))


def test_trial_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runtime._run

    def wrong(kernel: Any, grid: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        run(kernel, grid, args, meta)
        args[0][0].fill_(7.0)

    monkeypatch.setattr("tritongrad.runtime._run", wrong)
    assert "is wrong" in str(doctor.try_kernel())


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("arguments", [["doctor"], ["compare", "doctor"]])
def test_command(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: dataclasses.replace(GPU, compiler=None))
    file = tmp_path / "doctor.json"
    assert main([*arguments, "--json", str(file)]) == 1
    assert "device 0        NVIDIA H200, sm_90, 139.8 GiB" in capsys.readouterr().out
    facts = json.loads(file.read_text())
    assert facts["mode"] == "compiled (torch sees a GPU)"
    assert facts["devices"][0]["capability"] == [9, 0]
    assert len(facts["problems"]) == 1
    monkeypatch.setattr(doctor, "examine", lambda: LAPTOP)
    assert main(arguments) == 0


@pytest.mark.skipif(
    not runtime.INTERPRETED, reason="with a GPU the order of imports does not matter"
)
def test_triton_imported_before_tritongrad() -> None:
    program = """if True:
        import os
        os.environ.pop("TRITON_INTERPRET", None)
        import triton.language
        try:
            import tritongrad
        except ImportError as error:
            print(type(error).__module__, type(error).__name__, error, sep="\\n")
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    module, name, advice = done.stdout.splitlines()
    assert (module, name) == ("tritongrad.runtime", "EnvironmentProblem")
    assert "Import tritongrad first, or set TRITON_INTERPRET=1" in advice
