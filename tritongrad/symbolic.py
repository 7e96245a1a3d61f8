"""Derivative rules as text: call the rule with symbols and read what it did."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# Binding strength of an expression's outermost operator, for parentheses.
_ATOM, _POWER, _UNARY, _PRODUCT, _SUM, _COMPARISON = 5, 4, 3, 2, 1, 0


class Symbol:
    """A stand-in for a tensor or number in a rule, which records how it is used."""

    def __init__(self, text: str, strength: int = _ATOM) -> None:
        self.text = text
        self.strength = strength

    def __str__(self) -> str:
        return self.text

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Symbol:
        parts = [str(a) for a in args] + [f"{n}={v}" for n, v in (kwargs or {}).items()]
        return Symbol(f"{func.__name__}({', '.join(parts)})")

    def _inside(self, strength: int) -> str:
        return self.text if self.strength >= strength else f"({self.text})"

    def __neg__(self) -> Symbol:
        return Symbol(f"-{self._inside(_UNARY)}", _UNARY)


def _binary(sign: str, strength: int) -> tuple[Callable, Callable]:
    def inside(value: Any, least: int) -> str:
        return value._inside(least) if isinstance(value, Symbol) else str(value)

    def join(left: Any, right: Any) -> Symbol:
        # The right operand of - and / needs parentheses even at equal strength.
        text = f"{inside(left, strength)} {sign} {inside(right, strength + 1)}"
        return Symbol(text, strength)

    return join, lambda self, other: join(other, self)


for _name, _sign, _strength in (
    ("add", "+", _SUM),
    ("sub", "-", _SUM),
    ("mul", "*", _PRODUCT),
    ("truediv", "/", _PRODUCT),
    ("pow", "**", _POWER),
    ("matmul", "@", _PRODUCT),
):
    _plain, _reflected = _binary(_sign, _strength)
    setattr(Symbol, f"__{_name}__", _plain)
    setattr(Symbol, f"__r{_name}__", _reflected)
for _name, _sign in (
    ("eq", "=="),
    ("ne", "!="),
    ("lt", "<"),
    ("le", "<="),
    ("gt", ">"),
    ("ge", ">="),
):
    setattr(Symbol, f"__{_name}__", _binary(_sign, _COMPARISON)[0])


def formula(rule: Callable[..., Any]) -> str:
    """The expression that ``rule`` computes, in its own parameter names; those that have a default
    keep it."""
    parameters = inspect.signature(rule).parameters.values()
    result = rule(**{p.name: Symbol(p.name) for p in parameters if p.default is p.empty})
    return str(result)
