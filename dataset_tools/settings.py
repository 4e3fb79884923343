"""What every settings model shares: unknown keys are refused with the nearest known one, YAML is read once."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dataset_tools.errors import UserError
from dataset_tools.storage import open_root


class Settings(BaseModel):
    """Base of all settings models: immutable, unknown keys forbidden, field docstrings are descriptions."""

    # A refused value may be a secret in the wrong place: no message repeats it.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: Any) -> Any:
        """Pydantic takes what YAML reads as a boolean for 0 or 1."""
        faults = [
            InitErrorDetails(
                type=PydanticCustomError("boolean", f"YAML reads this as {str(value).lower()}, which it cannot be"),
                loc=place,
                input=value,
            )
            for name, given in (values.items() if isinstance(values, dict) else ())
            if name in cls.model_fields
            for place, value in _misread(given, cls.model_fields[name].annotation, (name,))
        ]
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return values

    @model_validator(mode="after")
    def _kind_is_set(self) -> Self:
        """By it the models of a union are told apart, also where it was left to its default."""
        if "kind" in type(self).model_fields:
            self.model_fields_set.add("kind")
        return self

    @classmethod
    def check(cls, values: dict[str, Any], *, origin: str) -> Self:
        """Validate ``values``; raise a one-line `UserError` that names ``origin``, the field and the cure."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{origin}: {'; '.join(_complaints(cls, error))}") from None

    @classmethod
    def load(cls, given: Self | str | Path, changes: dict[str, Any] | None = None) -> Self:
        """Settings that are given, or those of a YAML file; ``changes`` (dotted key to value) over them; validated.

        Args:
            given: the settings, or any place (`dataset_tools.storage`) of a file of them.

        Raises:
            UserError: the file is missing, is not YAML, or holds a wrong or unknown key.
        """
        origin = "settings" if isinstance(given, cls) else str(given)
        # Without what was left to its default: of some settings it matters whether they were set.
        values = given.model_dump(exclude_unset=True) if isinstance(given, cls) else _read(origin)
        for dotted, value in (changes or {}).items():
            *parents, leaf = dotted.split(".")
            place = values
            for parent in parents:
                if place.get(parent) is None:
                    place[parent] = {}
                place = place[parent]
                if not isinstance(place, dict):
                    raise UserError(f"{dotted}: {parent!r} is not a group of settings in {origin}")
            place[leaf] = value
        return cls.check(values, origin=origin)

    def digest(self) -> str:
        """sha256 (hex) of the settings as canonical JSON: equal settings, equal digest."""
        return digest_of(self.model_dump(mode="json"))


def _read(path: str) -> dict[str, Any]:
    filesystem, file = open_root(path)
    try:
        values = read_yaml(filesystem.cat_file(file).decode("utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"settings file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"settings file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"settings file {path} is not valid YAML: {_place_in_yaml(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"settings file {path} must hold a mapping, not a {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """Of two equal keys YAML forbids and its library takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As it is, but no key may stand twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What a text of YAML holds, of plain kinds. Raises `yaml.YAMLError`."""
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # such as of the 30th of February
        raise yaml.MarkedYAMLError(problem=str(error)) from None


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON-compatible value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _place_in_yaml(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the line itself, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    return f"{what}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(what)


def _complaints(cls: type[BaseModel], error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in _named(cls, item["loc"])) or "settings"
        if item["type"] == "extra_forbidden":
            known = _known_fields(cls, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.0)
            hint = f", did you mean {near[0]!r}?" if near else ""
            lines.append(f"unknown setting {where!r}{hint}")
        elif item["type"] == "literal_error" and isinstance(item["input"], bool):
            lines.append(f"{where}: {item['msg']}; YAML reads a bare yes, no, on or off as a boolean: put it in quotes")
        elif isinstance(complaint := item.get("ctx", {}).get("error"), UserError):
            lines.append(f"{where}: {complaint}" if item["loc"] else str(complaint))
        else:
            lines.append(f"{where}: {item['msg']}")
    return lines


def _named(cls: type[BaseModel], place: tuple[int | str, ...]) -> list[int | str]:
    """A place as the file has it: pydantic adds the tag of a tagged union to the path, which names no field."""
    models: list[type[BaseModel]] = [cls]
    kept = []
    for part in place:
        fields = [model.model_fields[str(part)] for model in models if part in model.model_fields]
        tagged = [] if fields else [model for model in models if part in _tags(model)]
        models = tagged or [inner for field in fields for inner in _models_in(field.annotation)] or models
        if not tagged:
            kept.append(part)
    return kept


def _known_fields(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that stands at ``path`` below ``cls`` (through unions and lists)."""
    models: list[type[BaseModel]] = [cls]
    for part in path:
        found = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models_in(model.model_fields[str(part)].annotation)
        ]
        # A tagged union adds the tag itself to the path: that part names no field, and narrows the choice.
        models = found or [m for m in models if part in _tags(m)] or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _misread(value: Any, annotation: Any, place: tuple[int | str, ...]) -> list[tuple[tuple[int | str, ...], bool]]:
    """Booleans in ``value``, at any depth, with their places, where a number is to be and nothing else: what is no
    number refuses a boolean by itself."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _misread(value, parts[0], place)
    if origin in (Union, UnionType):
        found = [_misread(value, part, place) for part in parts if part is not NoneType]
        return found[0] if all(found) else []
    if origin is dict and isinstance(value, dict):
        return [one for key, inner in value.items() for one in _misread(inner, parts[1], (*place, key))]
    if origin in (list, tuple) and isinstance(value, list | tuple):
        each = parts if origin is tuple and Ellipsis not in parts else parts[:1] * len(value)
        pairs = enumerate(zip(value, each, strict=False))
        return [one for number, (inner, part) in pairs for one in _misread(inner, part, (*place, number))]
    return [(place, value)] if isinstance(value, bool) and annotation in (int, float) else []


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    return tuple(
        tag
        for field in model.model_fields.values()
        for tag in getattr(field.annotation, "__args__", ())
        if isinstance(tag, str)
    )
