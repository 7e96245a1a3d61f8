"""``compare``: it runs the document as printed, sees what is wrong, and says what is promised."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEVICE

import tritongrad
from tritongrad.__main__ import main as tritongrad_main
from tritongrad.compare import correctness, document, measure, parity, terminal
from tritongrad.compare.__main__ import COMMANDS, main
from tritongrad.compare.measure import Errors
from tritongrad.compare.plant import plant
from tritongrad.op import OPS, Op
from tritongrad.sampling import Random, Sample

ROOT = Path(__file__).parents[1]
SEED = ROOT.parent / "shared" / "seed" / "automatic-differentiation.md"


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


# ------------------------------------------------------------------------------------ the document


def test_the_document_is_unchanged() -> None:
    if not SEED.exists():
        pytest.skip("the original document is not beside this checkout")
    assert document.DOCUMENT.read_bytes() == SEED.read_bytes()


def test_the_examples_are_all_of_the_document() -> None:
    found = document.blocks(document.DOCUMENT.read_text())
    assert {example.block for example in document.EXAMPLES.values()} == set(range(len(found)))
    assert "y = 2 * torch.dot(x, x)" in document.EXAMPLES["dot"].code()


def test_the_variant_in_the_comment_is_run_instead() -> None:
    code = document.EXAMPLES["non-scalar-ones"].code()
    assert "\ny.backward(torch.ones(len(x)))\n" in code
    assert "y.sum()" not in code


def test_a_variant_the_document_does_not_have() -> None:
    example = dataclasses.replace(document.EXAMPLES["dot"], edit=("not there", ""))
    with pytest.raises(ValueError, match="'dot': the document has no line 'not there'"):
        example.code()


@pytest.mark.parametrize("name", document.EXAMPLES)
def test_example(name: str) -> None:
    errors = document.check(document.EXAMPLES[name])
    assert errors.passed, (errors.problems, errors.fell_back)
    assert errors.forward_kernels > 0
    assert errors.backward_kernels > 0
    assert errors.second is not None
    assert errors.jvp is not None


def test_torch_refuses_the_documents_assertion_as_printed() -> None:
    """The reason for evaluating assertions elementwise, which the footnote states."""
    with pytest.raises(RuntimeError, match="ambiguous"):
        exec("x = torch.arange(4.0)\n" + document.EXAMPLES["dot"].code(), {"torch": torch})
    assert "every element" in document.FOOTNOTE


def test_an_assertion_holds_where_all_elements_do() -> None:
    notebook = document.Notebook()
    notebook.run("assert x == torch.arange(4.0)\nassert len(x) == 4")
    with pytest.raises(AssertionError):
        notebook.run("assert x == torch.tensor([0.0, 1.0, 2.0, 4.0])")


def test_what_an_assertion_computes_is_not_counted() -> None:
    notebook = document.Notebook()
    with tritongrad.use():
        notebook.run("assert 2 * x == x + x")
        assert (notebook.forward, notebook.backward) == (0, 0)
        notebook.run("y = 2 * x.requires_grad_()\ny.backward(torch.ones(4))")
    assert (notebook.forward, notebook.backward) == (1, 1)


def test_f_takes_both_branches() -> None:
    positive, negative = (document.f(torch.tensor(a, device=DEVICE)) for a in (3.0, -3.0))
    assert positive == 3 * 2**9
    assert negative == -3 * 2**9 * 100


def test_seeds_that_take_one_branch_only_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "SEEDS", 1)
    errors = document.check(document.EXAMPLES["function"])
    assert errors.problems == ["all of 1 seeds took the same branch of f"]


def test_an_example_that_runs_on_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = functools.partial(tritongrad.use, exclude="mul")
    monkeypatch.setattr(document, "use", left_out)
    errors = document.check(document.EXAMPLES["non-scalar-ones"])
    assert errors.fell_back == {"torch.Tensor.mul: left out by use()": 1}
    assert "forward launches no Triton kernel" in errors.problems
    assert not errors.passed


def test_an_example_whose_kernels_are_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tritongrad.runtime._run

    def noise(kernel: Any, grid: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        run(kernel, grid, args, meta)
        backward = torch._C._current_graph_task_id() != -1
        for out in args[0] if backward and isinstance(args[0], tuple) else ():
            if out is not None:
                out.uniform_()

    monkeypatch.setattr("tritongrad.runtime._run", noise)
    errors = document.check(document.EXAMPLES["detach"])
    assert errors.problems[0] == "AssertionError"
    assert errors.gradient is not None
    assert errors.gradient > 1


def test_what_the_document_says_is_verified() -> None:
    (claim,) = document.EXAMPLES["non-scalar"].verify({"x": leaf_with_gradient(3.0)})
    assert claim.startswith("x.grad is not 2 x: ")
    claims = document.EXAMPLES["detach"].verify({"x": leaf_with_gradient(3.0), "u": torch.ones(2)})
    assert [claim.partition(":")[0] for claim in claims] == ["x.grad is not u", "x.grad is 3 x^2"]


def leaf_with_gradient(gradient: float) -> torch.Tensor:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.full((2,), gradient)
    return x


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [
        ([1.0, math.nan, math.inf, -math.inf], [1.0, math.nan, math.inf, -math.inf], 0.0),
        ([math.nan], [1.0], math.inf),
        ([1.0], [math.nan], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([1e30], [math.inf], math.inf),
        ([2.0], [[2.0]], math.inf),
        ([], [], 0.0),
        ([1 + 2.1e-12, 1.0], [1.0, 1.0], 1.05),
    ],
)
def test_error(found: list, expected: list, distance: float) -> None:
    tensors = (torch.tensor(value, dtype=torch.float64) for value in (found, expected))
    assert measure.error(*tensors) == pytest.approx(distance, rel=1e-3)


def test_error_of_other_dtypes() -> None:
    ones = torch.ones(2)
    assert measure.error(ones, ones.double()) == math.inf
    assert measure.error(ones > 0, ones > 0) == 0
    assert measure.error(ones > 0, ones > 1) == math.inf
    assert measure.error(ones * (1 + 1e-3), ones) > 100
    assert measure.error((ones * (1 + 1e-3)).bfloat16(), ones.bfloat16()) < 1


def test_cancelling_terms_are_judged_by_the_exact_result() -> None:
    """Where torch is five tolerances from the exact result, ours may be SLACK times as far."""
    exact, torchs = torch.zeros(1, dtype=torch.float64), torch.tensor([5e-6])
    assert measure._relative_to_torch(torch.tensor([-15e-6]), torchs, exact) == pytest.approx(0.75)
    assert measure._relative_to_torch(torch.tensor([-25e-6]), torchs, exact) == pytest.approx(1.25)
    assert measure._relative_to_torch(torch.tensor([3e-6]), exact.float(), exact) > 1


def test_merging_keeps_the_largest() -> None:
    total = Errors(forward=0.5, jvp=None)
    total.merge(Errors(0.25, 0.1, forward_kernels=2, fell_back=Counter(a=1), problems=["p"]), "at")
    assert (total.forward, total.gradient, total.jvp) == (0.5, 0.1, None)
    assert (total.forward_kernels, total.fell_back, total.problems) == (2, {"a": 1}, ["at: p"])


# ------------------------------------------------------------------------------------------ parity


def first_sample(op: Op) -> Sample:
    assert op.samples is not None
    return next(iter(op.samples(Random(torch.float64, DEVICE))))


@pytest.mark.parametrize("name", ["mul", "where", "pow"])
def test_every_quantity_is_compared(name: str) -> None:
    errors = parity.check(OPS[name], first_sample(OPS[name]), torch.float64)
    assert errors.passed, errors.problems
    assert all(getattr(errors, quantity) is not None for quantity in measure.QUANTITIES)
    assert (errors.forward_kernels, errors.backward_kernels) == (1, 1)


def test_a_comparison_has_a_value_only() -> None:
    errors = parity.check(OPS["eq"], first_sample(OPS["eq"]), torch.float64)
    assert (errors.forward, errors.gradient, errors.second, errors.jvp) == (0, None, None, None)
    assert errors.passed


def test_strides_reach_our_kernels() -> None:
    (x,) = measure.leaves(Sample((torch.ones(4, 9).requires_grad_()[:, ::2],)))
    assert x.stride() == (9, 2)
    assert x.is_leaf
    assert x.requires_grad


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"max_order": 1}, None),
        ({}, "second: NotImplementedError: tritongrad: op 'planted' has no derivative"),
    ],
)
def test_an_order_that_is_not_there(change: dict[str, Any], problem: str | None) -> None:
    """Beyond ``max_order`` an op raises; one that promises every order must not."""

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [Once.apply(x) if torch.overrides._len_torch_function_stack() else x * x]

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return Twice.apply(g, *ctx.saved_tensors)

        @staticmethod
        def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
            return 2 * ctx.saved_tensors[0] * tangent

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return 2 * g * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, gg: torch.Tensor) -> Any:
            raise NotImplementedError("tritongrad: op 'planted' has no derivative")

    leaves = [torch.arange(3.0, requires_grad=True) for _ in range(2)]
    errors = measure.compare(function, leaves[:1], leaves[1:], **change)
    assert errors.problems == ([problem] if problem else [])


def test_an_op_without_samples_or_kernels_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = dataclasses.replace(OPS["mul"], samples=None)
    assert parity.check_all(bare).problems == ["no samples"]
    monkeypatch.setattr(measure, "use", functools.partial(tritongrad.use, exclude="neg"))
    errors = parity.check_all(OPS["neg"])
    assert errors.fell_back.keys() == {"torch.neg: left out by use()"}
    assert "forward launches no Triton kernel" in errors.problems


def test_a_sample_that_torch_refuses_is_a_problem() -> None:
    wrong = Sample((torch.ones(2), torch.ones(3)), {}, "misfit")
    op = dataclasses.replace(OPS["mul"], samples=lambda make: [wrong, first_sample(OPS["mul"])])
    errors = parity.check_all(op)
    assert [problem.partition(":")[0] for problem in errors.problems] == [
        "float64, misfit",
        "float32, misfit",
    ]
    assert errors.gradient is not None


def test_the_planted_fault_is_seen_and_removed() -> None:
    sample = first_sample(OPS["mul"])
    with plant():
        errors = parity.check(OPS["mul"], sample, torch.float64)
    assert [problem.partition(" is ")[0] for problem in errors.problems] == [
        "gradient",
        "second",
        "jvp",
    ]
    assert errors.forward == 0
    assert parity.check(OPS["mul"], sample, torch.float64).passed


# ------------------------------------------------------------------------------------ command lines


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    wanted = ["--only", "mul", "--only", "non-scalar-ones", "--only", "gt"]
    assert main([*wanted, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count(" ok ") == 3
    assert document.FOOTNOTE.split(":")[0] in out
    assert "3 rows, 0 failed" in out
    rows = json.loads(file.read_text())
    assert [(row["kind"], row["name"], row["passed"]) for row in rows] == [
        ("example", "non-scalar-ones", True),
        ("op", "mul", True),
        ("op", "gt", True),
    ]
    assert rows[1]["backward_kernels"] > 0
    assert rows[2]["gradient"] is None


def test_planted_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert main(["--plant", "--only", "mul", "--only", "neg", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 1
    assert "2 rows, 1 failed" in out
    assert [row["passed"] for row in json.loads(file.read_text())] == [False, True]


def test_a_row_that_cannot_be_computed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(example: document.Example) -> Errors:
        raise OSError("no document")

    monkeypatch.setattr(document, "check", broken)
    row = correctness.check("example", "dot")
    assert row.errors.problems == ["OSError: no document"]


@pytest.mark.parametrize("command", [[], ["host"], ["ops"]])
def test_unknown_name(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--only", "sigmoyd"])
    assert ended.value.code == 2
    assert "'sigmoyd'; did you mean sigmoid" in capsys.readouterr().err


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statics"]) == 2
    assert "no command is named 'statics'" in capsys.readouterr().err
    assert tritongrad_main(["compares"]) == 2
    assert "no command is named 'compares'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert "--json FILE" in capsys.readouterr().out


def test_the_console_script_hands_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert tritongrad_main([]) == 0
    assert "doctor" in capsys.readouterr().out
    assert tritongrad_main(["compare", "ops", "--only", "mul", "--markdown"]) == 0
    first = capsys.readouterr().out
    assert tritongrad_main(["ops", "--only", "mul", "--markdown"]) == 0
    assert capsys.readouterr().out == first


def test_modules_exist_once() -> None:
    """``python -m compare`` must not import neighbours a second time as ``compare.NAME``."""
    program = """if True:
        import contextlib, runpy, sys
        sys.argv = ["compare", "ops", "--only", "mul"]
        with contextlib.suppress(SystemExit):
            runpy.run_module("compare", run_name="__main__", alter_sys=True)
        print(sorted(name for name in sys.modules if name.partition(".")[0] == "compare"))
    """
    assert run_python("-c", program).stdout.splitlines()[-1] == "['compare']"


@pytest.mark.parametrize("command", [["compare"], ["ops"], ["compare", "static"]])
def test_without_rich(command: list[str]) -> None:
    program = (
        "import sys; sys.modules['rich'] = None; "
        "from tritongrad.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = run_python("-c", program, *command)
    assert done.returncode == 2
    assert done.stderr == "compare needs rich: pip install tritongrad[compare]\n"


def test_numbers_json_does_not_have(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    terminal.write_json(file, [{"a": math.inf, "b": (math.nan, 1.5)}])
    assert json.loads(file.read_text()) == [{"a": "inf", "b": ["nan", 1.5]}]
