"""Compile one kernel specialisation for a GPU that is not here, and read the machine code.

Run as a script, this file is the worker of ``compare.static``: one JSON job per line on stdin, one
JSON answer per line on stdout. The worker is a process of its own because under Triton's
interpreter, which tritongrad turns on where there is no GPU, a kernel is a Python object that
cannot be compiled. So nothing here imports tritongrad, and triton is imported only inside
functions: ``compare.static`` imports this file too, before tritongrad has had its say.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Json = Any

COMPILE_SECONDS = 300  # far beyond any kernel of ours: past it the compiler hangs


@dataclass(frozen=True)
class Target:
    """An architecture to compile for."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes one program may use; beyond it the launch fails with OutOfResources


TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Code:
    """What the machine code of one compiled kernel says about its speed."""

    registers: int  # per thread; on AMD vector registers, accumulation registers included
    stack_bytes: int  # per thread, spills and local arrays (sin and cos need one) together
    spill_bytes: int  # per thread, registers that did not fit and go through memory
    shared_bytes: int  # per program
    # Of the instructions, for which a listing is read; without one, None and nothing:
    wide_loads: int | None  # those that load at least 16 bytes per thread from global memory
    wide_stores: int | None
    tensor_core: dict[str, int] = field(default_factory=dict)  # instruction -> count
    serialised: bool = False  # ptxas put waits between wgmma instructions that should overlap


def count_sass(sass: str) -> tuple[int, int, dict[str, int]]:
    """Wide global loads, wide global stores and tensor-core instructions in a SASS listing."""
    loads = stores = 0
    tensor_core: dict[str, int] = {}
    # An instruction: its address in a comment, perhaps a predicate, the opcode with its modifiers.
    for instruction in re.finditer(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE
    ):
        name, *modifiers = instruction[1].split(".")
        wide = "128" in modifiers or "256" in modifiers  # sm_100 has 32-byte accesses
        # LDGSTS is cp.async, UTMALDG and UTMASTG are the bulk copy engine, which moves whole tiles.
        loads += (name in ("LDG", "LDGSTS") and wide) or name == "UTMALDG"
        stores += (name == "STG" and wide) or name == "UTMASTG"
        if re.fullmatch(r"[A-Z]?MMA|[A-Z]GMMA|UTC\w*MMA", name):
            tensor_core[name] = tensor_core.get(name, 0) + 1
    return loads, stores, tensor_core


def parse_usage(listing: str) -> tuple[int, int]:
    """Registers and stack bytes per thread, from ``cuobjdump -res-usage``."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise ValueError("cuobjdump printed no resource usage")
    return int(found[1]), int(found[2])


def parse_ptxas(log: str) -> tuple[int, bool]:
    """Bytes of spill stores and loads, and whether wgmma was serialised, from ``ptxas -v``."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return sum(map(int, spills)), "wgmma.mma_async instructions are serialized" in log


def parse_amdgcn(assembly: str, shared_bytes: int) -> Code:
    """The facts of an AMD kernel: the assembly text carries its own resource usage.

    All but shared memory, which is allocated at launch and so is zero there.
    """

    def metadata(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"no .{name} in the assembly")
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s*{pattern}\b", assembly, re.MULTILINE))

    tensor_core: dict[str, int] = {}
    for name in re.findall(r"^\s*(v_s?mfmac?)_", assembly, re.MULTILINE):
        tensor_core[name[2:]] = tensor_core.get(name[2:], 0) + 1
    stack = metadata("private_segment_fixed_size")
    # Scalar registers that do not fit are kept in lanes of vector registers: without a stack,
    # nothing went through memory.
    spilled = metadata("vgpr_spill_count") + metadata("sgpr_spill_count")
    return Code(
        registers=metadata("vgpr_count"),
        stack_bytes=stack,
        spill_bytes=4 * spilled if stack else 0,
        shared_bytes=shared_bytes,
        wide_loads=count(r"(?:global|buffer|flat)_load_dwordx4"),
        wide_stores=count(r"(?:global|buffer|flat)_store_dwordx4"),
        tensor_core=tensor_core,
    )


def inspect(compiled: Any, listing: bool) -> Code:
    """The facts of a kernel that ``triton.compile`` returned, kept in Triton's cache beside it."""
    from triton.runtime.cache import get_cache_manager

    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    cache = get_cache_manager(compiled.hash)
    name = f"disassembly-{reader}-{listing:d}.json"
    kept = cache.get_file(name)
    if kept is not None:
        return Code(**json.loads(Path(kept).read_text()))
    code = _inspect_cuda(compiled, listing) if "cubin" in compiled.asm else _inspect_hip(compiled)
    cache.put(json.dumps(asdict(code)), name, binary=False)
    return code


def _inspect_hip(compiled: Any) -> Code:
    return parse_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _inspect_cuda(compiled: Any, listing: bool) -> Code:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        # Listing the instructions takes as long as compiling them.
        asked_for = ["-res-usage", "-sass"] if listing else ["-res-usage"]
        text = _output([knobs.nvidia.cuobjdump.path, *asked_for, str(cubin)])
    registers, stack = parse_usage(text)
    loads, stores, tensor_core = count_sass(text) if listing else (None, None, {})
    # Without a stack there are no spills: only a stack, or wgmma, is worth a second run of ptxas.
    asked = stack > 0 or "HGMMA" in tensor_core
    spills, serialised = parse_ptxas(_ptxas_log(compiled)) if asked else (0, False)
    return Code(
        registers, stack, spills, compiled.metadata.shared, loads, stores, tensor_core, serialised
    )


def _ptxas_log(compiled: Any) -> str:
    """What ``ptxas -v`` says of this kernel, run with the options Triton ran it with."""
    from triton import knobs

    ptx = compiled.asm["ptx"]
    major = compiled.metadata.target.arch // 10
    ptxas = knobs.nvidia.ptxas_blackwell if major >= 10 else knobs.nvidia.ptxas
    arch = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert arch is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas.path, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={arch[1]}"]
        if not compiled.metadata.enable_fp_fusion:
            command.append("--fmad=false")
        return _output([*command, str(source), "-o", os.devnull])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


class Pointer:
    """Stands in for a tensor argument: all that Triton's specialisation looks at, and no memory."""

    def __init__(self, dtype: str, aligned: bool, within_2gb: bool) -> None:
        self.dtype = dtype
        self._address = 0 if aligned else 1
        self._range = 0 if within_2gb else 2**31

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        """The extent AMD's backend asks for: below 2 GiB it addresses with 32-bit offsets."""
        return self._range


def stub_packages(packages: dict[str, list[str]]) -> None:
    """Make the kernel files importable under their real names, without the packages above them.

    ``tritongrad/__init__.py`` would turn the interpreter on, so every package named here becomes an
    empty module that knows only its search path. The name ``""`` stands for ``sys.path``.
    """
    for name, paths in packages.items():
        if not name:
            sys.path.extend(path for path in paths if path not in sys.path)
        elif name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = paths


def find(module: str, qualname: str) -> Any:
    """The object of that name, as the kernel file defines it."""
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def decode(value: Json) -> Any:
    """The inverse of ``compare.static.encode``."""
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "pointer":
        return Pointer(*content)
    if kind == "jit":
        return find(*content)
    if kind == "dtype":
        import triton.language as tl

        return tl.dtype(content)
    raise ValueError(f"unknown kind of argument: {kind}")


def compile_job(job: Json) -> Json:
    """Compile what ``compare.static.describe`` described, for ``job["target"]``.

    Returns ``{"error": text}``, or the fields of ``Code`` with ``signature``, ``num_warps`` and
    ``num_stages``; nothing where only the front end was asked.
    """
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = TARGETS[job["target"]]
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    try:
        stub_packages(job["packages"])
        kernel = find(*job["kernel"])
        args = [decode(value) for value in job["args"]]
        meta = {name: decode(value) for name, value in job["meta"].items()}
        # The steps of JITFunction.run, so that the result is what a GPU would run: bind and
        # specialise the arguments, sort them into signature, constants and attributes, compile.
        backend = make_backend(gpu)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialisation, options = bind(*args, **meta)
        options, signature, constants, attributes = kernel._pack_args(
            backend, meta, bound, specialisation, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        if job["listing"] is None:
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            lowering = backend.get_codegen_implementation(options), backend.get_module_map()
            source.make_ir(gpu, options, *lowering, context)
            return {}
        compiled = triton.compile(source, target=gpu, options=vars(options))
        code = inspect(compiled, job["listing"])
    except Exception as error:
        return {"error": explain(error)}
    return asdict(code) | {
        "signature": render_signature(kernel, signature, constants, attributes),
        "num_warps": compiled.metadata.num_warps,
        "num_stages": compiled.metadata.num_stages,
    }


def explain(error: BaseException) -> str:
    """The innermost place in device code that ``error`` comes from, and what went wrong there.

    Triton wraps an error once for each device function it passes on the way out.
    """
    from triton.compiler import CompilationError

    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    root = chain[-1]
    places = [str(wrapper) for wrapper in chain if isinstance(wrapper, CompilationError)]
    if places and str(root) in places[-1]:
        return places[-1]
    return "\n".join([*places[-1:], f"{type(root).__name__}: {root}"])


def render_signature(kernel: Any, signature: Json, constants: Json, attributes: Json) -> str:
    """Run-time arguments in the notation of Triton's ahead-of-time compiler: ``*fp32:16, i32, 1``.

    ``:16`` marks a pointer or integer known to be divisible by 16; a bare number or None is an
    argument that Triton folded into the code. Constexpr parameters are not run-time arguments.
    """

    def render(kind: Any, path: tuple[int, ...]) -> str:
        if isinstance(kind, tuple):
            return "(" + ", ".join(render(item, (*path, i)) for i, item in enumerate(kind)) + ")"
        if kind == "constexpr":
            return str(constants[path])
        return kind + (":16" if ["tt.divisibility", 16] in attributes.get(path, []) else "")

    return ", ".join(
        render(signature[parameter.name], (parameter.num,))
        for parameter in kernel.params
        if not parameter.is_constexpr
    )


class Worker:
    """A process that compiles, started again where the compiler took it down."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)

    def _start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, job: Json) -> Json:
        """Compile one job. A compiler that crashes or hangs is an error of that job only."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        clock = threading.Timer(COMPILE_SECONDS, process.kill)
        clock.start()
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            clock.cancel()
        if answer:
            return json.loads(answer)
        self._stop()
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:]
        return {"error": " ".join([f"the compiler ended with status {process.returncode}", *last])}

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """End the process."""
        self._stop()
        self._log.close()


def compile_all(jobs: Sequence[Json], workers: int = 2) -> Iterator[tuple[int, Json]]:
    """Compile jobs in parallel, yielding (index, answer) as they finish."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def run(job: Json) -> Json:
        worker = idle.get()
        try:
            return worker.ask(job)
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(contextlib.closing(Worker())))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        futures = {pool.submit(run, job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def main() -> None:
    """Answer jobs until stdin closes."""
    here = str(Path(__file__).parent)
    if here in sys.path:  # where a script looks first, but its names are not for triton to find
        sys.path.remove(here)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Triton prints on stdout when ptxas fails; the answers must stay alone there
    for line in sys.stdin:
        print(json.dumps(compile_job(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
