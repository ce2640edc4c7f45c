"""The inventory of a site, and the Ray cluster YAML made from it.

    python -m cluster.laptop.inventory CLUSTER.yaml      makes CLUSTER.yaml from CLUSTER.inventory.yaml

The YAML is for Ray's own `ray up`, `ray down`, `ray exec` and `ray attach`. Our commands run the same
set-up and start commands, so that there is one description of a node.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from cluster import cli, files
from cluster import config as layered
from cluster.cli import UserError
from cluster.head.addresses import is_address
from cluster.laptop import commands
from cluster.laptop.keys import Inventory

HEADER = "# sha256 of all below: "
CODE = ("cluster", "optim", "training", "serving", "pyproject.toml", "constraints.txt")  # what nodes need


def beside(cluster: Path) -> Path:
    """The inventory of the Ray YAML `cluster`: x.inventory.yaml beside x.yaml.

    Raises `UserError`: it is not called so.
    """
    if not cluster.name.isprintable():  # it stands in the YAML
        raise UserError(f"{str(cluster)!r}: the name has characters that cannot be printed; rename it")
    if cluster.name.endswith(".inventory.yaml") or cluster.suffix != ".yaml":
        raise UserError(f"{cluster}: CLUSTER names a Ray YAML, such as cluster/mine.yaml")
    return cluster.with_name(f"{cluster.name.removesuffix('.yaml')}.inventory.yaml")


def load(cluster: Path) -> Inventory:
    """The inventory beside the Ray YAML `cluster`. Rewrites the YAML if the inventory has changed.

    Raises:
        ConfigError: a key of the inventory; the message begins with its file.
        UserError: there is no inventory, or the YAML was edited by hand.
    """
    file = beside(cluster)
    if not file.exists():
        raise UserError(
            f"{file}: no such file; CLUSTER names a Ray YAML, such as cluster/asuncion.yaml, beside whose "
            "inventory it lies; `make inventory CLUSTER=cluster/mine.yaml` makes both"
        )
    try:
        inventory = layered.load(Inventory, file=file)
    except layered.ConfigError as error:
        problem = str(error).removeprefix(f"{file}: ")
        raise layered.ConfigError(f"{file}{_line(file, problem)}: {problem}") from error
    _refresh(cluster, ray_yaml(inventory, origin=file.name))
    return inventory


def _line(file: Path, problem: str) -> str:
    """ ":7", the line of the key that a problem is about; empty if it stands in no line."""
    try:
        places = list(_places(yaml.compose(file.read_text())))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # the last: of an alias to what holds it
        return ""
    about = [
        (len(name), text != "" and text in problem, -line)
        for name, text, line in places
        if name and (re.match(rf"{re.escape(name)}(\[\d+\])?: ", problem) or f"key '{name}'" in problem)
    ]
    return f":{-max(about)[2]}" if about else ""


def _places(node: yaml.Node | None, name: str = "") -> Iterator[tuple[str, str, int]]:
    """(dotted key, its text if it has one, line) of every value of a YAML. A list's items have its key."""
    if isinstance(node, yaml.MappingNode):
        for each, value in node.value:
            inner = f"{name}.{each.value}".lstrip(".")
            yield inner, "", each.start_mark.line + 1
            yield from _places(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _places(item, name)
    elif node is not None:
        yield name, str(node.value), node.start_mark.line + 1


def _refresh(cluster: Path, text: str) -> None:
    old = cluster.read_text(encoding="utf-8") if cluster.exists() else None
    if old == text:
        return
    if old is not None:
        digest, _, body = old.partition("\n")
        if digest != f"{HEADER}{hashlib.sha256(body.encode()).hexdigest()}":
            raise UserError(
                f"{cluster}: edited by hand, and it is made from {beside(cluster).name}; move the change "
                f"there (or into cluster/laptop/inventory.py), delete {cluster} and run the command again"
            )
    files.write_text(cluster, text)


def ray_yaml(inventory: Inventory, *, origin: str) -> str:
    """The cluster YAML of `ray up`, with the digest of its text in the first line."""
    mounts = "".join(f'  "{inventory.code}/{name}": {name}\n' for name in CODE)
    workers = ", ".join(_text(node) for node in inventory.active if node != inventory.head)
    external = f"  external_head_ip: {_text(inventory.external_head)}\n" if inventory.external_head else ""
    body = f"""\
# The cluster for Ray's own launcher: `ray up cluster/asuncion.yaml`, from the root of the repository.
# Made from {origin}: edit that file, and this one is made again. `make up` does more: cluster/README.md.
{_beyond(inventory)}cluster_name: {_text(inventory.name)}

provider:
  type: local                     # on premise: these addresses, and no cloud
  head_ip: {_text(inventory.head)}
  worker_ips: [{workers}]
{external}
auth:
  ssh_user: {_text(inventory.ssh.user)}
  ssh_private_key: {_text(inventory.ssh.key)}   # Ray copies it to the head, to reach the workers

max_workers: {len(inventory.active) - 1}   # the least number too: Ray keeps all of provider.worker_ips
upscaling_speed: 1.0
idle_timeout_minutes: 525600      # never stop a worker: these machines are not rented

# Code only: no data, no checkpoints. `make up` sends what git tracks; this launcher sends whole folders.
file_mounts:
{mounts}rsync_exclude: ["__pycache__", ".*"]
rsync_filter: ["/.gitignore"]     # leaves out the names of keys; sends other files, tracked by git or not
file_mounts_sync_continuously: false
cluster_synced_files: ["~/.ray/auth_token"]   # made on the head, and sent to the workers from there

# Installs the pinned environment; skipped while constraints.txt and pyproject.toml are unchanged.
initialization_commands: []
setup_commands:
  - |-
    {commands.setup(inventory)}
head_setup_commands:
  - {commands.token(inventory)}
worker_setup_commands:
  - {commands.token(inventory)}

head_start_ray_commands:
  - |-
    {commands.reap(inventory)}
  - |
{_indented(commands.start_head(inventory, autoscaler=True))}
worker_start_ray_commands:
  - |-
    {commands.reap(inventory)}
  - |
{_indented(commands.start_worker(inventory))}"""
    return f"{HEADER}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def _beyond(inventory: Inventory) -> str:
    """A comment on what of the inventory Ray's own launcher does not know; empty if there is nothing."""
    names = [node for node in inventory.nodes if not is_address(node) or ":" in node]
    beyond = [
        *(["host names and IPv6 addresses"] if names else []),
        *(["what differs between nodes"] if inventory.differs else []),
        *(["an SSH port"] if inventory.ssh.port not in (None, 22) else []),
    ]
    return f"# It does not know {', '.join(beyond)}: use `make up` here.\n" if beyond else ""


def _text(value: str) -> str:
    """As YAML. Quoted, because YAML does not read plain `no`, `null` and `1e3` as text."""
    return json.dumps(value, ensure_ascii=False)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.laptop.inventory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
    options = parser.parse_args()

    def body() -> None:
        before = options.cluster.read_text() if options.cluster.exists() else None
        inventory = load(options.cluster)
        same = before == options.cluster.read_text()
        print(f"{options.cluster}: {'up to date' if same else 'made'}, {len(inventory.nodes)} nodes")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
