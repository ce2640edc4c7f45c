"""Another user of a machine on which Ray runs: opens its files and sockets, and asks its agent for a job."""

import json
import subprocess

NOBODY = 65534
JOB = {"entrypoint": "true"}
AGENT = "http://127.0.0.1:52365/api/job_agent/jobs/"  # on every machine with a Ray

# It runs by itself: user 65534 may not be able to read our modules, nor Python's own.
ATTACK = """
import encodings.idna, json, os, socket, sys, urllib.error, urllib.request
plan = json.load(sys.stdin)
if plan["user"]:
    os.setgroups([]); os.setgid(plan["user"]); os.setuid(plan["user"])
done, statuses = [], []
def attempt(what, action):
    try:
        action()
    except OSError:
        return
    done.append(what)
def connect(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)
for path, kind in plan["paths"].items():
    if kind == "d":
        attempt(f"list {path}", lambda: os.listdir(path))
        attempt(f"plant {path}", lambda: os.close(os.open(path + "/planted.py", os.O_CREAT | os.O_WRONLY)))
    elif kind == "s":
        attempt(f"connect {path}", lambda: connect(path))
    else:
        attempt(f"read {path}", lambda: open(path).close())
        attempt(f"write {path}", lambda: open(path, "a").close())
for token in plan["tokens"]:
    request = urllib.request.Request(plan["url"], data=json.dumps(plan["job"]).encode())
    request.add_header("Content-Type", "application/json")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            statuses.append(answer.status)
    except urllib.error.HTTPError as error:
        statuses.append(error.code)
print(json.dumps([done, statuses]))
"""


def attack(
    python: list[str],
    paths: dict[str, str],
    tokens: list[str | None],
    *,
    user: int = NOBODY,
    job: dict[str, str] = JOB,
) -> tuple[list[str], list[int]]:
    """What a user could do with `paths`, and the HTTP status that asking for a job had with each token.

    Args:
        python: command line of a Python on that machine, as root.
        paths: path -> "d" for a folder, "s" for a socket, else a file.
    """
    plan = {"paths": paths, "url": AGENT, "tokens": tokens, "user": user, "job": job}
    done = subprocess.run([*python, "-c", ATTACK], input=json.dumps(plan), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    could, statuses = json.loads(done.stdout)
    return could, statuses
