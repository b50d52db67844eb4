# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the prompt that a checkpoint's Jinja template makes of a conversation.

Templates are code from untrusted files and are never run. Jinja's parser turns one into its syntax
tree, and `render` walks the tree over plain data: it knows the listed statements, expressions,
filters and methods of strings, lists and dictionaries, reads no attributes of Python objects, and
stops after so many steps or characters. Whatever else a template has, it is not followed, and
`UnsupportedTemplate` names it. Within these limits the text is that of transformers'
`apply_chat_template`, which the tests compare.
"""

import datetime
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

MAX_TEMPLATE = 1 << 20  # characters
_MAX_STEPS = 200_000  # nodes visited
_MAX_TEXT = 1 << 22  # characters of a value
_MAX_NUMBER = 1 << 32
_MAX_RANGE = 10_000
_MAX_ELEMENTS = 100_000
_BUILDERS = (nodes.List, nodes.Tuple, nodes.Dict, nodes.BinExpr, nodes.Call, nodes.Filter)


class UnsupportedTemplate(ValueError):
    """A template that cannot be followed; the message names what is not supported."""


class TemplateRefusal(ValueError):
    """The template itself refuses the conversation (`raise_exception`)."""


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that `template` makes of `variables` (strings, numbers, lists, dictionaries).

    Raises
    ------
    UnsupportedTemplate
        If it uses what is not supported, or does not end in time.
    TemplateRefusal
        If the template raises an exception itself.
    """
    try:
        scope = _Scope({**_GLOBALS, **variables})
        return _Walker().block(_parse(template).body, scope)
    except RecursionError as error:
        raise UnsupportedTemplate("nested too deeply") from error
    except jinja2.TemplateSyntaxError as error:
        raise UnsupportedTemplate(f"not a Jinja template: {error}") from error
    except (_Break, _Continue) as error:
        raise UnsupportedTemplate("it leaves a loop that it is not in") from error
    except (UnsupportedTemplate, TemplateRefusal):
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UnsupportedTemplate(f"an expression has no value: {error}") from error


def names(template: str) -> set[str]:
    """Variables that the template reads; none if it is no template."""
    try:
        return {node.name for node in _parse(template).find_all(nodes.Name) if node.ctx == "load"}
    except (jinja2.TemplateSyntaxError, ValueError, RecursionError):
        return set()


def _parse(template: str) -> nodes.Template:
    if len(template) > MAX_TEMPLATE:
        raise UnsupportedTemplate(f"longer than {MAX_TEMPLATE} characters")
    # The settings of transformers. Parsing runs nothing.
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    return environment.parse(template)


class _Generation(Extension):
    """`{% generation %}`, with which templates mark the assistant's text, changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Undefined:
    """The value of a name that is not set: false, empty and without attributes."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Undefined)

    def __hash__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __str__(self) -> str:
        return ""


_UNDEFINED = _Undefined()


class _Namespace(dict):
    """`namespace(...)`: the one object whose attributes a template may set."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class _Scope:
    """Variables; inner scopes see outer ones and do not change them."""

    def __init__(self, values: dict[str, Any], outer: "_Scope | None" = None) -> None:
        self.values, self.outer = values, outer

    def get(self, name: str) -> Any:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        return _UNDEFINED


class _Walker:
    """Evaluates nodes of one template, counting steps."""

    def __init__(self) -> None:
        self._steps = 0

    def block(self, body: list[nodes.Node], scope: _Scope) -> str:
        """The text of statements."""
        output: list[str] = []
        self.run(body, scope, output)
        return "".join(output)

    def run(self, body: list[nodes.Node], scope: _Scope, output: list[str]) -> None:
        """Appends the text of statements to `output`, also if a loop is left in between."""
        for node in body:
            self._step()
            statement = _STATEMENTS.get(type(node))
            if statement is None:
                raise UnsupportedTemplate(f"statement {type(node).__name__!r}")
            statement(self, node, scope, output)

    def value(self, node: nodes.Node | None, scope: _Scope) -> Any:
        """The value of an expression."""
        self._step()
        expression = _EXPRESSIONS.get(type(node))
        if node is None or expression is None:
            raise UnsupportedTemplate(f"expression {type(node).__name__!r}")
        value = expression(self, node, scope)
        if isinstance(value, str):
            self._step(len(value) // 256)  # so that time is bounded, too
            if len(value) > _MAX_TEXT:
                raise UnsupportedTemplate("a value becomes too long")
        elif isinstance(value, list | dict) and isinstance(node, _BUILDERS):
            _check_size(value)
        if isinstance(value, int | float) and abs(value) > _MAX_NUMBER:
            raise UnsupportedTemplate("a number becomes too large")
        return value

    def _step(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > _MAX_STEPS:
            raise UnsupportedTemplate(f"it takes more than {_MAX_STEPS} steps")

    # Statements.

    def _output(self, node: nodes.Output, scope: _Scope, output: list[str]) -> None:
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                output.append(part.data)
            else:
                output.append(_text(self.value(part, scope)))
            self._step(len(output[-1]) // 64)

    def _if(self, node: nodes.If, scope: _Scope, output: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                self.run(branch.body, scope, output)
                return
        self.run(node.else_, scope, output)

    def _for(self, node: nodes.For, scope: _Scope, output: list[str]) -> None:
        if node.recursive:
            raise UnsupportedTemplate("recursive loop")
        found = self.value(node.iter, scope)
        if not isinstance(found, str | list | tuple | dict | range | _Undefined):
            raise UnsupportedTemplate("loop over what is no list")
        items = list(found)
        self._step(len(items))
        if node.test is not None:
            items = [
                item for item in items if self.value(node.test, self._inner(node, item, scope))
            ]
        for i, item in enumerate(items):
            inner = self._inner(node, item, scope)
            inner.values["loop"] = {
                "index": i + 1,
                "index0": i,
                "revindex": len(items) - i,
                "revindex0": len(items) - i - 1,
                "first": i == 0,
                "last": i == len(items) - 1,
                "length": len(items),
                "previtem": items[i - 1] if i else _UNDEFINED,
                "nextitem": items[i + 1] if i + 1 < len(items) else _UNDEFINED,
            }
            try:
                self.run(node.body, inner, output)
            except _Continue:
                continue
            except _Break:
                break
        if not items:
            self.run(node.else_, scope, output)

    def _inner(self, node: nodes.For, item: Any, scope: _Scope) -> _Scope:
        inner = _Scope({}, scope)
        self._assign_to(node.target, item, inner)
        return inner

    def _assign(self, node: nodes.Assign, scope: _Scope, output: list[str]) -> None:
        self._assign_to(node.target, self.value(node.node, scope), scope)

    def _assign_block(self, node: nodes.AssignBlock, scope: _Scope, output: list[str]) -> None:
        if node.filter is not None:
            raise UnsupportedTemplate("filter of a block")
        self._assign_to(node.target, self.block(node.body, _Scope({}, scope)), scope)

    def _assign_to(self, target: nodes.Node, value: Any, scope: _Scope) -> None:
        if isinstance(target, nodes.Name):
            scope.values[target.name] = value
        elif isinstance(target, nodes.NSRef):
            namespace = scope.get(target.name)
            if not isinstance(namespace, _Namespace):
                raise UnsupportedTemplate(f"{target.name!r} is no namespace")
            namespace[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            for part, item in zip(target.items, value, strict=True):
                self._assign_to(part, item, scope)
        else:
            raise UnsupportedTemplate(f"assignment to {type(target).__name__!r}")

    def _macro(self, node: nodes.Macro, scope: _Scope, output: list[str]) -> None:
        parameters = [parameter.name for parameter in node.args]
        defaults = [self.value(default, scope) for default in node.defaults]

        def call(*args: Any, **named: Any) -> str:
            given = dict(zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True))
            given |= dict(zip(parameters, args, strict=False)) | named
            if len(args) > len(parameters) or not set(given) <= set(parameters):
                raise UnsupportedTemplate(f"arguments of macro {node.name!r}")
            missing = dict.fromkeys(parameters, _UNDEFINED)
            return self.block(node.body, _Scope(missing | given, scope))

        scope.values[node.name] = call

    def _scope(self, node: nodes.Scope, scope: _Scope, output: list[str]) -> None:
        self.run(node.body, _Scope({}, scope), output)

    def _expression_statement(self, node: nodes.ExprStmt, scope: _Scope, output: list[str]) -> None:
        self.value(node.node, scope)

    def _break(self, node: nodes.Break, scope: _Scope, output: list[str]) -> None:
        raise _Break

    def _continue(self, node: nodes.Continue, scope: _Scope, output: list[str]) -> None:
        raise _Continue

    # Expressions.

    def _const(self, node: nodes.Const, scope: _Scope) -> Any:
        return node.value

    def _template_data(self, node: nodes.TemplateData, scope: _Scope) -> str:
        return node.data

    def _name(self, node: nodes.Name, scope: _Scope) -> Any:
        return scope.get(node.name)

    def _list(self, node: nodes.List | nodes.Tuple, scope: _Scope) -> list[Any]:
        return [self.value(item, scope) for item in node.items]

    def _dict(self, node: nodes.Dict, scope: _Scope) -> dict[Any, Any]:
        return {self.value(p.key, scope): self.value(p.value, scope) for p in node.items}

    def _getattr(self, node: nodes.Getattr, scope: _Scope) -> Any:
        return _member(self.value(node.node, scope), node.attr)

    def _getitem(self, node: nodes.Getitem, scope: _Scope) -> Any:
        owner = self.value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            ends = (node.arg.start, node.arg.stop, node.arg.step)
            start, stop, step = (None if e is None else self.value(e, scope) for e in ends)
            if not isinstance(owner, str | list):
                raise UnsupportedTemplate("slice of what is no list")
            return owner[start:stop:step]
        return _member(owner, self.value(node.arg, scope))

    def _binary(self, node: nodes.BinExpr, scope: _Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(left, _Undefined) or isinstance(right, _Undefined):
            raise UnsupportedTemplate("arithmetic with what is undefined")
        joins = isinstance(node, nodes.Add) and type(left) is type(right) and left is not None
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if not (numbers or (joins and isinstance(left, str | list))):
            raise UnsupportedTemplate(f"{node.operator!r} between other things than numbers")
        return _ARITHMETIC[type(node)](left, right)

    def _unary(self, node: nodes.UnaryExpr, scope: _Scope) -> Any:
        value = self.value(node.node, scope)
        return not value if isinstance(node, nodes.Not) else -value

    def _and(self, node: nodes.And, scope: _Scope) -> Any:
        return self.value(node.left, scope) and self.value(node.right, scope)

    def _or(self, node: nodes.Or, scope: _Scope) -> Any:
        return self.value(node.left, scope) or self.value(node.right, scope)

    def _concat(self, node: nodes.Concat, scope: _Scope) -> str:
        return "".join(_text(self.value(part, scope)) for part in node.nodes)

    def _compare(self, node: nodes.Compare, scope: _Scope) -> bool:
        left = self.value(node.expr, scope)
        for operand in node.ops:
            right = self.value(operand.expr, scope)
            if not _COMPARISONS[operand.op](left, right):
                return False
            left = right
        return True

    def _conditional(self, node: nodes.CondExpr, scope: _Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        return _UNDEFINED if node.expr2 is None else self.value(node.expr2, scope)

    def _test(self, node: nodes.Test, scope: _Scope) -> bool:
        test = _TESTS.get(node.name)
        if test is None or node.kwargs or node.dyn_args or node.dyn_kwargs:
            raise UnsupportedTemplate(f"test {node.name!r}")
        arguments = [self.value(argument, scope) for argument in node.args or ()]
        return test(self.value(node.node, scope), *arguments)

    def _filter(self, node: nodes.Filter, scope: _Scope) -> Any:
        filtering = _FILTERS.get(node.name)
        if filtering is None or node.node is None or node.dyn_args or node.dyn_kwargs:
            raise UnsupportedTemplate(f"filter {node.name!r}")
        value = self.value(node.node, scope)
        arguments = [self.value(argument, scope) for argument in node.args]
        named = {str(pair.key): self.value(pair.value, scope) for pair in node.kwargs}
        return filtering(value, *arguments, **named)

    def _call(self, node: nodes.Call, scope: _Scope) -> Any:
        if node.dyn_args or node.dyn_kwargs:
            raise UnsupportedTemplate("call with unpacked arguments")
        function: Callable[..., Any]
        if isinstance(node.node, nodes.Getattr):
            owner, name = self.value(node.node.node, scope), node.node.attr
            function = _method(owner, name)
        elif isinstance(node.node, nodes.Name):
            name = node.node.name
            function = scope.get(name)
            if not callable(function):
                raise UnsupportedTemplate(f"function {name!r}")
        else:
            raise UnsupportedTemplate("call of an expression")
        arguments = [self.value(argument, scope) for argument in node.args]
        return function(*arguments, **{p.key: self.value(p.value, scope) for p in node.kwargs})


def _check_size(value: Any) -> None:
    """Raises UnsupportedTemplate if a list or dictionary has too many elements, those inside its
    elements included: printed, the same list may be there many times."""
    todo, count = [value], 0
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        count += 1 + (len(item) // 64 if isinstance(item, str) else 0)
        if count > _MAX_ELEMENTS:
            raise UnsupportedTemplate("a list becomes too long")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, int | float | list | dict | _Undefined):
        return str(value)
    raise UnsupportedTemplate("a function is printed")


def _member(owner: Any, key: Any) -> Any:
    """`owner.key` or `owner[key]` of lists, dictionaries and strings; never of Python objects."""
    if isinstance(owner, _Undefined):
        raise UnsupportedTemplate(f"{key!r:.40} of what is undefined")
    if isinstance(owner, dict):
        return owner.get(key, _UNDEFINED) if isinstance(key, str | int) else _UNDEFINED
    if isinstance(owner, str | list) and isinstance(key, int):
        return owner[key] if -len(owner) <= key < len(owner) else _UNDEFINED
    return _UNDEFINED


def _method(owner: Any, name: str) -> Callable[..., Any]:
    if isinstance(owner, dict) and callable(owner.get(name)):
        return owner[name]
    for kind, methods in _METHODS.items():
        if isinstance(owner, kind) and name in methods:
            return lambda *arguments, **named: methods[name](owner, *arguments, **named)
    raise UnsupportedTemplate(f"method {name!r}")


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    if (text.count(old) + 1) * (len(new) + 1) + len(text) > _MAX_TEXT:
        raise UnsupportedTemplate("a value becomes too long")
    return text.replace(old, new, count)


def _join(items: list[Any], separator: str = "") -> str:
    if len(items) * len(separator) > _MAX_TEXT:
        raise UnsupportedTemplate("a value becomes too long")
    return separator.join(map(_text, items))


def _range(*ends: int) -> range:
    found = range(*ends)
    if len(found) > _MAX_RANGE:
        raise UnsupportedTemplate("a range is too long")
    return found


def _raise(message: Any = "") -> None:
    raise TemplateRefusal(_text(message))


def _tojson(value: Any, indent: int | None = None, **named: Any) -> str:
    if named or (indent is not None and not 0 <= indent <= 16):
        raise UnsupportedTemplate("arguments of 'tojson'")
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _default(value: Any, other: Any = "", boolean: bool = False) -> Any:
    return other if isinstance(value, _Undefined) or (boolean and not value) else value


def _select(kept: bool, values: list[Any], key: str, test: str = "", *others: Any) -> list[Any]:
    """The values whose member `key` passes the test, or, unless `kept`, those that do not."""
    if test and test not in _TESTS:
        raise UnsupportedTemplate(f"test {test!r}")
    passes = _TESTS[test] if test else bool
    return [v for v in values or () if bool(passes(_member(v, key), *others)) == kept]


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout[:100])


_GLOBALS: dict[str, Any] = {
    "raise_exception": _raise,
    "strftime_now": _now,
    "namespace": lambda **values: _Namespace(values),
    "dict": lambda **values: dict(values),
    "range": _range,
}
_METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {
        **{name: getattr(str, name) for name in ("strip", "lstrip", "rstrip", "split", "rsplit")},
        **{name: getattr(str, name) for name in ("startswith", "endswith", "upper", "lower")},
        **{name: getattr(str, name) for name in ("title", "capitalize", "find", "splitlines")},
        "replace": _replace,
        "join": lambda text, items: _join(items, text),
    },
    dict: {
        "get": lambda values, key, other=None: values.get(key, other),
        "items": lambda values: [[key, value] for key, value in values.items()],
        "keys": lambda values: list(values),
        "values": lambda values: list(values.values()),
    },
}
_FILTERS: dict[str, Callable[..., Any]] = {
    "trim": lambda text, characters=None: _text(text).strip(characters),
    "upper": lambda text: _text(text).upper(),
    "lower": lambda text: _text(text).lower(),
    "capitalize": lambda text: _text(text).capitalize(),
    "length": len,
    "count": len,
    "string": _text,
    "safe": _text,
    "int": lambda value: int(value),
    "list": lambda value: list(value),
    "items": lambda values: [[key, value] for key, value in values.items()],
    "first": lambda values: values[0] if values else _UNDEFINED,
    "last": lambda values: values[-1] if values else _UNDEFINED,
    "reverse": lambda values: values[::-1],
    "join": _join,
    "replace": _replace,
    "selectattr": lambda *arguments: _select(True, *arguments),
    "rejectattr": lambda *arguments: _select(False, *arguments),
    "map": lambda values, attribute: [_member(value, attribute) for value in values],
    "default": _default,
    "d": _default,
    "tojson": _tojson,
}
_TESTS: dict[str, Callable[..., bool]] = {
    "defined": lambda value: not isinstance(value, _Undefined),
    "undefined": lambda value: isinstance(value, _Undefined),
    "none": lambda value: value is None,
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, dict),
    "iterable": lambda value: isinstance(value, str | list | dict | range | _Undefined),
    "sequence": lambda value: isinstance(value, str | list | dict | range | _Undefined),
    "number": lambda value: isinstance(value, int | float),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "true": lambda value: value is True,
    "false": lambda value: value is False,
    "odd": lambda value: value % 2 == 1,
    "even": lambda value: value % 2 == 0,
    "eq": operator.eq,
    "equalto": operator.eq,
    "==": operator.eq,
    "ne": operator.ne,
    "in": lambda value, values: value in values,
}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda value, values: value in values,
    "notin": lambda value, values: value not in values,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    nodes.Add: operator.add,
    nodes.Sub: operator.sub,
    nodes.Mul: operator.mul,
    nodes.Mod: operator.mod,
    nodes.Div: operator.truediv,
    nodes.FloorDiv: operator.floordiv,
}
_STATEMENTS: dict[type, Callable[..., None]] = {
    nodes.Output: _Walker._output,
    nodes.If: _Walker._if,
    nodes.For: _Walker._for,
    nodes.Assign: _Walker._assign,
    nodes.AssignBlock: _Walker._assign_block,
    nodes.Macro: _Walker._macro,
    nodes.Scope: _Walker._scope,
    nodes.ExprStmt: _Walker._expression_statement,
    nodes.Break: _Walker._break,
    nodes.Continue: _Walker._continue,
}
_EXPRESSIONS: dict[type, Callable[..., Any]] = {
    nodes.Const: _Walker._const,
    nodes.TemplateData: _Walker._template_data,
    nodes.Name: _Walker._name,
    nodes.List: _Walker._list,
    nodes.Tuple: _Walker._list,
    nodes.Dict: _Walker._dict,
    nodes.Getattr: _Walker._getattr,
    nodes.Getitem: _Walker._getitem,
    **dict.fromkeys(_ARITHMETIC, _Walker._binary),
    nodes.Not: _Walker._unary,
    nodes.Neg: _Walker._unary,
    nodes.And: _Walker._and,
    nodes.Or: _Walker._or,
    nodes.Concat: _Walker._concat,
    nodes.Compare: _Walker._compare,
    nodes.CondExpr: _Walker._conditional,
    nodes.Test: _Walker._test,
    nodes.Filter: _Walker._filter,
    nodes.Call: _Walker._call,
}
