"""`make inventory`: a new site's inventory, from an SSH configuration, from key=value, or from questions.

    python -m cluster.laptop.new_site CLUSTER.yaml [from=~/.ssh/config] [hosts='asu-*'] [key=value ...]

`from` takes the hosts of an SSH configuration whose names match `hosts`. The one through which others are
reached is the head, or else the first. On a terminal it asks for what `from` and key=value leave open.
"""

import argparse
import fnmatch
import glob
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster import cli, files
from cluster import config as layered
from cluster.cli import UserError
from cluster.laptop import inventory
from cluster.laptop.keys import Inventory

QUESTIONS = (  # key, what is asked
    ("head", "head node, as the workers reach it (address or name)"),
    ("external_head", "head node, as this laptop reaches it (null: the same)"),
    ("workers", "other nodes, as the head reaches them (with commas; empty: none)"),
    ("ssh.user", "user on the nodes"),
    ("ssh.key", "private key on this laptop"),
    ("node.gpus", "GPUs per node"),
    ("node.accelerator", "their kind, by Ray's name"),
    ("scratch", "folder on each node's own disk"),
    ("storage", "folder on storage that all nodes share"),
)
HEADER = "# By `make inventory`. cluster/laptop/keys.py has all keys; {cluster} is made from this file.\n"


def new_site(cluster: Path, arguments: Sequence[str], *, ask: Callable[[str], str] | None) -> Inventory:
    """Write the inventory beside the Ray YAML `cluster`, and that YAML.

    Args:
        arguments: from=, hosts=, and keys of the inventory.
        ask: the answer to a question; None: nobody is there to answer.

    Raises:
        UserError: the file exists, or `from` has no such hosts.
        ConfigError: a key is missing or refused. Nothing is written.
    """
    file = inventory.beside(cluster)
    if not cluster.parent.is_dir():
        raise UserError(f"{cluster.parent}: no such folder; make it, or give another CLUSTER=")
    for place in (file, cluster):
        if place.exists():
            raise UserError(f"{place}: exists already; edit that inventory, or give another CLUSTER=")
    given = dict(each.partition("=")[::2] for each in arguments if each.startswith(("from=", "hosts=")))
    if "hosts" in given and "from" not in given:
        raise UserError("hosts: chooses hosts of an SSH configuration; say from=~/.ssh/config too")
    answers = [each for each in arguments if not each.startswith(("from=", "hosts="))]
    if "from" in given:
        answers = [*_read(Path(given["from"]).expanduser(), given.get("hosts", "*")), *answers]
    answers = [f"name={json.dumps(cluster.stem)}", *answers]
    if ask is not None:
        answers = _asked(answers, ask)
    elif not any(each.startswith("head=") for each in answers):
        raise UserError('head: is missing; say ARGS="head=... workers=[...]" or ARGS=from=~/.ssh/config')
    site = layered.load(Inventory, dotlist=answers)
    files.write_text(file, HEADER.format(cluster=cluster.name) + _text(site))
    return inventory.load(cluster)


def _asked(answers: list[str], ask: Callable[[str], str]) -> list[str]:
    """The answers so far, and those to all questions that they leave open."""
    known = {each.partition("=")[0] for each in answers}
    defaults = {name: value for name, value, _ in layered.walk(Inventory(head="head"))}
    for name, question in QUESTIONS:
        if name in known:
            continue
        shown = "" if name == "head" or not defaults[name] else f" [{defaults[name]}]"
        while True:
            text = ask(f"{question}{shown}: ").strip()
            if not text and name != "head":
                break
            words = [word for word in re.split(r"[\s,]+", text) if word]
            value = json.dumps(words) if name == "workers" else text
            try:
                tried = [*answers, f"{name}={json.dumps(value) if name == 'head' else value}"]
                layered.load(Inventory, dotlist=tried)
            except layered.ConfigError as error:
                print(error, file=sys.stderr)
            else:
                answers = tried
                break
    return answers


def _read(file: Path, pattern: str) -> list[str]:
    """Keys of the inventory from the hosts of an SSH configuration, by `ssh -G`, which knows its rules."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    names = [name for name in dict.fromkeys(_hosts(file)) if fnmatch.fnmatch(name, pattern)]
    if not names:
        raise UserError(f"{file}: no host named {pattern!r}; say hosts= with a pattern such as 'asu-*'")
    hosts = {name: _resolved(file, name) for name in names}
    jumps = Counter(host["proxyjump"].rpartition("@")[2].partition(":")[0] for host in hosts.values())
    head = max(names, key=lambda name: jumps[name])
    usual = {
        what: Counter(host[what] for host in hosts.values()).most_common(1)[0][0]
        for what in ("user", "port", "identityfile")
    }
    differs = {}
    for host in hosts.values():
        keys = {"user": host["user"], "port": int(host["port"]), "key": host["identityfile"]}
        same = {"user": usual["user"], "port": int(usual["port"]), "key": usual["identityfile"]}
        if other := {name: value for name, value in keys.items() if value != same[name]}:
            differs[host["hostname"]] = other
    workers = [hosts[name]["hostname"] for name in names if name != head]
    return [
        f"head={json.dumps(hosts[head]['hostname'])}",
        f"workers={json.dumps(workers)}",
        f"ssh.user={json.dumps(usual['user'])}",
        f"ssh.key={json.dumps(usual['identityfile'])}",
        *([f"ssh.port={usual['port']}"] if usual["port"] != "22" else []),
        *([f"differs={json.dumps(differs)}"] if differs else []),
    ]


def _hosts(file: Path, *, includers: Sequence[Path] = ()) -> Iterator[str]:
    """The names of hosts in an SSH configuration and in what it includes, without patterns."""
    if file in includers or not file.is_file():
        return
    for line in file.read_text(errors="replace").splitlines():
        word, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if word.lower() == "host":
            yield from (name for name in rest.split() if not set(name) & set("*?!"))
        elif word.lower() == "include":
            for pattern in map(os.path.expanduser, rest.split()):  # relative ones are, to ssh, below ~/.ssh
                for each in sorted(glob.glob(os.path.join(os.path.expanduser("~/.ssh"), pattern))):
                    yield from _hosts(Path(each), includers=(*includers, file))


def _resolved(file: Path, name: str) -> dict[str, str]:
    """What ssh would use for a host: hostname, user, port, proxyjump, the first identityfile that exists."""
    done = subprocess.run(["ssh", "-G", "-F", file, name], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{file}: ssh refuses it: {done.stderr.strip().splitlines()[-1]}")
    lines = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    keys = [value for key, value in lines if key == "identityfile"]
    found = next((key for key in keys if Path(key).expanduser().exists()), keys[0])
    return {"proxyjump": "", **dict(lines), "identityfile": found}


def _text(site: Inventory) -> str:
    """The keys that differ from their defaults, as YAML."""
    tree: dict[str, Any] = {"name": site.name, "head": site.head}
    usual = Inventory(name=site.name, head=site.head)
    for name, (_, value) in layered.changes(site, since=usual).items():
        section, _, last = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    if site.differs:
        changed = {node: layered.changes(each) for node, each in site.differs.items()}
        tree["differs"] = {
            node: {name: value for name, (_, value) in of.items()} for node, of in changed.items()
        }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.laptop.new_site", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
    parser.add_argument(
        "arguments", nargs="*", metavar="key=value", help="from=, hosts=, keys of the inventory"
    )
    options = parser.parse_args()

    def ask(question: str) -> str:
        try:
            return input(question)
        except EOFError as error:  # Ctrl-D
            print()
            raise KeyboardInterrupt from error

    def body() -> None:
        site = new_site(options.cluster, options.arguments, ask=ask if sys.stdin.isatty() else None)
        print(f"{inventory.beside(options.cluster)}: {len(site.nodes)} nodes, head {site.head}")
        print(f"read it through, then `make up CLUSTER={options.cluster}`")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
