"""A Jinja environment in which nothing can hang or fill memory. Owns the limits and where they are checked.

Time is checked at every loop turn, macro call, function call and filter. Size holds by construction: whatever makes a string
or a container larger (operators, filters, methods, literals, buffers) is checked where it happens, so that each single step
of C code is short, and the clock is read between them.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 16_000_000  # in one rendering: what is written, and any one value
MAX_SECONDS = 3.0
_MAX_COUNT = 10_000  # widths, numbers of columns and the like
_MAX_DEPTH = 100
_ELEMENT_CHARACTERS = 8  # what an element that is no string counts as: a reference's bytes
_MAX_BITS = 4096
_SIZED_METHODS = ("ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes")
_SIZED_FILTERS = ("center", "indent", "batch", "slice", "truncate", "tojson")
_REMOVED_FILTERS = ("urlize", "xmlattr", "pprint", "wordwrap", "random", "filesizeformat")
_REMOVED_GLOBALS = ("lipsum", "cycler", "joiner")
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{4,}|\*)")
_WIDE_FORMAT = re.compile(r":[^{}]*\d{4}|\{[^{}]+\{")
_WIDE_TIME = re.compile(r"%[^a-zA-Z%]*\d\d")


class TemplateLimit(Exception):
    """A template passed a limit of time or size."""


class TemplateRefusal(TemplateError):
    """A template called raise_exception."""


class RenderBudget:
    """What one rendering may still use."""

    def __init__(self, seconds: float = MAX_SECONDS, characters: int = MAX_CHARACTERS) -> None:
        self.characters = characters
        self._left = characters
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self._deadline:
            raise TemplateLimit(f"it ran for more than {self._seconds:g} seconds")

    def spend(self, characters: int) -> None:
        """Count written text."""
        self._left -= characters
        if self._left < 0:
            raise TemplateLimit(f"it wrote more than {self.characters:,} characters")

    def allow(self, size: int) -> None:
        """Check the size of a value about to be made."""
        if size > self.characters:
            raise TemplateLimit(f"it made a value of more than {self.characters:,} characters")

    def weight(self, value: Any, depth: int = 0) -> int:
        """Characters and elements in a value, shared parts counted each time; refuses what has no plain size."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, (list, tuple, dict, set)):
            if isinstance(value, Namespace):
                raise TemplateLimit("it put a namespace into another value")
            return _ELEMENT_CHARACTERS
        if depth > _MAX_DEPTH:
            raise TemplateLimit(f"it nested values more than {_MAX_DEPTH} deep")
        total = _ELEMENT_CHARACTERS
        for item in value:
            total += _ELEMENT_CHARACTERS + self.weight(item, depth + 1)
            if isinstance(value, dict):
                total += self.weight(value[item], depth + 1)
            self.allow(total)
        return total


class PlainNamespace(Namespace):
    """Jinja's namespace without underscored names and without other namespaces in it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, so that namespace(self=...) works
        self, rest = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace attribute may not begin with an underscore ({name})")
        if isinstance(value, Namespace):
            raise TemplateLimit("it put a namespace into another value")
        super().__setitem__(name, value)


class GenerationTag(Extension):
    """{% generation %} marks the assistant's part for training; here its body is rendered and nothing else."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's convention)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, within a budget. Set `budget` before each rendering; one rendering at a time."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would compute at compile time, outside any budget
            cache_size=0,
            extensions=[GenerationTag, LoopControlExtension],
            finalize=self._written,
        )
        self.budget = RenderBudget()
        self.filters["tojson"] = _to_json
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        for name in _REMOVED_GLOBALS:
            self.globals.pop(name, None)
        self.filters = {name: self._guarded_filter(name, function) for name, function in self.filters.items()}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=PlainNamespace)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        guarded: nodes.Template = _Guards().visit(template)
        for block in guarded.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            tick = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None))
            block.body.insert(0, tick.set_lineno(block.lineno))  # type: ignore[attr-defined]
        guarded.set_environment(self)
        return guarded

    def tick(self) -> None:
        """What loops and macros begin with."""
        self.budget.tick()

    def joined(self, *parts: Any) -> str:
        """The `~` operator."""
        return self.concat(self._text(part) for part in parts)

    def sized(self, value: Any) -> Any:
        """What list, tuple and dict literals pass through."""
        self.budget.weight(value)
        return value

    def concat(self, parts: Iterable[str]) -> str:  # in place of Jinja's "".join
        """Joins buffers of macros and blocks."""
        texts = list(parts)
        self.budget.allow(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.tick()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            self._check_method(owner, getattr(function, "__name__", ""), args, kwargs)
        return self._checked(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        if operator == "+" and isinstance(left, (str, list, tuple)):
            budget.allow(budget.weight(left) + budget.weight(right))
        elif operator == "*" and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            budget.allow(max(count, 0) * budget.weight(value) if isinstance(count, int) else 0)
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TemplateLimit("it computed too large a number")
        return self._checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str) and _WIDE_FORMAT.search(owner):
            raise TemplateLimit("it formatted text to an extreme width")
        return super().wrap_str_format(value)

    def _check_percent(self, text: str, values: Any) -> None:
        if _WIDE_PERCENT.search(text):
            raise TemplateLimit("it formatted text to an extreme width")
        self.budget.allow(len(text) * 1000 if len(text) > 1000 else 0)
        self.budget.allow(len(text) + self.budget.weight(values))

    def _check_method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Methods of strings and numbers whose result can be much larger than what goes in."""
        if name in _SIZED_METHODS and any(isinstance(arg, int) and arg > _MAX_COUNT for arg in (*args, *kwargs.values())):
            raise TemplateLimit(f"it called {name} with too large a number")
        if name == "translate":
            raise SecurityError("the method translate is not available in chat templates")
        if name == "replace" and len(args) >= 2:
            self._check_replace(owner, args[0], args[1])
        if name == "join" and args:
            items = args[0] if isinstance(args[0], (list, tuple, dict, str)) else ()
            self.budget.allow(len(owner) * len(items))

    def _check_replace(self, text: Any, old: Any, new: Any) -> None:
        if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
            self.budget.allow(len(text) + text.count(old) * len(new))

    def _guarded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            value, rest = args[first] if len(args) > first else None, (*args[first + 1 :], *kwargs.values())
            if name in _SIZED_FILTERS and any(isinstance(arg, int) and arg > _MAX_COUNT for arg in rest):
                raise TemplateLimit(f"it used the filter {name} with too large a number")
            if name == "indent":
                widths = [len(arg) if isinstance(arg, str) else arg for arg in rest if isinstance(arg, (int, str))]
                self.budget.allow((str(value).count("\n") + 1) * max(widths, default=4))
            elif name == "tojson":
                factors = [
                    arg if isinstance(arg, int) else self.budget.weight(arg) // _ELEMENT_CHARACTERS
                    for arg in rest
                    if arg is not None
                ]
                self.budget.allow(self.budget.weight(value) * (1 + sum(factors)))
            elif name == "replace" and len(rest) >= 2:
                self._check_replace(str(value), rest[0], rest[1])
            elif name == "format" and isinstance(value, str):
                self._check_percent(value, rest)
            elif name == "join":
                items: Any = value if hasattr(value, "__len__") else list(self._bounded(iter(value or ())))
                self.budget.allow(len(items) * max([0, *(len(arg) for arg in rest if isinstance(arg, str))]))
                args = (*args[:first], items, *args[first + 1 :])
            return self._checked(function(*args, **kwargs))

        return guarded

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str):
            self.budget.allow(len(value))
        elif isinstance(value, (list, tuple, dict, set)):
            self.budget.weight(value)
        elif isinstance(value, Iterator):
            return self._bounded(value)
        return value

    def _bounded(self, items: Iterator[Any]) -> Iterator[Any]:
        """The same items, until they have become too many or taken too long."""
        total = 0
        for item in items:
            self.budget.tick()
            total += _ELEMENT_CHARACTERS + self.budget.weight(item)
            self.budget.allow(total)
            yield item

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, Namespace):
            raise TemplateLimit("it wrote a namespace as text")
        if isinstance(value, (list, tuple, dict, set)):
            self.budget.weight(value)
        return str(value)

    def _written(self, value: Any) -> str:
        """What every {{ ... }} passes through."""
        text = self._text(value)
        self.budget.spend(len(text))
        return text


class _Guards(NodeTransformer):
    """Sends `~` and container literals through the environment's checks."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("joined", node.nodes, node.lineno)

    def _literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return _environment_call("sized", [node], node.lineno)

    visit_List = visit_Tuple = visit_Dict = _literal


def _environment_call(name: str, args: list[nodes.Expr], lineno: int) -> nodes.Node:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None).set_lineno(lineno)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as `transformers` writes it for templates: not escaped for HTML."""
    if isinstance(value, Undefined):
        raise TemplateError("tojson of an undefined value")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message)[:1000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or _WIDE_TIME.search(pattern):
        raise TemplateLimit("it asked for an extreme time format")
    return datetime.now().strftime(pattern)
