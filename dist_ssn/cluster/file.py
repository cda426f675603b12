"""Cluster files: YAML text to a `Cluster` and back. A file can be anybody's: it is plain data, small, and runs nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dist_ssn.cluster.check import problems_of
from dist_ssn.cluster.types import Cluster, Link, Rendezvous
from dist_ssn.errors import ClusterError

MAX_BYTES = 65_536
_ORDER = (
    *("nodes", "processes_per_node", "launcher", "interface", "image", "emulated", "delay_ms", "loss_percent"),
    *("rendezvous", "environment", "within", "between"),
)
MAX_DEPTH = 3  # of dicts and lists; deeper ones could only be nonsense


def bundled_clusters() -> dict[str, Path]:
    """The clusters that come with this package: name without ending → file.

    In a wheel they lie inside the package; in a clone in the top-level folder `clusters/`.
    """
    package = Path(__file__).parent.parent
    folders = (package / "clusters", package.parent / "clusters")
    folder = next((folder for folder in folders if (folder / "local.yaml").is_file()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_cluster(path_or_name: str | os.PathLike[str]) -> Cluster:
    """Reads a cluster file.

    Args:
        path_or_name: a YAML file; a name without slash and ending is one of the bundled clusters.

    Raises:
        ClusterError: one sentence that names every mistake with its file and key, and what would be right.
    """
    path = _find(path_or_name)
    return cluster_from_yaml(_read(path), str(path))


def cluster_from_yaml(text: str, source: str = "cluster.yaml") -> Cluster:
    """The cluster in a YAML text. Raises: ClusterError, whose sentence names `source`."""
    content = _plain(text, source)
    problems = problems_of(content)
    if len(problems) == 1:
        raise ClusterError(f"{source}: {problems[0]}")
    if problems:
        numbered = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        raise ClusterError(f"{source}: {len(problems)} problems: {numbered}")
    values = {name: value for name, value in content.items() if value is not None}
    links = {name: Link(**values.pop(name)) for name in ("within", "between") if name in values}
    # A link that no process uses may be left out; it is then taken to be like the other one.
    either = next(iter(links.values()))
    rendezvous = {name: value for name, value in values.pop("rendezvous", {}).items() if value is not None}
    return Cluster(
        within=links.get("within", either),
        between=links.get("between", either),
        rendezvous=Rendezvous(**rendezvous),
        name=Path(source).stem,
        **values,
    )


def cluster_to_yaml(cluster: Cluster, comment: str = "") -> str:
    """A cluster as YAML text, which `cluster_from_yaml` reads back; the lines of `comment` come first, each after a `# `."""
    values = dataclasses.asdict(cluster)
    defaults = {field.name: field.default for field in dataclasses.fields(Cluster)}
    content = {name: value for name in _ORDER if (value := values[name]) and value != defaults[name]}
    content |= {"launcher": cluster.launcher, "interface": cluster.interface}
    if cluster.rendezvous == Rendezvous():
        del content["rendezvous"]
    for link, other, alone in (("within", "between", cluster.processes_per_node), ("between", "within", cluster.nodes)):
        if alone == 1 and content.get(link) == content.get(other):
            del content[link]  # no process uses it, and reading makes it like the other one
        else:
            content[link] = {key: int(x) if x == int(x) else x for key, x in content[link].items()}
    content = {name: content[name] for name in _ORDER if name in content}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + text


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    name, bundled = os.fspath(path_or_name), bundled_clusters()
    path = Path(name)
    if name in bundled and "/" not in name:
        return bundled[name]
    if path.is_file():
        return path
    problem = "is not a file" if path.exists() else f"does not exist in {Path.cwd()}"
    raise ClusterError(f"the cluster {name!r} {problem}; the built-in ones are {', '.join(bundled)}")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise ClusterError(f"{path}: a cluster file has at most {MAX_BYTES} bytes, and this one is larger")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ClusterError(f"{path}: this is not a text file in UTF-8") from None


def _plain(text: str, source: str) -> Any:
    """YAML text as dicts, texts and numbers alone.

    Anchors, aliases (a small file can stand for a huge one), tags and depth are refused before anything is built.
    """
    try:
        for problem, line in _forbidden(text):
            raise ClusterError(f"{source}, line {line + 1}: {problem}")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ClusterError(f"{source}{line}: this is not valid YAML ({error.problem})") from None
    except yaml.YAMLError:  # control characters
        raise ClusterError(f"{source}: this is not a text file in UTF-8") from None
    except ClusterError:
        raise
    except ValueError as error:  # a date such as 2024-99-99, a number of more than 4,300 digits
        raise ClusterError(f"{source}: this has a value that cannot be read ({str(error)[:80]})") from None


def _forbidden(text: str) -> Iterator[tuple[str, int]]:
    """What a cluster file may not have in it, with its line."""
    keys: list[set[str] | None] = []  # of the open dicts; None for a list
    is_key: list[bool] = []  # whether the next value in each is a key
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            yield "anchors and aliases are not for cluster files: write the value again", line
        if tag := getattr(event, "tag", None):
            yield f"the tag {str(tag)[:60]} is not for cluster files: leave it out", line
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            keys.pop()
            is_key.pop()
        elif isinstance(event, yaml.NodeEvent) and keys and keys[-1] is not None:
            if is_key[-1] and not isinstance(event, yaml.ScalarEvent):
                yield "a key must be a name", line
            if is_key[-1] and isinstance(event, yaml.ScalarEvent):
                if event.value in keys[-1]:
                    yield f"the key {event.value[:80]!r} is there twice", line
                keys[-1].add(event.value)
            is_key[-1] = not is_key[-1]
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            keys.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            is_key.append(True)
            if len(keys) > MAX_DEPTH:
                yield f"dicts and lists are nested more than {MAX_DEPTH} deep", line
