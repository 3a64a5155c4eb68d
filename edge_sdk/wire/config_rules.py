"""Strict reading of a TOML text into a frozen struct: the rules both roles' settings obey.

Knows TOML, field types and their ranges. Does not know files, folders or any single setting.

Every complaint names the source (usually a file), the dotted key, the value found, what is allowed
and, for an unknown key, the nearest valid name. Each field of a config struct carries its unit and
reason in `Meta(description=...)`; `template` writes them out as a commented file.
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from edge_sdk.errors import ConfigError

MAX_LINE_CHARS = 4096
"""A key of 5,000 dots is 10 KB of text and 100 MB in the parser; a line bounds a key."""

C = TypeVar("C", bound=msgspec.Struct)
NOTHING: Mapping[str, object] = {}


def parse_toml(
    text: str, cls: type[C], source: str, *, overrides: Mapping[str, object] = NOTHING
) -> C:
    """Return `cls` filled from TOML `text`; `overrides` (dotted key -> value) win over the text.

    An override given as a string is read as the field's own type, so `{"train.rank": "8"}` works
    for numbers, switches and lists; other values are taken as they are.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type, a value out of range, a missing key.
    """
    if any(len(line) > MAX_LINE_CHARS for line in text.splitlines()):
        raise ConfigError(f"{source} has a line of more than {MAX_LINE_CHARS} characters")
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{source} is not valid TOML: {exc}") from exc
    for key, value in overrides.items():
        _override(table, cls, key, value)
    _check_table(table, cls, source, prefix="")
    try:
        return msgspec.convert(table, cls, strict=True)
    except msgspec.ValidationError as exc:  # a rule over several fields (__post_init__)
        raise ConfigError(f"{source}: {exc}") from exc


def parse_overrides(arguments: Sequence[str]) -> dict[str, object]:
    """Return `{"train.rank": "8"}` for `["--train.rank=8"]`; keys are checked by `parse_toml`.

    Raises:
        ConfigError: an argument that is not `--section.key=value`.
    """
    found: dict[str, object] = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or "." not in key:
            raise ConfigError(f"{argument!r} is not an override; write --section.key=value")
        found[key] = value
    return found


def template(cls: type[msgspec.Struct], values: Mapping[str, object] = NOTHING) -> str:
    """Return a commented TOML of `cls`: each key with its description, default and range.

    Keys named in `values` (dotted) are set; the others stay as comments showing their defaults.
    """
    lines: list[str] = []
    for name, field in _fields(cls).items():
        section, _ = _plain(field.type)
        if not isinstance(section, inspect.StructType):
            continue
        lines += [f"[{name}]"]
        for key, item in _fields(section.cls).items():
            kind, description = _plain(item.type)
            lines += [f"# {description} Allowed: {_allowed(kind)}."]
            dotted = f"{name}.{key}"
            if dotted in values:
                lines += [f"{key} = {_toml(values[dotted])}"]
            else:
                lines += [f"# {key} = {_toml(_default(item))}"]
        lines += [""]
    return "\n".join(lines)


def _override(table: dict[str, Any], cls: type[msgspec.Struct], key: str, value: object) -> None:
    *sections, last = key.split(".")
    field_type: inspect.Type = inspect.type_info(cls)
    for part in [*sections, last]:
        known = _fields(field_type.cls) if isinstance(field_type, inspect.StructType) else {}
        if part not in known:
            raise ConfigError(f"override --{key}: unknown key {part!r}{_nearest(part, known)}")
        field_type, _ = _plain(known[part].type)
    if isinstance(value, str) and not isinstance(
        field_type, (inspect.StrType, inspect.LiteralType)
    ):
        try:
            value = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError as exc:
            allowed = _allowed(field_type)
            raise ConfigError(f"override --{key}: {value!r} is not {allowed}") from exc
    inner = table
    for part in sections:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override --{key}: {part!r} is a value in the file, not a section")
    inner[last] = value


def _check_table(
    table: Mapping[str, Any], cls: type[msgspec.Struct], source: str, prefix: str
) -> None:
    fields = _fields(cls)
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(f"{source}: unknown key {prefix + key!r}{_nearest(key, fields)}")
        kind, _ = _plain(fields[key].type)
        if isinstance(kind, inspect.StructType):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {prefix + key!r} must be a section [{prefix + key}]")
            _check_table(value, kind.cls, source, prefix=f"{prefix}{key}.")
        else:
            _check_value(value, fields[key], cls, f"{source}: {prefix + key!r}")
    for key, field in fields.items():
        if field.required and key not in table:
            kind, _ = _plain(field.type)
            raise ConfigError(f"{source}: {prefix + key!r} is missing; give {_allowed(kind)}")


def _check_value(value: object, field: inspect.Field, cls: type, where: str) -> None:
    kind, _ = _plain(field.type)
    hint = msgspec.structs.fields(cls)
    annotated = next(item.type for item in hint if item.encode_name == field.encode_name)
    try:
        # strict: a TOML integer is welcome where a float is meant, nothing else is converted
        msgspec.convert(value, annotated, strict=True)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where} is {value!r}; allowed: {_allowed(kind)}") from exc


def _fields(cls: type) -> dict[str, inspect.Field]:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return {field.encode_name: field for field in info.fields}


def _plain(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """The type without its metadata wrapper, and the wrapper's description."""
    description = ""
    while isinstance(kind, inspect.Metadata):
        description = str((kind.extra_json_schema or {}).get("description", description))
        kind = kind.type
    return kind, description


def _nearest(key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(sorted(known)) or 'nothing'}"


def _allowed(kind: inspect.Type) -> str:
    kind, _ = _plain(kind)
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
        return noun + _range(kind)
    if isinstance(kind, inspect.StrType):
        return "text" + (f" matching {kind.pattern}" if kind.pattern else "") + _length(kind)
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.LiteralType):
        return "one of " + ", ".join(repr(value) for value in kind.values)
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType)):
        return f"a list, each {_allowed(kind.item_type)}{_length(kind)}"
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_allowed(item) for item in kind.types)
    return type(kind).__name__.removesuffix("Type").lower()


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    signs = ((">=", kind.ge), (">", kind.gt), ("<=", kind.le), ("<", kind.lt))
    bounds = [f"{sign} {bound}" for sign, bound in signs if bound is not None]
    return (" " + " and ".join(bounds)) if bounds else ""


def _length(kind: inspect.StrType | inspect.VarTupleType | inspect.ListType) -> str:
    if kind.min_length and kind.max_length:
        return f" ({kind.min_length} to {kind.max_length} long)"
    if kind.min_length:
        return " (not empty)" if kind.min_length == 1 else f" (at least {kind.min_length} long)"
    return f" (at most {kind.max_length} long)" if kind.max_length else ""


def _default(field: inspect.Field) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return "" if field.default is msgspec.NODEFAULT else field.default


def _toml(value: object) -> str:
    # JSON's strings, numbers, switches and arrays are all valid TOML values.
    return msgspec.json.encode(value).decode()
