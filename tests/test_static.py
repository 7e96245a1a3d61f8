"""``compare static``: compiling for absent GPUs, reading the machine code, judging it."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import DEVICE, representatives

from tritongrad import runtime
from tritongrad.compare import disassembly, specialisations, static
from tritongrad.compare.disassembly import Code
from tritongrad.compare.specialisations import Specialisation, describe, encode, make_job
from tritongrad.compare.terminal import make_console
from tritongrad.op import OPS

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def twice(x):
    return x + x

@triton.jit
def copy(dst_ptr, src_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst_ptr + i, tl.load(src_ptr + i, mask=i < n), mask=i < n)

@triton.jit
def nested(outs, ins, numbers, F: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(ins[0][0] + i * numbers[0]).to(DTYPE)
    if ins[1] is not None:
        x += tl.load(ins[1] + i)
    tl.store(outs[0] + i, F(x) * numbers[1])

@triton.jit
def too_big(dst_ptr, src_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(src_ptr + i)
    tl.store(dst_ptr + i, x * tl.sum(x, 0))

@triton.jit
def sine(dst_ptr, src_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(dst_ptr + i, tl.sin(tl.load(src_ptr + i)))

@triton.jit
def matmul(c_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    ij = i[:, None] * BLOCK + i[None, :]
    tl.store(c_ptr + ij, tl.dot(tl.load(a_ptr + ij), tl.load(b_ptr + ij)))

@triton.jit
def misspelt(x):
    return no_such_name

@triton.jit
def wrong(dst_ptr, BLOCK: tl.constexpr):
    tl.store(dst_ptr + tl.arange(0, BLOCK), misspelt(1.0))

@triton.jit
def shadowed(dst_ptr, params, BLOCK: tl.constexpr):
    tl.store(dst_ptr + tl.arange(0, BLOCK), params[0])
"""

Answer = Callable[[str, str], Any]


def load(path: Path) -> ModuleType:
    """Import a file under its own name, as the kernel files are: here, interpreted."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("kernels") / "planted_kernels.py"
    path.write_text(KERNELS)
    yield load(path)
    del sys.modules[path.stem]


@pytest.fixture(scope="module")
def launches(planted: Any) -> dict[str, Specialisation]:
    """Launches of the planted kernels, as a collection would have recorded them."""
    x, half = torch.empty(4096), torch.empty(4096, dtype=torch.float16)
    block = {"BLOCK": 1024}
    mixed = {"F": planted.twice, "DTYPE": import_triton().float32, "BLOCK": 512, "num_warps": 2}
    recorded = {
        "copy": (planted.copy, (x, x, 4096), block),
        "copy from odd address": (planted.copy, (x, x[1:], 4096), block),
        "copy of odd length": (planted.copy, (x, x, 4095), block),
        "nested": (planted.nested, ((x,), ((half,), None), (1, 0.5)), mixed),
        "too big": (planted.too_big, (x, x), {"BLOCK": 32768, "num_warps": 1}),
        "sine": (planted.sine, (x, x), block),
        "matmul": (planted.matmul, (x, half, half), {"BLOCK": 64}),
        "wrong": (planted.wrong, (x,), block),
        "shadowed": (planted.shadowed, (x, (2.0,)), block),
    }
    return {name: Specialisation(describe(*launch)) for name, launch in recorded.items()}


def import_triton() -> Any:
    """triton.language, which must not be imported before tritongrad has chosen the interpreter."""
    import triton.language as tl

    return tl


@pytest.fixture(scope="module")
def answer(launches: dict[str, Specialisation]) -> Answer:
    """What the compiler answers about a launch for a target."""
    pairs = [(name, target) for name in launches for target in ("sm_90", "gfx942")]
    pairs += [("matmul", "sm_80"), ("matmul", "sm_100"), ("copy", "sm_100")]
    jobs = [make_job(launches[name].description, target) for name, target in pairs]
    answers = dict(disassembly.compile_all(jobs))
    found = {pair: answers[index] for index, pair in enumerate(pairs)}
    return lambda name, target: found[name, target]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_vector_accesses_are_counted(answer: Answer, target: str) -> None:
    aligned = answer("copy", target)
    assert aligned["wide_loads"] > 0
    assert aligned["wide_stores"] > 0
    shifted = answer("copy from odd address", target)
    assert shifted["wide_loads"] == 0
    assert shifted["wide_stores"] > 0
    odd = answer("copy of odd length", target)
    assert (odd["wide_loads"], odd["wide_stores"]) == (0, 0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spill_is_seen_and_is_a_fault(
    answer: Answer, launches: dict[str, Specialisation], target: str
) -> None:
    row = static.judge(0, launches["too big"], target, answer("too big", target))
    assert row.code is not None
    assert row.code.spill_bytes > 0
    assert any(fault.startswith("spills") for fault in row.faults)


def test_local_array_is_no_spill(answer: Answer) -> None:
    # sin reduces its argument in an array on the stack, whatever the register pressure.
    found = answer("sine", "sm_90")
    assert found["stack_bytes"] > 0
    assert found["spill_bytes"] == 0


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "mfma")],
)
def test_tensor_core_instructions(answer: Answer, target: str, instruction: str) -> None:
    found = answer("matmul", target)
    assert list(found["tensor_core"]) == [instruction]
    assert found["shared_bytes"] > 0


def test_arguments_are_specialised_as_at_a_launch(answer: Answer) -> None:
    found = answer("nested", "sm_90")
    assert found["signature"] == "(*fp32:16), ((*fp16:16), None), (1, fp32)"
    assert found["num_warps"] == 2
    assert answer("copy from odd address", "sm_90")["signature"] == "*fp32:16, *fp32, i32:16"


def test_compile_error_names_the_innermost_line(
    answer: Answer, launches: dict[str, Specialisation]
) -> None:
    row = static.judge(0, launches["wrong"], "sm_90", answer("wrong", "sm_90"))
    assert row.code is None
    (fault,) = row.faults
    assert "def misspelt(x)" in fault
    assert "no_such_name is not defined" in fault


def test_argument_name_that_breaks_tritons_launcher(answer: Answer) -> None:
    # JITFunction's generated binder has a local variable of this name.
    assert "failed to specialize" in answer("shadowed", "sm_90")["error"]


def test_lost_vectors_are_a_fault(
    answer: Answer, launches: dict[str, Specialisation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(static.VECTORISED, "copy", static.Vector("planted"))
    odd = Specialisation(launches["copy of odd length"].description, vectorisable=True)
    row = static.judge(0, odd, "sm_90", answer("copy of odd length", "sm_90"))
    assert row.faults == ("no 16-byte load (planted)", "no 16-byte store (planted)")
    odd.vectorisable = False
    assert not static.judge(0, odd, "sm_90", answer("copy of odd length", "sm_90")).faults


def test_vectors_are_for_some_layouts_alone(
    answer: Answer, launches: dict[str, Specialisation], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Specialisation(launches["copy of odd length"].description, vectorisable=True)
    for block, count in (("1024", 2), ("512", 0)):
        planted = static.Vector("planted", where={"BLOCK": block})
        monkeypatch.setitem(static.VECTORISED, "copy", planted)
        row = static.judge(0, odd, "sm_90", answer("copy of odd length", "sm_90"))
        assert len(row.faults) == count


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "fills"),
    [("float32", 8, 256, True), ("bfloat16", 128, 8, True), ("bfloat16", 128, 4, False),
     ("float32", 1024, 2, False)],
)  # fmt: skip
def test_tiles_that_are_too_small_for_vectors(
    planted: Any, dtype: str, rows: int, columns: int, fills: bool
) -> None:
    x = torch.empty(4096, dtype=getattr(torch, dtype))
    tile = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
    small = Specialisation(describe(planted.copy, (x, torch.empty(4096), 4096), tile))
    assert static._fills_threads(small) == fills


def test_too_much_shared_memory_is_a_fault(launches: dict[str, Specialisation]) -> None:
    code = Code(32, 0, 0, 228 * 1024, 1, 1)
    answer = vars(code) | {"signature": "", "num_warps": 4, "num_stages": 3}
    (fault,) = static.judge(0, launches["copy"], "sm_90", answer).faults
    assert fault == "needs 233472 bytes of shared memory of 232448"


def test_compiler_crash_is_an_error_of_that_job_alone(
    tmp_path: Path, launches: dict[str, Specialisation]
) -> None:
    (tmp_path / "crashing.py").write_text("import os\nos._exit(7)\n")
    job = make_job(launches["copy"].description, "sm_90")
    crash = job | {"kernel": ["crashing", "copy"], "packages": {"": [str(tmp_path)]}}
    answers = dict(disassembly.compile_all([crash, job], workers=1))
    assert "status 7" in answers[0]["error"]
    assert answers[1]["wide_loads"] > 0


SASS = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.LTC128B R4, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0050*/              @UP0 UTMALDG.2D [UR8], [UR6] ;
        /*0060*/                   STG.E.ENL2.256 desc[UR4][R2.64], R4, R8 ;
        /*0070*/                   LDS.128 R4, [R0] ;
        /*0080*/              @!PT HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
       /*10090*/                   IMAD.WIDE.U32 R2, R6, 0x400, RZ ;
"""


def test_sass_is_read_by_opcode() -> None:
    assert disassembly.count_sass(SASS) == (3, 1, {"HGMMA": 1})


def test_ptxas_log() -> None:
    log = "    48 bytes stack frame, 44 bytes spill stores, 36 bytes spill loads"
    assert disassembly.parse_ptxas(log) == (80, False)
    log = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to..."
    assert disassembly.parse_ptxas(log) == (0, True)


def test_unreadable_listing_raises() -> None:
    with pytest.raises(ValueError, match="resource usage"):
        disassembly.parse_usage("cuobjdump info: nothing here")
    with pytest.raises(ValueError, match="private_segment_fixed_size"):
        disassembly.parse_amdgcn("s_endpgm", 0)


INTEGERS = [
    *(0, 1, 2, 15, 16, 17, 48, -1, -16, -17),
    *(2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, -(2**31) - 16),
    *(2**62, 2**63 - 1, 2**63, 2**63 + 1, True),
]


def test_integers_are_told_apart_exactly_where_triton_does() -> None:
    import_triton()
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    for a in INTEGERS:
        for b in INTEGERS:
            ours = json.dumps(encode(a)) == json.dumps(encode(b))
            specialised = [
                native_specialize_impl(BaseBackend, v, False, True, True) for v in (a, b)
            ]
            same_constant = a == b or specialised[0][0] != "constexpr"
            if {type(a), type(b)} == {bool}:
                continue  # Triton compiles one kernel for both; telling them apart is harmless
            assert ours == (specialised[0] == specialised[1] and same_constant), (a, b)


def test_equal_launches_have_equal_descriptions(planted: Any) -> None:
    def described(offset: int, n: int, number: float) -> str:
        x = torch.empty(64)[offset:]
        return json.dumps(describe(planted.copy, (x, x, (n, number)), {"BLOCK": 16}))

    assert described(0, 32, 0.25) == described(4, 4096, 3.0)
    assert described(0, 32, 0.25) != described(1, 32, 0.25)
    assert described(0, 32, 0.25) != described(0, 33, 0.25)


def test_unknown_argument_raises() -> None:
    with pytest.raises(TypeError, match="type object"):
        encode(object())


def test_resized_samples() -> None:
    plain, *_, odd, shifted = specialisations.sizes(torch.float16)
    assert plain(3, 1, 5).shape == (3, 1, 5)
    assert plain().shape == ()
    assert odd(3, 1, 5).shape == (3, 1, 385)
    assert odd(2, 5, low=0, dtype=torch.int64).unique().tolist() == [0]
    assert shifted(5).shape == (384,)
    assert shifted(5).requires_grad
    assert shifted(5).data_ptr() % 16 == 2
    x = torch.empty(32, 128)
    assert specialisations.welcomes_vectors(((x,), (x, None), 7))
    for other in (x[:, 1:], x.flatten()[1:], x[:4], x.t(), x.view(128, 32)):
        assert not specialisations.welcomes_vectors((other,))
    assert not specialisations.welcomes_vectors((x, x[:, ::2]))


def test_collecting_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritongrad.runtime._run", lambda *_: pytest.fail("a kernel ran"))
    collection = specialisations.Collection()
    collection.add(OPS["mul"], [torch.float32])
    assert not collection.problems
    found = collection.specialisations
    functions = {s.constexprs["F"] for s in found if s.kernel == "pointwise_dense"}
    assert {"mul", "mul_bwd"} <= functions
    assert any(s.vectorisable for s in found)
    covered = list(specialisations.cover(found))
    assert len(covered) < len(found)
    kernels = list(specialisations.cover(found, tiles=False, functions=False))
    assert {s.kernel for s in kernels} == {s.kernel for s in found}
    assert len(kernels) < len(covered)
    # The gradient of a broadcast operand is summed by another kernel, which has no F.
    assert {(s.kernel, s.constexprs.get("F")) for s in covered} == {
        (s.kernel, s.constexprs.get("F")) for s in found
    }


def test_sample_that_fails_is_a_problem() -> None:
    from dataclasses import replace

    from tritongrad.sampling import Sample

    broken = replace(OPS["mul"], samples=lambda make: [Sample((make(3), make(4)), {}, "bad")])
    silent = replace(OPS["mul"], name="silent", samples=None)
    collection = specialisations.Collection()
    collection.add(broken, [torch.float32])
    collection.add(silent, [torch.float32])
    first, second = collection.problems
    assert first.startswith("mul, sample 'bad', torch.float32: RuntimeError")
    assert second == "silent: its samples launch no kernel"


class Planted:
    """A collection that holds what it is given."""

    def __init__(self, *found: Specialisation, problems: tuple[str, ...] = ()) -> None:
        self.specialisations = list(found)
        self.problems = list(problems)

    def add(self, op: Any, dtypes: Any, factories: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("names", "status"), [(["copy"], 0), (["copy", "wrong"], 1), (["too big"], 1)]
)
def test_exit_status_and_json(
    launches: dict[str, Specialisation],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    names: list[str],
    status: int,
) -> None:
    planted = Planted(*(launches[name] for name in names))
    monkeypatch.setattr(static, "Collection", lambda: planted)
    file = tmp_path / "static.json"
    assert static.main(["--target", "sm_90", "--json", str(file)]) == status
    rows = json.loads(file.read_text())
    assert [row["kernel"] for row in rows] == [launches[n].kernel for n in names]
    assert rows[0]["code"]["registers"] > 0
    assert rows[0]["target"] == "sm_90"
    assert f"{len(names)} compiled, {status} with faults" in capsys.readouterr().out


def test_problem_while_collecting_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(static, "Collection", lambda: Planted(problems=("mul: broken",)))
    assert static.main([]) == 1
    assert "not collected: mul: broken" in capsys.readouterr().out


def test_multiplication_compiles_and_vectorises(tmp_path: Path) -> None:
    file = tmp_path / "static.json"
    arguments = ["--only", "mul", "--target", "sm_90", "--dtype", "float32", "--json", str(file)]
    status = static.main(arguments)
    assert [row["faults"] for row in json.loads(file.read_text()) if row["faults"]] == []
    assert status == 0


ELSEWHERE = {"scaled_dot_product_attention", "attention"}
"""Ops of kernels that take minutes to compile in all tiles: test_attention_code.py has some."""


def collect(every_op: bool) -> list[Specialisation]:
    """What ops launch, one of those that share kernels or all, in both kinds of dtypes."""
    ops = {op.kernels: op for op in reversed(OPS.values())}.values()
    dtypes = [torch.float32] if every_op else [torch.float32, torch.bfloat16]
    collection = specialisations.Collection()
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is computed, so no memory need be filled.
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        for op in OPS.values() if every_op else ops:
            if op.name not in ELSEWHERE:
                # As they are, and in two sizes that a GPU sees.
                collection.add(op, dtypes, lambda dtype: list(specialisations.sizes(dtype))[:3])
    assert collection.problems == []
    return collection.specialisations


@pytest.fixture(scope="module")
def launched(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> list[Specialisation]:
    """Collected by the first worker of a run, which takes a minute, and read by the others."""
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent
    kept = run / "specialisations.pickle"
    with (run / "specialisations.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_bytes(pickle.dumps(collect(pytestconfig.getoption("every_op"))))
    found: list[Specialisation] = pickle.loads(kept.read_bytes())
    return found


@pytest.fixture(scope="module")
def collected(pytestconfig: pytest.Config, launched: list[Specialisation]) -> list[Specialisation]:
    """Each kernel with each of its flags; or also with each of the functions of every op. All tiles
    are for `make static`."""
    every_op = pytestconfig.getoption("every_op")
    return list(specialisations.cover(launched, tiles=False, functions=every_op))


def test_constants_of_kernels_equal_themselves() -> None:
    """At each launch Triton compares them with what it compiled, and raises where they differ: so
    NaN is written out where it is used."""
    modules = [m for name, m in sys.modules.items() if name.startswith("tritongrad.kernels.")]
    constants = {
        f"{module.__name__}.{name}": value.value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, import_triton().constexpr)
    }
    assert len(constants) > 5
    assert [name for name, value in constants.items() if value != value] == []


def test_every_kernel_is_collected(collected: list[Specialisation]) -> None:
    named = {k for op in OPS.values() if op.name not in ELSEWHERE for k in op.kernels}
    assert {s.kernel for s in collected} >= named


def test_front_end_takes_every_kernel(launched: list[Specialisation]) -> None:
    """With each operand absent that may be, of every dtype, and each number that may be 1: the
    interpreter lets a variable have one type here and another there."""
    collection = specialisations.Collection()
    for name in ELSEWHERE:
        collection.add(OPS[name], [torch.float32], specialisations.own_sizes)
    wanted = [*specialisations.differing(launched), *collection.specialisations]
    wanted = list(specialisations.differing(wanted))
    assert len(wanted) > 400
    assert static.refused(wanted, "sm_90", 1, make_console()) == []


def test_what_the_front_end_refuses(launches: dict[str, Specialisation]) -> None:
    wanted = [launches[name] for name in ("copy", "wrong", "nested")]
    (problem,) = static.refused(wanted, "sm_90", 1, make_console())
    assert problem.startswith("wrong ():")
    assert "no_such_name is not defined" in problem


def test_products_of_float64_beside_a_bool_mask() -> None:
    """Past the front end, where Triton lays products out: the mask's bytes must be out of sight."""
    q, k, v = torch.zeros(3, 2, 40, 32, dtype=torch.float64, device=DEVICE).requires_grad_()
    mask = torch.ones(40, 40, dtype=torch.bool, device=DEVICE)
    collection, op = specialisations.Collection(), OPS["scaled_dot_product_attention"]
    with runtime.stub(), collection.recording(op):
        op(q, k, v, mask).backward(torch.zeros_like(v))
    kernels = list({s.kernel: s for s in collection.specialisations}.values())
    assert {"attention_fwd", "attention_bwd_q", "attention_bwd_kv"} <= {s.kernel for s in kernels}
    rows = static.compile_for(kernels, ["sm_90"], 1, make_console(), False)
    assert [row.faults for row in rows if row.code is None] == []


PARTS = 4  # so that no worker is left with minutes of compiling when the others have finished


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", disassembly.TARGETS)
def test_every_kernel_compiles_without_spills(
    collected: list[Specialisation], target: str, part: int
) -> None:
    """Of one target of each maker the instructions are looked at: that takes as long again."""
    wanted = collected[part::PARTS]
    listing = target in ("sm_90", "gfx942")
    if not listing:
        chosen = representatives()
        wanted = [s for s in wanted if chosen & s.ops and "bfloat16" not in s.dtypes]
    rows = static.compile_for(wanted, [target], 1, make_console(), listing)
    assert {
        (row.kernel, row.ops, str(row.constexprs)): row.faults for row in rows if row.faults
    } == {}
