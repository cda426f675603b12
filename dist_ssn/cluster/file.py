"""Cluster files: YAML text to a `Cluster` and back. A file can be anybody's: it is plain data, small, and runs nothing."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from dist_ssn.checked import Key, check, flat, keys_of, one_sentence, schema_of, shown, unknown_key
from dist_ssn.cluster.types import Cluster, Rendezvous
from dist_ssn.errors import ClusterError
from dist_ssn.safe_yaml import Kind, parse_yaml, read_yaml, to_yaml

KIND = Kind("cluster files", ClusterError, most_depth=3)  # what is deeper could only be nonsense
_ORDER = (
    *("nodes", "processes_per_node", "launcher", "interface", "image", "emulated", "delay_ms", "loss_percent"),
    *("rendezvous", "environment", "within", "between"),
)
_MAY_BE_NULL = ("interface", "image", "rendezvous", "environment")


def cluster_keys() -> tuple[Key, ...]:
    """Every key of a cluster file, in the order of its fields."""
    return keys_of(Cluster)


def cluster_schema() -> dict[str, Any]:
    """JSON schema of a cluster file, with which an editor completes and checks it."""
    schema = schema_of(Cluster)
    del schema["properties"]["name"]
    schema["required"] = ["nodes", "processes_per_node"]  # a link that no process uses may be left out
    return schema


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
        ClusterError: names every mistake with its file and key, and what would be right.
    """
    path = _find(path_or_name)
    return _cluster(read_yaml(path, KIND), str(path))


def cluster_from_yaml(text: str, source: str = "cluster.yaml") -> Cluster:
    """The cluster in a YAML text.

    Raises:
        ClusterError: names `source`, and every mistake with its key, and what would be right.
    """
    return _cluster(parse_yaml(text, source, KIND), source)


def cluster_to_yaml(cluster: Cluster, comment: str = "") -> str:
    """A cluster as YAML text, which `cluster_from_yaml` reads back; the lines of `comment` come first, each after a `# `."""
    values = dataclasses.asdict(cluster)  # pyright: ignore[reportArgumentType]
    defaults = {key.name: key.default for key in cluster_keys()}
    content = {name: value for name in _ORDER if (value := values[name]) and value != defaults.get(name)}
    content |= {"launcher": cluster.launcher, "interface": cluster.interface}
    if cluster.rendezvous == Rendezvous():
        del content["rendezvous"]
    for link, other, alone in (("within", "between", cluster.processes_per_node), ("between", "within", cluster.nodes)):
        if alone == 1 and content.get(link) == content.get(other):
            del content[link]  # no process uses it, and reading makes it like the other one
        else:
            content[link] = {key: int(x) if x == int(x) else x for key, x in content[link].items()}
    text = to_yaml({name: content[name] for name in _ORDER if name in content})
    return "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines()) + text


def _cluster(content: Any, source: str) -> Cluster:
    if not isinstance(content, dict):
        raise ClusterError(
            f"{source}: a cluster is a dict of keys and values, such as 'nodes: 4', got {shown(content)}"
        )
    leaves = flat(Cluster, content)
    leaves = {key: value for key, value in leaves.items() if value is not None or key not in _MAY_BE_NULL}
    named = "name" in leaves  # the name is the file's
    leaves.pop("name", None)
    # A link that no process uses may be left out; it is then taken to be like the other one.
    left_out = [
        link
        for link, alone in (("within", "processes_per_node"), ("between", "nodes"))
        if leaves.get(alone) == 1 and not any(key.partition(".")[0] == link for key in leaves)
    ]
    other = "between" if "within" in left_out else "within"
    of_other = {key.removeprefix(other): value for key, value in leaves.items() if key.startswith(other)}
    cluster, problems = check(Cluster, leaves | {link + key: x for link in left_out for key, x in of_other.items()})
    problems = {key: problem for key, problem in problems.items() if key.partition(".")[0] not in left_out}
    if len(left_out) == 2:
        link = "such as within: {latency_us: 50, bandwidth_mbit: 9000}"
        problems["within"] = f"within is missing: a cluster has at least one link, {link}"
    if named:
        problems["name"] = unknown_key("name", [key.name for key in cluster_keys()])
    if any(
        problem.startswith("unknown key") for problem in problems.values()
    ):  # what is missing may be there, misspelt
        problems = {key: problem for key, problem in problems.items() if " is missing: " not in problem}
    if cluster is None or problems:
        raise ClusterError(f"{source}: {one_sentence(list(problems.values()))}")
    return dataclasses.replace(cluster, name=Path(source).stem)  # pyright: ignore[reportArgumentType]


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    name, bundled = os.fspath(path_or_name), bundled_clusters()
    path = Path(name)
    if name in bundled and "/" not in name:
        return bundled[name]
    if path.is_file():
        return path
    problem = "is not a file" if path.exists() else f"does not exist in {Path.cwd()}"
    raise ClusterError(f"the cluster {name!r} {problem}; the built-in ones are {', '.join(bundled)}")
