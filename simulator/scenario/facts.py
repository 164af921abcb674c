"""Facts with their sources: the base of every hardware profile."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from simulator.errors import ProfileError, nearest

Grade = Literal["datasheet", "published", "measured", "fitted", "assumed"]
Fraction = Annotated[float, Field(gt=0, le=1)]


#: kind of pydantic error -> what the value must be; the other kinds say it themselves
_MUST_BE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "model_type": "a table of 'key: value'",
    "dict_type": "a table of 'key: value'",
    "tuple_type": "a list",
}


class Frozen(BaseModel):
    """A user-facing description: immutable, unknown keys refused; one ProfileError lists every key that does not fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _refusal(type(self), error) from None

    __init__.__pydantic_base_init__ = True  # the parts of a whole are validated with it, so that keys are named in full

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Return the description in a mapping, as calling the class does."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _refusal(cls, error) from None


def _refusal(cls: type[BaseModel], error: ValidationError) -> ProfileError:
    """Return the ProfileError that says ``key: what; found; remedy`` of every key that does not fit."""
    lines = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            known = _fields_at(cls, item["loc"][:-1])
            text = f"unknown key; {nearest(str(item['loc'][-1]), known)}" if known else "unknown key"
        elif item["type"] == "missing":
            text = "missing"
        elif item["type"] == "value_error":  # from a validator of ours
            text = item["msg"].removeprefix("Value error, ")
        else:
            must = _MUST_BE.get(item["type"])
            text = f"must be {must}" if must else item["msg"].replace("Input should be", "must be", 1)
            found = repr(item["input"])
            text += f"; found {found if len(found) <= 80 else found[:77] + '...'}"
        lines.append(f"{key}: {text}" if key else text)
    return ProfileError("; ".join(lines))


def _fields_at(cls: type[BaseModel], location: tuple) -> list[str]:
    for part in location:
        field = cls.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        cls = field.annotation
    return list(cls.model_fields)


class Source(Frozen):
    """Where a group of facts comes from.

    Parameters
    ----------
    grade : str
        ``datasheet``, ``published`` (measured by someone), ``measured`` (by our calibration), ``fitted`` or ``assumed``.
    source : str
        The document, with version or commit; for ``assumed`` the reasoning.
    facts : tuple of str
        Field names (``hbm_bytes``) or field and key (``gemm_efficiency.fp8``).
    date : str, optional
        When the fact held; every price carries one.
    """

    grade: Grade
    source: str = Field(min_length=3)
    facts: tuple[str, ...]
    date: str | None = None


def _groups(number: str) -> list[str]:
    """Return the names that a source may cite for all numbers below them: ``a`` and ``a.b`` of ``a.b.c``."""
    return [number[:at] for at, letter in enumerate(number) if letter == "."]


class Facts(Frozen):
    """A named set of facts; every number in it is covered by exactly one source."""

    name: str
    sources: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _every_number_has_a_source(self) -> Facts:
        numbers, cited = self.numbers(), Counter(fact for source in self.sources for fact in source.facts)
        groups = {number: _groups(number) for number in numbers}
        covered = {number: cited[number] or sum(cited[group] for group in of) for number, of in groups.items()}
        bare = sorted(number for number, times in covered.items() if not times)
        twice = sorted(number for number, times in covered.items() if times > 1)
        idle = sorted(cited.keys() - numbers.keys() - {group for of in groups.values() for group in of})
        if bare:
            raise ValueError(f"no source for {', '.join(bare)}; list them under sources[].facts")
        if twice:
            raise ValueError(f"two sources for {', '.join(twice)}; keep one")
        if idle:
            raise ValueError(f"sources name facts that are not here: {', '.join(idle)}")
        return self

    def numbers(self) -> dict[str, float]:
        """Return every number of this profile by its dotted name, in SI units."""
        found: dict[str, float] = {}

        def walk(prefix: str, value: Any) -> None:
            if isinstance(value, bool | str) or value is None or isinstance(value, Facts):
                return
            if isinstance(value, int | float):
                found[prefix] = value
            elif isinstance(value, dict):
                for key, item in value.items():
                    walk(f"{prefix}.{key}", item)
            elif isinstance(value, tuple):
                for item in value:
                    walk(f"{prefix}.{getattr(item, 'name', '')}".rstrip("."), item)
            elif isinstance(value, BaseModel):
                for key in type(value).model_fields:
                    walk(f"{prefix}.{key}", getattr(value, key))

        for field in type(self).model_fields:
            if field not in ("name", "sources"):
                walk(field, getattr(self, field))
        return found

    def provenance(self) -> list[dict[str, Any]]:
        """Return one row per number: profile, fact, value (SI), grade, source, date."""
        rows = []
        for fact, value in self.numbers().items():
            exact = [s for s in self.sources if fact in s.facts]
            wide = [s for s in self.sources if any(fact.startswith(f + ".") for f in s.facts)]
            source = (exact or wide)[0]
            rows.append(
                {
                    "profile": self.name,
                    "fact": fact,
                    "value": value,
                    "grade": source.grade,
                    "source": source.source,
                    "date": source.date,
                }
            )
        return rows


def choices(literal: Any) -> tuple[str, ...]:
    """Return the allowed texts of a Literal type."""
    return get_args(literal) if get_origin(literal) is Literal else ()
