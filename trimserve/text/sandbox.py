"""The sandbox that chat templates run in: jinja2's, which keeps them in, with a budget, which stops them.

The environment is the documented one of https://huggingface.co/docs/transformers/chat_templating_writing:
trimmed blocks, loop controls, `tojson`, `raise_exception`, `strftime_now` and the `generation` block.

What a template can do for long goes through a hook: its blocks (a loop's body is one) and texts put together
by the code that is generated, calls and operators by the sandbox's own hooks, filters and tests by wrapping
each. Import this module only where jinja2 is there.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, ext, nodes, sandbox
from jinja2.runtime import Context, Macro

from trimserve.foreign import reason
from trimserve.text.budget import MOST_CALLS, MOST_CHARACTERS, Budget, ExcessError, check_number, check_size
from trimserve.text.counted_code import CountedCode
from trimserve.text.steps import SHALLOW, check_call, check_filter, check_operator, check_sizes

# Characters of a template: ten times the longest known one. Compiling a longer one takes seconds.
MOST_SOURCE = 1 << 17
# A filter that no template can name: it counts a loop's condition.
_COUNTED = "counted condition"
_running = threading.local()


class RefusedError(TemplateError):
    """What a template says itself, by `raise_exception`."""


class FaultError(Exception):
    """Whatever else a template raised, and where."""


@contextmanager
def budgeted() -> Iterator[Budget]:
    """Give this thread's template a budget of its own."""
    before = getattr(_running, "budget", None)
    _running.budget = budget = Budget()
    try:
        yield budget
    finally:
        _running.budget = before


def _budget() -> Budget:
    budget: Budget = _running.budget
    return budget


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """What the generated code asks, and jinja2's own hooks."""

    code_generator_class = CountedCode
    intercepted_binops = frozenset(("+", "-", "*", "**", "%", "/", "//"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            if loop.test is not None:
                counted = nodes.Filter(loop.test, _COUNTED, [], [], None, None, lineno=loop.lineno)
                loop.test = counted.set_environment(self)
        return tree

    def enter(self, literals: int) -> None:
        """A block begins that prints so many characters of its own."""
        budget = _budget()
        budget.spend(1 + (literals >> 8))
        if literals:
            budget.hold(literals)

    def weigh(self, value: Any) -> Any:  # noqa: ANN401 - what a template computes with, as below
        """A value is compared, printed or hashed."""
        _budget().weigh(value)
        return value

    def weigh_container(self, value: Any) -> Any:  # noqa: ANN401
        """A value is searched."""
        if isinstance(value, dict):
            _budget().spend(1)
        else:
            _budget().weigh(value)
        return value

    def weigh_parts(self, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        """Texts and other values are put together."""
        budget = _budget()
        size = sum(map(budget.weigh, parts))
        check_size(size)
        budget.hold(size)
        return parts

    def sliced(self, value: Any) -> Any:  # noqa: ANN401
        """A part of a text or list was taken."""
        _budget().look(value)
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:  # noqa: ANN401
        if isinstance(argument, tuple):
            self.weigh(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        budget = _budget()
        check_operator(operator, left, right, budget)
        result = super().call_binop(context, operator, left, right)
        budget.made(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, N805 - as jinja2's
        budget = _budget()
        budget.spend(3)
        if not isinstance(__obj, Macro):
            check_call(__obj, args, kwargs, budget)
        budget.calls += 1
        if budget.calls > MOST_CALLS:
            raise ExcessError(f"calls itself more than {MOST_CALLS} times within each other")
        try:
            result = super().call(__context, __obj, *args, **kwargs)
        finally:
            budget.calls -= 1
        budget.made(result)
        return result


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        budget = _budget()
        budget.spend(2)
        head, values = args[:passed], args[passed:]
        if name in SHALLOW or name == _COUNTED:
            budget.look(values[0] if values else None)
            check_sizes(name, (*values[1:], *kwargs.values()))
        else:
            # What is made while it is read cannot be weighed before.
            values = tuple(list(value) if isinstance(value, Iterator) else value for value in values)
            check_filter(name, values, kwargs, budget)
        result = function(*head, *values, **kwargs)
        budget.made(result)
        return result

    return guarded


def _guarded_test(function: Any) -> Callable[..., Any]:  # noqa: ANN401 - some are of operator
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        budget = _budget()
        budget.spend(1)
        if len(args) > passed + 1:  # compared with something
            for value in args[passed:]:
                budget.weigh(value)
        return function(*args, **kwargs)

    return guarded


def _printed(value: Any) -> Any:  # noqa: ANN401
    """A value is printed."""
    budget = _budget()
    budget.hold(budget.weigh(value))
    return value


class _GenerationBlock(ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set

    def parse(self, parser: Any) -> Any:  # noqa: ANN401 - jinja2's own signature
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def make_environment() -> _Environment:
    """The environment of chat templates; its templates run within `budgeted` alone."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        # What is constant is computed as everything else is: when it is needed, and on the account.
        optimized=False,
        finalize=_printed,
        extensions=[_GenerationBlock, ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.filters[_COUNTED] = lambda value: value
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _guarded_filter(name, function)
    for name, test in list(environment.tests.items()):
        environment.tests[name] = _guarded_test(test)
    del environment.globals["lipsum"]  # random text of any length
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(helpers)
    return environment


@cache
def _environment() -> _Environment:
    return make_environment()


def compile_template(source: str) -> Template:
    """Make a template of its source, within `budgeted`.

    Raises:
        FaultError: it is too long.
        TemplateSyntaxError: it is no template.
    """
    if len(source) > MOST_SOURCE:
        raise FaultError(f"it has more than {MOST_SOURCE:,} characters")
    return _environment().from_string(source)


def run(template: Template, variables: dict[str, Any]) -> str:
    """Render a template, within `budgeted`.

    Raises:
        RefusedError: it says that it takes no such messages.
        FaultError: it would go beyond its budget, or whatever else a program may raise; with its line.
        MemoryError: there is not enough.
    """
    pieces = []
    size = 0
    try:
        for piece in template.root_render_func(template.new_context(variables)):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_CHARACTERS:
                check_size(size)
    except (RefusedError, MemoryError):
        raise
    except Exception as error:
        raise FaultError(_said(template, error)) from error
    return "".join(pieces)


def _said(template: Template, error: Exception) -> str:
    """What was raised, and in which line of the template."""
    what = f"it {error}" if isinstance(error, ExcessError) else reason(error)
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code is template.root_render_func.__code__:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return what if line is None else f"line {line}: {what}"


def _to_json(
    value: Any,  # noqa: ANN401 - any JSON value
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` without Jinja2's HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: object = "it gives no reason") -> None:
    raise RefusedError(str(message))


def _now(pattern: str) -> str:
    check_number(len(pattern))
    return datetime.now().strftime(pattern)  # local time, as templates expect
