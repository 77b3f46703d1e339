"""Expressions over the columns of a row: what ``data.filter`` and ``data.map`` may say.

The grammar is a part of Python's, read by ``ast`` and never compiled or evaluated by Python: constants,
columns by name, ``row["a column"]`` and ``row.get("column", other)``, slices, ``+ - * / // %`` on
numbers, ``+`` on texts and lists, comparisons, ``is`` before None, True and False, ``in``,
``and or not``, ``a if b else c``, and functions and methods in :data:`FUNCTIONS` and :data:`METHODS`.
There are no loops, no attributes, no powers, no regular expressions, and ``*`` and ``%`` are of numbers
alone, so that the cost of a row is bounded by its length and by :data:`MOST_PARTS`; a text or a list that
becomes longer than a row may be, an integer of more than :data:`MOST_BITS`, and a list within a list are
errors of their row.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedloom.data.rows import RowError, shown
from fedloom.data.safe_open import LONGEST_ROW

LONGEST = 2000
"""Characters of an expression."""

MOST_PARTS = 200
"""Names, constants, operations and calls of an expression."""

MOST_BITS = 4096
"""Bits of an integer that is computed."""

ITEM = 64
"""Characters that an item of a list counts as, beside its own."""

LONGEST_REASON = 100
"""Characters of an error that a message shows: it may hold the row's text."""

DEEPEST = 30
"""Parts within parts."""

WHOLE = "row"
"""The name of the row itself."""


class ExpressionError(ValueError):
    """An expression that is none; the text goes on after the expression."""


def _words(text: Any) -> int:
    return len(_text(text).split())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is needed, got {shown(value)}")
    return value


def _length(value: Any) -> int:
    if not isinstance(value, str | list | dict):
        raise TypeError(f"len() is of a text or a list, got {shown(value)}")
    return len(value)


def _string(value: Any) -> str:
    if isinstance(value, dict) or _is_list(value):
        raise TypeError(f"str() is of a number or a text, got {shown(value)}")
    return str(value)


def _is_list(value: Any) -> bool:
    """Return whether a value is a list, or an array as Parquet and the Hub give it."""
    return isinstance(value, list | tuple) or (hasattr(value, "tolist") and hasattr(value, "shape"))


def _round(value: Any, digits: int = 0) -> Any:
    if not -15 <= digits <= 15:
        raise ValueError(f"round() is to -15 to 15 digits, got {digits}")
    return round(_number(value), digits) if digits else round(_number(value))


FUNCTIONS: Mapping[str, tuple[Callable[..., Any], int, int]] = {
    "len": (_length, 1, 1),
    "words": (_words, 1, 1),
    "str": (_string, 1, 1),
    "int": (int, 1, 1),
    "float": (float, 1, 1),
    "bool": (bool, 1, 1),
    "abs": (abs, 1, 1),
    "min": (min, 2, 8),
    "max": (max, 2, 8),
    "round": (_round, 1, 2),
}
"""Functions by name, with the fewest and the most arguments that they take."""

METHODS: Mapping[str, tuple[int, int]] = {
    name: arguments
    for arguments, names in {
        (0, 0): "lower upper casefold isdigit isascii",
        (0, 1): "strip lstrip rstrip split",
        (1, 1): "removeprefix removesuffix startswith endswith count find",
        (2, 2): "replace",
    }.items()
    for name in names.split()
}
"""Methods of texts, with the fewest and the most arguments that they take."""

ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, several: one in several,
    ast.NotIn: lambda one, several: one not in several,
}

SIGNS = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
"""What is a node of ``ast`` and no part: whether a name is read, and signs of operations."""

Evaluated = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Expression:
    """An expression that was read.

    Attributes:
        text: As it was written.
        columns: Names of the columns that every row must have.
    """

    text: str
    columns: tuple[str, ...]
    _value: Evaluated

    def of(self, row: Mapping[str, Any]) -> Any:
        """Return its value for a row.

        Args:
            row: Column to value.

        Raises:
            RowError: It has none: a column is missing, or a value is of the wrong type.
        """
        try:
            return _bounded(self._value(row))
        except RowError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            reason = str(error)
            if len(reason) > LONGEST_REASON:
                reason = reason[: LONGEST_REASON - 3] + "..."
            raise RowError(f"{shown(self.text)} has no value ({reason})", cause=self.text) from None


@lru_cache(maxsize=64)
def parse_expression(text: str) -> Expression:
    """Read an expression.

    Args:
        text: At most 2,000 characters and 200 parts, at most 30 deep.

    Raises:
        ExpressionError: It is no expression of this grammar; it names the part that is not.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"has {len(text)} characters, at most {LONGEST} are read")
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ExpressionError(f"is no expression: {reason}") from None
    parts = sum(not isinstance(node, SIGNS) for node in ast.walk(body))
    if parts > MOST_PARTS:
        raise ExpressionError(f"has {parts} parts, at most {MOST_PARTS} are read")
    columns: dict[str, None] = {}
    value = _read(body, columns, DEEPEST)
    return Expression(text, tuple(columns), value)


def _read(node: ast.expr, columns: dict[str, None], room: int) -> Evaluated:
    """Return what computes a part of an expression; names of columns are added to ``columns``."""
    if not room:
        raise ExpressionError(f"is deeper than {DEEPEST} parts within parts")

    def part(own: ast.expr) -> Evaluated:
        return _read(own, columns, room - 1)

    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None as value):
            return lambda row: value
        case ast.Name(id="row"):
            raise ExpressionError('row stands before ["column"] or .get("column") alone')
        case ast.Name(id=name):
            return _column(name, columns)
        case ast.Subscript(value=ast.Name(id="row"), slice=ast.Constant(value=str() as name)):
            return _column(name, columns)
        case ast.Subscript(value=value, slice=place):
            return _subscript(part(value), place, part)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            values = [part(item) for item in items]
            return lambda row: _flat([own(row) for own in values])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            denied = part(operand)
            return lambda row: not denied(row)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            positive = part(operand)
            return lambda row: -_number(positive(row))
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            return _chain(node, part)
        case ast.BoolOp(op=op, values=operands):
            return _logic(isinstance(op, ast.And), [part(own) for own in operands])
        case ast.Compare(left=left, ops=ops, comparators=others):
            for own, other in zip(ops, others, strict=True):
                if isinstance(own, ast.Is | ast.IsNot) and not _is_one_of_its_kind(other):
                    raise ExpressionError(
                        f"holds {ast.unparse(node)!r}: is and is not stand before None, True and False "
                        "alone; write == or !="
                    )
            return _comparison(
                [part(left), *map(part, others)], [COMPARISONS[type(o)] for o in ops]
            )
        case ast.IfExp(test=test, body=yes, orelse=no):
            asked, first, second = part(test), part(yes), part(no)
            return lambda row: first(row) if asked(row) else second(row)
        case ast.Call(func=function, args=arguments, keywords=[]):
            return _call(function, [part(own) for own in arguments], arguments, part)
    raise ExpressionError(
        f"holds {ast.unparse(node)!r}, which is not read here; there are columns, constants, "
        f"comparisons, and, or, not, in, if else, + - * / // %, {', '.join(FUNCTIONS)}, and of texts "
        f"{', '.join('.' + name for name in METHODS)}"
    )


def _column(name: str, columns: dict[str, None]) -> Evaluated:
    columns[name] = None

    def value(row: Mapping[str, Any]) -> Any:
        if name not in row:
            raise RowError(f"column {name!r} is missing")
        return row[name]

    return value


def _subscript(
    value: Evaluated, place: ast.expr, part: Callable[[ast.expr], Evaluated]
) -> Evaluated:
    """Return an item or a slice of a text, a list or an object."""
    if isinstance(place, ast.Slice):
        if place.step is not None:
            raise ExpressionError("holds a slice with a step, which is not read here")
        start, stop = (own and part(own) for own in (place.lower, place.upper))
        return lambda row: value(row)[
            slice(start(row) if start else None, stop(row) if stop else None)
        ]
    at = part(place)
    return lambda row: value(row)[at(row)]


def _is_one_of_its_kind(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))


def _chain(node: ast.expr, part: Callable[[ast.expr], Evaluated]) -> Evaluated:
    """Return the operations that stand one after another, from the left; a long sum is not deep."""
    written: list[ast.BinOp] = []
    while isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        written.append(node)
        node = node.left
    first = part(node)
    later = [(type(own.op), part(own.right)) for own in reversed(written)]

    def value(row: Mapping[str, Any]) -> Any:
        so_far, weight = first(row), None
        for kind, other in later:
            right = other(row)
            if kind is ast.Add and isinstance(so_far, list) and isinstance(right, list):
                weight = (_weight(so_far) if weight is None else weight) + _weight(right)
                _require_length(weight)
                so_far = so_far + right
            else:
                so_far = _arithmetic(kind, so_far, right)
        return so_far

    return value


def _arithmetic(kind: type[ast.operator], one: Any, other: Any) -> Any:
    function = ARITHMETIC[kind]
    if kind is ast.Add and isinstance(one, str) and isinstance(other, str):
        _require_length(len(one) + len(other))
        return one + other
    return _bounded(function(_number(one), _number(other)))


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a number is needed, got {shown(value)}")
    return value


def _logic(every: bool, parts: list[Evaluated]) -> Evaluated:
    def value(row: Mapping[str, Any]) -> Any:
        found = None
        for own in parts:
            found = own(row)
            if bool(found) != every:
                return found
        return found

    return value


def _comparison(parts: list[Evaluated], functions: list[Callable[[Any, Any], bool]]) -> Evaluated:
    def value(row: Mapping[str, Any]) -> bool:
        left = parts[0](row)
        for own, function in zip(parts[1:], functions, strict=True):
            right = own(row)
            if not function(left, right):
                return False
            left = right
        return True

    return value


def _call(
    function: ast.expr,
    arguments: list[Evaluated],
    written: list[ast.expr],
    part: Callable[[ast.expr], Evaluated],
) -> Evaluated:
    """Return a call of a function, of a text's method, or of ``row.get``."""
    count = len(arguments)
    match function:
        case ast.Name(id=name) if name in FUNCTIONS:
            known, fewest, most = FUNCTIONS[name]
            _require_count(f"{name}()", count, fewest, most)
            return lambda row: _bounded(known(*(own(row) for own in arguments)))
        case ast.Attribute(value=ast.Name(id="row"), attr="get"):
            _require_count("row.get()", count, 1, 2)
            if not isinstance(written[0], ast.Constant) or not isinstance(written[0].value, str):
                raise ExpressionError('row.get() takes the name of a column: row.get("column")')
            column = written[0].value
            other = arguments[1] if count == 2 else lambda row: None
            return lambda row: row[column] if row.get(column) is not None else other(row)
        case ast.Attribute(value=value, attr=name) if name in METHODS:
            _require_count(f".{name}()", count, *METHODS[name])
            return _method(name, part(value), arguments)
    known_names = [*FUNCTIONS, *(f".{name}" for name in METHODS), "row.get"]
    raise ExpressionError(
        f"calls {ast.unparse(function)!r}, which is not among {', '.join(known_names)}"
    )


def _method(name: str, value: Evaluated, arguments: list[Evaluated]) -> Evaluated:
    def called(row: Mapping[str, Any]) -> Any:
        text, given = _text(value(row)), [_text(own(row)) for own in arguments]
        if name == "replace":
            longer = text.count(given[0]) * (len(given[1]) - len(given[0]))
            _require_length(len(text) + longer)
        return getattr(text, name)(*given)

    return called


def _require_count(what: str, count: int, fewest: int, most: int) -> None:
    if not fewest <= count <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise ExpressionError(f"calls {what} with {count} arguments, it takes {wanted}")


def _require_length(length: int) -> None:
    if length > LONGEST_ROW:
        raise ValueError(f"it becomes longer than {LONGEST_ROW} characters")


def _flat(items: list[Any]) -> list[Any]:
    """Return a list that is made, which holds no other: what is made of it would grow with each map."""
    if any(map(_is_list, items)):
        raise TypeError("a list within a list is not made here")
    _require_length(_weight(items))
    return items


def _weight(value: list[Any]) -> int:
    """Return how long a list is in characters, as often as they stand in it; no longer than needed."""
    total, waiting = 0, [value]
    while waiting and total <= LONGEST_ROW:
        items = waiting.pop()
        total += ITEM * len(items)
        if total > LONGEST_ROW:
            break
        for item in items:
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, dict):
                waiting.append([*item, *item.values()])
            elif isinstance(item, list):
                waiting.append(item)
    return total


def _bounded(value: Any) -> Any:
    """Return a value that is no longer than a row may be."""
    if isinstance(value, str | list):
        _require_length(len(value))
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError(f"it becomes an integer of more than {MOST_BITS} bits")
    return value
