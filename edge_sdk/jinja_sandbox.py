"""Chat templates written by others, run so that they can do nothing but write a little text.

Knows Jinja. Does not know models or where templates come from.

A template gets its variables and no loader, file, attribute with an underscore or Python object
(Jinja's own sandbox). Here it also gets a budget: every way to make a value larger than those it
is made of (loops, calls, filters, operators, literals, output) pays for it beforehand, so that a
hostile template ends in an error and not in a device without memory or time.
"""

import functools
import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edge_sdk.errors import RuntimeFailure

MAX_SOURCE = 2**17
"""Characters of a template; the longest in wide use has some 20,000."""
ROOM = 2**20
"""Characters a template may handle beside SHARE times those of its variables."""
SHARE = 512
RENDER_S = 1.0
"""Processor seconds for one prompt; a usual one takes a hundredth of a millisecond a message."""
CLOCK_TURNS = 32
"""Payments between two looks at the clock, which costs more than most of them."""
MAX_NUMBER = 2**53

_FILTERS = """
abs attr capitalize count d default dictsort e escape first float int items join last length
list lower map max min reject rejectattr replace reverse round safe select selectattr sort string
sum title tojson trim unique upper
"""
_ESCAPING = frozenset({"e", "escape", "string", "tojson"})
"""A character becomes at most six."""
_METHODS = {
    str: "capitalize count endswith find index isalnum isalpha isdigit isspace islower isupper "
    "join lower lstrip partition removeprefix removesuffix replace rfind rpartition rsplit rstrip "
    "split splitlines startswith strip title upper",
    dict: "get items keys values",
    list: "count index",
    tuple: "count index",
}
_NAMES: dict[object, frozenset[str]] = {
    kind: frozenset(names.split()) for kind, names in _METHODS.items()
}
# No template can write these names: identifiers do not begin with a digit.
_TICK, _JOIN, _HOLD = "0tick", "0join", "0hold"
_STRFTIME = re.compile(r"(?:[^%]|%[a-zA-Z%]){0,64}")

Render = Callable[..., str]
_Node = TypeVar("_Node", bound=nodes.Node)


def compile_template(source: str, *, now: Callable[[], datetime] = datetime.now) -> Render:
    """Return a function of the template's variables that writes its text; for one thread at a time.

    `now` is what templates that write the date ask.

    Raises:
        RuntimeFailure: the template is malformed, too long, or uses what no template may; so does
            the function when the template refuses, fails or does too much.
    """
    if len(source) > MAX_SOURCE:
        raise RuntimeFailure(
            f"the bundle's chat template has {len(source)} characters; allowed: {MAX_SOURCE}"
        )
    environment = _Environment(now)
    try:
        environment.budget = _Budget(ROOM)
        tree = _Metered(environment).visit(environment.parse(source))
        code = environment.compile(tree)
        template = Template.from_code(environment, code, environment.make_globals(None))
    except (TemplateError, RecursionError, MemoryError) as exc:
        raise RuntimeFailure(f"the bundle's chat template is malformed: {exc}") from exc

    def render(**variables: Any) -> str:
        environment.budget = _Budget(ROOM + SHARE * _size(list(variables.values()), 2**40))
        try:
            return template.render(**variables)
        except RuntimeFailure:
            raise
        except Exception as exc:  # a template may fail in every way that Python can
            raise RuntimeFailure(f"the bundle's chat template failed: {exc}") from exc

    return render


class _Budget:
    """Characters and processor time left for one prompt."""

    def __init__(self, room: int) -> None:
        self._room, self._until = room, time.thread_time() + RENDER_S
        self._turns = 0

    def spend(self, cost: int) -> None:
        self._room -= cost
        self._turns += 1
        late = self._turns % CLOCK_TURNS == 0 and time.thread_time() > self._until
        if self._room < 0 or late:
            raise RuntimeFailure("the bundle's chat template does too much; it may be hostile")

    def spend_on(self, *values: object, times: int = 1) -> None:
        self.spend(1 + times * _size(values, self._room))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the budget at every place where values grow."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])
    budget: _Budget

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._shown,
        )
        self.filters = {name: self._paid(name, self.filters[name]) for name in _FILTERS.split()}
        ours = {_TICK: lambda: "", _JOIN: _join, _HOLD: lambda value: value}
        theirs = {"raise_exception": _refuse, "strftime_now": _strftime(now)}
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = {**kept, **ours, **theirs}
        self._callables = {*ours.values(), *theirs.values(), *kept.values()}

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(__obj, (Macro, LoopContext)) or __obj in self._callables:
            self.budget.spend_on(args, kwargs)
        elif name in _NAMES.get(type(owner), ()):
            self._pay_growth(name, [owner, *args])
        elif isinstance(owner, LoopContext):
            self.budget.spend_on(args)
        else:
            raise SecurityError(f"a chat template may not call {name or __obj!r}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(x, (int, float)) and abs(x) <= MAX_NUMBER for x in (left, right)):
            if operator != "+":
                raise SecurityError(f"a chat template may use {operator} on small numbers only")
            self.budget.spend_on(left, right)
        elif operator == "**":
            raise SecurityError("a chat template may not raise to a power")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, slice):
            self.budget.spend_on(obj)
        return super().getitem(obj, argument)

    def _shown(self, value: Any) -> Any:
        self.budget.spend_on(value)
        return value

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if getattr(function, "jinja_pass_arg", None) else 0

        @functools.wraps(function)  # carries over which hidden argument Jinja passes
        def paid(*args: Any, **kwargs: Any) -> Any:
            self._pay_growth(name, [*args[first:], *kwargs.values()])
            return function(*args, **kwargs)

        return paid

    def _pay_growth(self, name: str, values: list[Any]) -> None:
        """Pay for what `name` makes of `values`: as much again but for those named here."""
        self.budget.spend_on(values, times=6 if name in _ESCAPING else 1)
        if name == "replace" and len(values) >= 3:
            text, old, new = (str(value) for value in values[:3])
            self.budget.spend((text.count(old) if old else len(text) + 1) * len(new))
        if name == "join" and len(values) >= 2:
            # "s".join(list) and list|join("s"): which is which does not matter for a bound.
            self.budget.spend(_size(values[0], 2**40) * _size(values[1], 2**40))


class _Metered(NodeTransformer):
    """Puts a call, which is paid for, where a value grows without one."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's names, as below
        self.generic_visit(node)
        node.body.insert(0, self._at(node, nodes.ExprStmt(self._call(node, _TICK))))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call(node, _JOIN, *node.nodes)

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._call(node, _HOLD, node)

    visit_List = visit_Dict = visit_Tuple = _literal  # noqa: N815

    def _call(self, near: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Call:
        call = nodes.Call(nodes.Name(name, "load"), list(args), [], None, None)
        return self._at(near, call)

    def _at(self, near: nodes.Node, node: _Node) -> _Node:
        node.set_lineno(near.lineno)
        node.set_environment(self._environment)
        return node


class _Generation(Extension):
    """`{% generation %}`, with which training marks the assistant's words: only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: object) -> None:
    raise RuntimeFailure(f"the chat template refuses these messages: {str(message)[:500]}")


def _strftime(now: Callable[[], datetime]) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        if not _STRFTIME.fullmatch(form):  # a width in it would write gigabytes
            raise SecurityError("the date's form has more than letters")
        return now().strftime(form)

    return strftime_now


def _join(*values: object) -> str:
    return "".join(str(value) for value in values)


def _size(value: object, most: int) -> int:
    """Characters and items in `value`, counted up to about `most`."""
    total, todo = 0, [value]
    while todo and total <= most:
        here = todo.pop()
        total += 1
        if isinstance(here, str):
            total += len(here)
        elif isinstance(here, dict):
            todo += [*here.keys(), *here.values()]
        elif isinstance(here, (list, tuple, set)):
            todo += here
        elif isinstance(here, Namespace):
            total += 1
    return total
