"""One op at one size in one dtype, timed: what a worker of ``compare bench`` does.

Nothing is timed that is not right. An implementation's results are compared with torch's first, and
ours must have run on Triton.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritongrad import runtime
from tritongrad.op import OPS, Op
from tritongrad.sampling import Sample, tensors

from . import peers, workloads
from .measure import arithmetic_on_torch
from .parity import STAND_INS, in_float64
from .phases import LIMITS, Nothing, Points, check, difference
from .results import Cell, Row
from .terminal import dtype_name
from .timing import Call, Device, Floor, Timing, measure
from .workloads import Size, Unscalable

MOST_SETS = 8  # of inputs that calls use in turns

DTYPES = {dtype_name(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}


class Fatal(Exception):
    """The device is unusable in this process; the cause is what made it so."""


@dataclass(frozen=True)
class Task:
    """What to time.

    Attributes:
        seconds: about how long each phase is timed for.
        skip: phases and implementations that have been timed, or took a process down.
        warm: only call ours once in each phase, so that its kernels are compiled.
    """

    suite: str
    op: str
    case: str
    dtype: str
    phases: tuple[str, ...]
    implementations: tuple[str, ...]
    seconds: float
    skip: tuple[tuple[str, str], ...] = ()
    warm: bool = False

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every phase with every implementation."""
        return list(itertools.product(self.phases, self.implementations))


@dataclass
class Place:
    """Where a task runs, and to whom it reports.

    Attributes:
        emit: called with each row.
        announce: called with phase and implementation before it runs.
    """

    device: Device
    floor: Floor
    emit: Callable[[Row], None]
    announce: Callable[[str, str], None]
    sizes: dict[str, Size]


def remaining(task: Task, done: set[Cell]) -> Task | None:
    """The task without what has been done; None if that is all of it."""
    skip = [
        (phase, name)
        for phase, name in task.pairs
        if Cell(task.op, task.case, task.dtype, phase, name) in done
    ]
    return replace(task, skip=tuple(skip)) if len(skip) < len(task.pairs) else None


def crashed(task: Task, at: tuple[str, str], problem: str) -> Row:
    return Row(
        task.suite, task.op, task.case, "", task.dtype, at[0], at[1], "crashed", problem
    )  # fmt: skip


def run(task: Task, place: Place) -> None:
    """Time what ``task`` says.

    Raises:
        Fatal: an implementation broke the device for this process; its row is written.
    """
    op, dtype = OPS[task.op], DTYPES[task.dtype]
    empty = Row(task.suite, task.op, task.case, "", task.dtype, "forward", peers.OURS, "failed")
    place.announce("forward", peers.OURS)
    try:
        samples = make_samples(op, place.sizes[task.case], dtype, place.device)
    except Exception as problem:
        status = "unsupported" if isinstance(problem, Unscalable) else "failed"
        for phase, name in () if task.warm else task.pairs:
            about = replace(empty, phase=phase, implementation=name, status=status)
            if (phase, name) not in task.skip:
                place.emit(replace(about, note=_in_words(problem)))
        _survive(place.device, problem)
        return
    known: dict[str, Any] = {
        "shape": describe(samples[0]),
        "elements": workloads.largest(tensors(samples[0])),
    }
    for phase in task.phases:
        wanted = [i for i in task.implementations if (phase, i) not in task.skip]
        if wanted:
            about = replace(empty, phase=phase, **known)
            _Phase(op, samples, dtype, about, wanted, task, place).run()


def make_samples(op: Op, size: Size, dtype: torch.dtype, device: Device) -> list[Sample]:
    """As many sets of inputs as are together twice the cache, so that none is still in it when its
    turn comes again."""
    recipe = workloads.recipe(op)
    first = workloads.at(op, recipe, size, dtype, device.torch_device)
    count = min(max(math.ceil(2 * device.cache / max(_bytes(tensors(first)), 1)), 1), MOST_SETS)
    rest = [
        workloads.at(op, recipe, size, dtype, device.torch_device, seed) for seed in range(1, count)
    ]
    return [first, *rest]


def describe(sample: Sample) -> str:
    """The call for a reader: shapes of tensors, values of the rest."""

    def show(value: Any) -> str:
        if isinstance(value, Tensor):
            own = "" if value.is_floating_point() else f"{dtype_name(value.dtype)} "
            return own + "x".join(map(str, value.shape)) if value.dim() else own + "number"
        if type(value) in (list, tuple):
            return f"({', '.join(map(show, value))})"
        return repr(value)

    named = [f"{name}={show(value)}" for name, value in sample.kwargs.items()]
    return ", ".join([*map(show, sample.args), *named])


def _bytes(values: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in values)


def _in_words(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:300]


def _survive(device: Device, problem: Exception) -> None:
    """Raise if the device does not answer any more. What is next gets all of its memory."""
    if isinstance(problem, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    try:
        device.synchronize()
    except Exception as broken:
        raise Fatal(_in_words(broken)) from problem


@dataclass
class _Phase:
    """One phase of a task."""

    op: Op
    samples: list[Sample]
    dtype: torch.dtype
    about: Row
    wanted: list[str]
    task: Task
    place: Place

    def run(self) -> None:
        expected = self._expected()
        if expected is None:
            for name in self.wanted:
                self._report(name, "unsupported", self.why_not)
            return
        calls: dict[str, Call] = {}
        for name in self.wanted:
            self.place.announce(self.about.phase, name)
            try:
                function = peers.resolve(name, self.op)
                with peers.running(name):
                    call, problem = self._prepare(name, function, expected)
            except (peers.Absent, Nothing) as problem:
                self._report(name, "unsupported", str(problem))
            except Exception as problem:
                self._failed(name, problem)
            else:
                if problem is not None:
                    self._report(name, "refused", problem)
                    continue
                calls[name] = call
        del expected
        if self.task.warm or not calls:
            return
        moved, operations = self._work(peers.OURS in calls)
        alone = [name for name in calls if name in peers.ALONE]
        together = {name: call for name, call in calls.items() if name not in alone}
        for group in (together, *({name: calls[name]} for name in alone)):
            for name, answer in self._time(group).items():
                if isinstance(answer, Exception):
                    self._failed(name, answer)
                else:
                    self._measured(name, answer, moved, operations)

    def _time(self, group: dict[str, Call]) -> dict[str, Timing | Exception]:
        if not group:
            return {}
        with peers.running(next(iter(group))):
            return measure(
                group,
                self.place.device,
                self.task.seconds,
                lambda name: self.place.announce(self.about.phase, name),
            )

    @property
    def _native(self) -> Callable[..., Any]:
        function = self.op.replaces[0]
        return STAND_INS.get(function, function)

    def _expected(self) -> list[Tensor] | None:
        try:
            call = Points(self._native, self.samples[:1]).prepare(self.about.phase)
            expected = call(0)
            again = difference(call(0), expected, LIMITS[self.dtype])
            self.random = self.op.random or again is not None
        except (Nothing, NotImplementedError) as problem:
            self.why_not = f"torch has no such derivative: {problem}"
            return None
        except RuntimeError as problem:
            # Some of torch's functions say so thus that they have none; or memory does not do.
            self.why_not = f"torch's own: {_in_words(problem)}"
            _survive(self.place.device, problem)
            return None
        return expected

    def _prepare(
        self, name: str, function: Callable[..., Any], expected: list[Tensor]
    ) -> tuple[Call, str | None]:
        """The calls to time, and in words why they must not be."""
        points = Points(function, self.samples)
        session = runtime.Session()
        with runtime.attribute_to(session):
            call = points.prepare(self.about.phase)
            found = call(0)
        if name == peers.OURS:
            on_torch = arithmetic_on_torch(session)
            if on_torch:
                return call, f"ran on torch: {', '.join(on_torch)}"
            if not session.launches:
                return call, "launches no kernel"
        if self.task.warm or name == peers.EAGER:
            return call, None
        if self.random:
            same = [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
            return call, None if same else "shapes or dtypes other than torch's"
        return call, check(lambda: found, expected, self._exact, LIMITS[self.dtype])

    def _exact(self) -> list[Tensor]:
        points = Points(self._native, [in_float64(self.samples[0])], self.dtype)
        return points.prepare(self.about.phase)(0)

    def _note(self, name: str) -> str:
        notes = [peers.NOTES.get((name, self.op.replaces[0]), "")]
        if name in peers.ALONE:
            notes.append("timed after the others, not in turns with them")
        if self.random and name != peers.EAGER:
            notes.append("random: values are not compared with torch's, shapes are")
        return "; ".join(filter(None, notes))

    def _work(self, ours: bool) -> tuple[int | None, int | None]:
        """The least bytes and operations of this phase; None where nobody has said.

        What must be saved for backward is what the more frugal of torch and ours saves.
        """
        sample, phase = self.samples[0], self.about.phase
        if phase not in ("forward", "backward", "both"):
            return None, None
        points = Points(self._native, [sample])
        outputs = points.forward()(0)
        given = tensors(sample)
        forward, own = _bytes(given) + _bytes(outputs), 0
        if self.op.cost is not None and self.op.bind is not None:
            bound, params = self.op.bind(*sample.args, **sample.kwargs)
            forward, own = self.op.cost(params, *bound)
        products = 0
        if workloads.recipe(self.op).kind in ("matrix", "heads", "own"):
            of_forward = workloads.counted(lambda: points.forward()(0))
            call = points.prepare(phase)
            products = workloads.counted(lambda: call(0))
            if of_forward:
                # The op knows what torch's count does not: what a mask leaves out.
                products = products * (own or of_forward) // of_forward
        saved = _saved(points)
        if ours:
            saved = min(saved, _saved(Points(self.op.entry, [sample])))
        leaves = [t for t in given if t.requires_grad]
        backward = _bytes([t for t in outputs if t.requires_grad]) + saved + _bytes(leaves)
        moved = {"forward": forward, "backward": backward, "both": forward + backward}[phase]
        return moved, products

    def _report(self, name: str, status: str, note: str) -> None:
        if not self.task.warm:
            self.place.emit(replace(self.about, implementation=name, status=status, note=note))

    def _failed(self, name: str, problem: Exception) -> None:
        self._report(name, "failed", _in_words(problem))
        _survive(self.place.device, problem)

    def _measured(
        self, name: str, timing: Timing, moved: int | None, operations: int | None
    ) -> None:
        time = timing.device.median
        floor = None
        if moved is not None:
            floor = self.place.floor.microseconds(moved, operations or 0, self.task.dtype)
        self.place.emit(
            replace(
                self.about,
                implementation=name,
                status="ok",
                note=self._note(name),
                device_us=time,
                device_us_20=timing.device.low,
                device_us_80=timing.device.high,
                host_us=timing.host.median,
                host_us_20=timing.host.low,
                host_us_80=timing.host.high,
                repeats=timing.repeats,
                bytes=moved,
                operations=operations,
                floor_us=floor,
                gb_s=None if moved is None else moved / (1e3 * time),
                tflop_s=operations / (1e6 * time) if operations else None,
                fraction=None if floor is None else floor / time,
                peak_bytes=timing.peak_bytes,
            )
        )


def _saved(points: Points) -> int:
    """Bytes of the tensors that a forward pass keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = _bytes([tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        points.forward()(0)
    return sum(kept.values())


def first_call(task: Task, place: Place) -> None:
    """Tell how long the first call of a task's one implementation takes, in its one phase."""
    (phase,), (name,) = task.phases, task.implementations
    row = Row(task.suite, task.op, task.case, "", task.dtype, phase, name, "failed")
    place.announce(phase, name)
    device, op = place.device, OPS[task.op]
    try:
        sample = workloads.at(
            op,
            workloads.recipe(op),
            place.sizes[task.case],
            DTYPES[task.dtype],
            device.torch_device,
        )
        row = replace(row, shape=describe(sample))
        function = peers.resolve(name, op)
        device.synchronize()
        start = device.clock()
        Points(function, [sample]).prepare(phase)(0)
        device.synchronize()
    except (Nothing, Unscalable, peers.Absent) as problem:
        place.emit(replace(row, status="unsupported", note=str(problem)))
    except Exception as problem:
        place.emit(replace(row, note=_in_words(problem)))
    else:
        place.emit(replace(row, status="ok", cold_s=device.clock() - start))
