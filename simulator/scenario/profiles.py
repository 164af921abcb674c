"""Find, read and write the shipped profiles: models, accelerators, hosts, fabrics, clusters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from simulator.errors import ProfileError, nearest
from simulator.files import write_atomically
from simulator.scenario.cluster import Accelerator, Cluster, Fabric, Host
from simulator.scenario.facts import Facts, Frozen, Source
from simulator.scenario.hf_config import model_from_hf
from simulator.scenario.model import Model
from simulator.scenario.part import Part

T = TypeVar("T", bound=Frozen)


def profile_root() -> Path:
    """Return the folder of the shipped profiles: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next((p for p in (package / "hardware_profiles", package.parent / "hardware_profiles") if p.is_dir()), package)


def read_text(path: str | Path) -> str:
    """Return the text of a file; a ProfileError says that it is missing, empty or binary."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ProfileError(f"{path} is not a text file; expected YAML or JSON in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ProfileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise ProfileError(f"{path} is empty")
    return text


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML lets win silently."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    twice = sorted({str(k) for k in keys if keys.count(k) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"key {', '.join(twice)} is given twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


#: keys whose value may be the path of a profile
_MAY_BE_PATH = ("model", "cluster", "accelerator", "host", "fabric", "base")


def _beside(data: Any, folder: Path) -> Any:
    """Return `data` with the paths of profiles taken from `folder`, where a file stands there."""
    if not isinstance(data, dict):
        return data
    found = {}
    for key, value in data.items():
        named = key in _MAY_BE_PATH and isinstance(value, str) and value.endswith((".yaml", ".yml", ".json"))
        found[key] = str(folder / value) if named and _is_file(folder / value) else _beside(value, folder)
    return found


def _is_file(path: Path) -> bool:
    """Return whether `path` is a file; a text that cannot be a path is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; a path of a profile in it is looked for beside the file first.

    Raises
    ------
    ProfileError
        When the file is missing, empty, binary, not YAML or not a mapping.
    """
    text = read_text(path)
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path} must hold 'key: value' lines; found {type(data).__name__}")
    return _beside(data, Path(path).parent)


def save_yaml(data: dict[str, Any], path: str | Path) -> None:
    """Write a mapping as YAML, atomically."""
    write_atomically(path, lambda file: yaml.safe_dump(data, file, sort_keys=False, width=120))


def validated(cls: type[T], data: Any, where: str) -> T:
    """Return ``cls`` made from `data`, or one ProfileError that starts with `where` and lists every key that does not fit."""
    try:
        return cls.model_validate(data)
    except ProfileError as error:
        raise ProfileError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Catalogue:
    """The shipped profiles of one kind, by name.

    Parameters
    ----------
    kind : str
        Singular word used in messages.
    folder : str
        Folder below the profile root.
    suffix : str
        File ending, ``.yaml`` or ``.json``.
    build : callable
        ``build(data, name, where)`` makes the object from the file's mapping.
    type : type
        Class of the objects.
    """

    kind: str
    folder: str
    suffix: str
    build: Callable[[dict, str, str], Any]
    type: type

    def names(self) -> list[str]:
        """Return the shipped names, sorted."""
        return list(_names(self))

    def load(self, name: str | Path) -> Any:
        """Return the profile of a shipped name or at a path.

        Raises
        ------
        ProfileError
            When there is no such name or file, with the nearest names.
        """
        return _load(self, str(name)) if name in self.names() else _read(self, Path(name))

    def resolve(self, value: Any) -> Any:
        """Return the object for a name, a path, a full table, or a table with ``base`` and what differs."""
        if isinstance(value, self.type):
            return value
        if isinstance(value, str | Path):
            return self.load(value)
        if not isinstance(value, dict):
            raise ProfileError(f"{self.kind}: give a name, a path or a table; found {value!r}")
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise ProfileError(f"{self.kind}: keys must be text; found {strange[0]!r}")
        if "base" not in value:
            return self.build(value, str(value.get("name", self.kind)), self.kind)
        changes = {k: v for k, v in value.items() if k != "base"}
        base = self.resolve(value["base"])
        for key, change in changes.items():  # a partial table of a part means: as before, but
            part = getattr(base, key, None)
            if isinstance(part, Facts) and isinstance(change, dict) and not change.keys() & {"base", "sources"}:
                changes[key] = {"base": part, **change}
        data = _merged(base.model_dump(mode="json"), changes)
        if "name" not in changes:
            data["name"] = f"{base.name} with {', '.join(sorted(changes))}"
        if isinstance(base, Facts) and "sources" not in changes:
            data["sources"] = _resourced(base, changes)
        return validated(self.type, parts(data) if self.type is Cluster else data, f"{self.kind} {data['name']}")


def _merged(base: dict, changes: dict) -> dict:
    """Return `base` with `changes`, tables merged key by key; a profile given by name replaces the table."""
    both = {
        k: _merged(base[k], v) if isinstance(base.get(k), dict) and isinstance(v, dict) and "base" not in v else v
        for k, v in changes.items()
    }
    return base | both


def _resourced(base: Facts, changes: dict) -> list[dict]:
    """Return the sources of `base`, and the user as the source of what `changes` replaces."""

    def leaves(prefix: str, value: Any) -> list[str]:
        if isinstance(value, dict):
            return [leaf for key, item in value.items() for leaf in leaves(f"{prefix}.{key}", item)]
        return [prefix]

    given = [leaf for key, value in changes.items() for leaf in leaves(key, value)]
    numbers = base.numbers()
    given = [g for g in given if g in numbers or any(n.startswith(g + ".") for n in numbers)]
    kept = [s.model_copy(update={"facts": tuple(f for f in s.facts if f not in given)}) for s in base.sources]
    user = Source(grade="assumed", source="given by the user in place of the shipped fact", facts=tuple(given), date="undated")
    return [s.model_dump() for s in [*kept, *([user] if given else [])] if s.facts]


@cache
def _names(catalogue: Catalogue) -> tuple[str, ...]:
    """Return the shipped names, sorted; they do not change while the program runs."""
    return tuple(sorted(p.stem for p in (profile_root() / catalogue.folder).glob(f"*{catalogue.suffix}")))


@cache
def _load(catalogue: Catalogue, name: str) -> Any:
    """Return a shipped profile; those do not change while the program runs, files of the user may."""
    return _read(catalogue, profile_root() / catalogue.folder / f"{name}{catalogue.suffix}")


def _read(catalogue: Catalogue, path: Path) -> Any:
    if not _is_file(path):
        looks_like_path = len(path.parts) > 1 or path.suffix in (".json", ".yaml", ".yml")
        remedy = "no such file" if looks_like_path else nearest(str(path), catalogue.names())
        raise ProfileError(f"unknown {catalogue.kind} {str(path)!r}; {remedy}")
    if path.suffix == ".json":
        try:
            data = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{path} is not JSON: {error}") from None
    else:
        data = read_yaml(path)
    default = path.absolute().parent.name if path.name == "config.json" else path.stem
    return catalogue.build(data, default, str(path))


def _build_model(data: dict, name: str, where: str) -> Model:
    if not isinstance(data, dict):
        raise ProfileError(f"{where} must hold a JSON object; found {type(data).__name__}")
    if "hidden" in data:
        return validated(Model, data, where)
    source = data.get("_source", where)
    return model_from_hf({k: v for k, v in data.items() if not k.startswith("_")}, data.get("_name", name), source)


def _build(cls: type[T]) -> Callable[[dict, str, str], T]:
    return lambda data, name, where: validated(cls, {"name": name} | data, where)


ACCELERATORS = Catalogue("accelerator", "accelerators", ".yaml", _build(Accelerator), Accelerator)
HOSTS = Catalogue("host", "hosts", ".yaml", _build(Host), Host)
FABRICS = Catalogue("fabric", "fabrics", ".yaml", _build(Fabric), Fabric)
PARTS = Catalogue("part", "parts", ".yaml", _build(Part), Part)
MODELS = Catalogue("model", "models", ".json", _build_model, Model)


def parts(data: dict) -> dict:
    """Return a cluster table with its accelerator, host and fabric looked up."""
    data = dict(data)
    for key, catalogue in (("accelerator", ACCELERATORS), ("host", HOSTS), ("fabric", FABRICS)):
        if key in data:
            data[key] = catalogue.resolve(data[key])
    return data


CLUSTERS = Catalogue("cluster", "clusters", ".yaml", lambda d, n, w: validated(Cluster, {"name": n} | parts(d), w), Cluster)


def described(catalogue: Catalogue, value: Any) -> Any:
    """Return the shipped name of `value`, or the whole of it as a table when it is not a shipped one."""
    if value.name in catalogue.names() and catalogue.load(value.name) == value:
        return value.name
    return value.model_dump(mode="json")
