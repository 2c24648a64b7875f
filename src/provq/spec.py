"""A mapping with a `kind` becomes an object: the signature of the constructor is the schema.

`checked` guards a constructor, so that a wrong value meets the same sentence from Python as from a recipe;
`build` makes an object out of a mapping, and `describe` makes the mapping out of the object again.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from provq.errors import UsageError, nearest

Parameters = ParamSpec("Parameters")
Built = TypeVar("Built")


def checked(init: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Make a constructor hold its arguments against its own annotations, types and bounds.

    Lists are taken for tuples, whole numbers for floats; nothing else is converted.

    Raises:
        UsageError: When the constructor is called with a value that its annotation does not allow.
    """

    @wraps(init)
    def checking(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        bound = inspect.signature(init).bind(*args, **kwargs)
        owner = type(args[0]).__name__
        for name, value in bound.arguments.items():
            bound.arguments[name] = _validated(init, name, value, where=owner)
        init(*bound.args, **bound.kwargs)

    return checking


def build(
    spec: object,
    table: Mapping[str, type[Built]],
    *,
    where: str,
    local: bool = False,
    **given: object,
) -> Built:
    """Make the object that a mapping describes: `kind` names its class, the other keys are arguments.

    An argument that is such a mapping itself, or a list of them, is made out of the same table.

    Args:
        spec: The mapping.
        table: The classes that `kind` may name.
        where: The place of the mapping in the recipe, for error sentences.
        local: Whether `kind` may also be `package.module:Class`, of the base class of those in the table; never for
            anything that was downloaded.
        given: Arguments that come from the surroundings and that the mapping may not hold.

    Raises:
        UsageError: Unknown kind, unknown or missing key, wrong type, or a value out of bounds.
    """
    if not isinstance(spec, Mapping):
        raise UsageError(f"{where}: expected a mapping with the key 'kind', got {spec!r}")
    if "kind" not in spec:
        raise UsageError(f"{where}: the key 'kind' is missing; known kinds: {', '.join(sorted(table))}")
    kind = spec["kind"]
    if not isinstance(kind, str):
        raise UsageError(f"{where}.kind: expected a name, got {kind!r}; known: {', '.join(sorted(table))}")
    if kind in table:
        made_by = table[kind]
    elif local and ":" in kind:
        made_by = _imported(kind, table, where=f"{where}.kind")
    else:
        raise UsageError(f"{where}.kind: unknown kind {kind!r}; {nearest(kind, table)}")
    arguments = {
        key: _built(value, table, where=f"{where}.{key}", local=local) for key, value in spec.items() if key != "kind"
    }
    fitted = fitting(made_by, arguments, where=where, given=given)
    try:
        return made_by(**fitted)
    except UsageError as error:  # a rule between arguments, which the signature cannot state
        raise UsageError(f"{where}: {error}") from None


def fitting(
    call: Callable[..., object],
    arguments: Mapping[str, object],
    *,
    where: str,
    given: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """The arguments of a call, held against its signature, together with those `given` that it takes.

    Raises:
        UsageError: An argument is unknown, missing, of the wrong type or out of bounds.
    """
    function = _function(call)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    surroundings = {name: value for name, value in (given or {}).items() if name in parameters}
    open_to_recipes = parameters.keys() - surroundings.keys()
    values = dict(surroundings)
    for name, value in arguments.items():
        if name not in open_to_recipes:
            raise UsageError(f"{where}.{name}: unknown key; {nearest(str(name), open_to_recipes)}")
        values[name] = _validated(function, name, value, where=where)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in values:
            raise UsageError(f"{where}: the key {name!r} is missing")
    return values


def describe(thing: object, table: Mapping[str, type]) -> dict[str, object]:
    """The mapping from which `build` makes an equal object.

    It is read from the attributes that carry the names of the constructor's arguments; what the surroundings
    give is described too, and `build` replaces it. An argument of the same family is described in its turn.

    Raises:
        UsageError: The class keeps an argument under another name, so that it cannot be written down.
    """
    kinds = {made_by: kind for kind, made_by in table.items()}
    kind = kinds.get(type(thing), f"{type(thing).__module__}:{type(thing).__qualname__}")
    spec: dict[str, object] = {"kind": kind}
    for name in inspect.signature(type(thing)).parameters:
        if not hasattr(thing, name):
            raise UsageError(f"{type(thing).__name__} keeps no attribute {name!r}, so it cannot be saved")
        value = getattr(thing, name)
        spec[name] = _described(value, table)
    return spec


def _built(value: object, table: Mapping[str, type[Built]], *, where: str, local: bool) -> object:
    if isinstance(value, Mapping) and "kind" in value:
        return build(value, table, where=where, local=local)
    if isinstance(value, list | tuple):
        return [_built(part, table, where=f"{where}.{place}", local=local) for place, part in enumerate(value)]
    return value


def _described(value: object, table: Mapping[str, type]) -> object:
    if isinstance(value, tuple):
        return [_described(part, table) for part in value]
    family = next(iter(table.values())).__bases__[0]
    return describe(value, table) if isinstance(value, family) else value


def _imported(kind: str, table: Mapping[str, type[Built]], *, where: str) -> type[Built]:
    base = next(iter(table.values())).__bases__[0]  # every class is abstract or final
    module_name, _, class_name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"{where}: cannot import {kind!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"{where}: {kind!r} is not a {base.__name__}")
    if inspect.isabstract(found):
        raise UsageError(f"{where}: {kind!r} is abstract; name a class that says how everything is done")
    return cast(type[Built], found)


def _function(call: Callable[..., object]) -> Callable[..., object]:
    init = call.__init__ if isinstance(call, type) else call  # type: ignore[misc]  # read, not called
    return cast(Callable[..., object], inspect.unwrap(init))


@cache
def _adapter(function: Callable[..., object], name: str) -> TypeAdapter[Any] | None:
    annotation = get_type_hints(function, include_extras=True).get(name)
    if annotation is None:
        return None
    try:
        # What is no plain value, such as a module, must be an instance of what the annotation names.
        return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return None


def _tuples(value: object) -> object:
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value


def _validated(function: Callable[..., object], name: str, value: object, *, where: str) -> object:
    adapter = _adapter(_function(function), name)
    if adapter is None:
        return _tuples(value)
    try:
        return adapter.validate_python(_tuples(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([where, name, *(str(part) for part in first["loc"] if isinstance(part, int))])
        message = f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
        if first["type"] == "literal_error" and isinstance(first["input"], str):
            choices = re.findall("'([^']*)'", first["ctx"]["expected"])
            message += f"; {nearest(first['input'], choices)}"
        raise UsageError(message) from None
