"""Secrets are planted in the environment, in the home and beside the code, and looked for in what comes out.

W&B is the real one, offline; Ray and training are real too.
"""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.laptop import inventory, package
from tests.commands import ROOT, tiny, write_corpus
from tests.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.stack

CANARIES = {
    "WANDB_API_KEY": "c0ffee" * 6 + "c0ff",  # W&B wants 40 hexadecimal digits
    "HF_TOKEN": "hf_canaryCanaryCanaryCanaryCanary",
    "AWS_SECRET_ACCESS_KEY": "canary/AwsSecret+Access/Key",
    "OPENAI_API_KEY": "sk-canaryCanaryOpenAi",
    "netrc": "canaryOfTheNetrcFile" * 2,
    "url": "canaryOfAnAddress",
    "word": "canaryWithoutAName",  # the value of no variable, and of no known format
}
FAIL_AT_THE_END = """
import os, sys
from training import launch

canary, train = os.environ["CANARY_URL"], launch._ray_worker

def train_and_fail(arguments):
    train(arguments)
    raise RuntimeError(f"401 from http://me:{canary}@host/?api_key={canary}, sent "
                       f"{{'Authorization': 'Bearer {canary}'}} and {os.environ['HF_TOKEN']}")

launch._ray_worker = train_and_fail
sys.exit(launch.main(sys.argv[1:]))
"""


def found_in(content: bytes) -> list[str]:
    return [name for name, canary in CANARIES.items() if canary.encode() in content]


def found_under(folder: Path) -> dict[str, list[str]]:
    """File -> the canaries in it, of those files that hold any."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    assert files
    held = {name: found_in(file.read_bytes() + name.encode()) for name, file in files.items()}
    return {name: canaries for name, canaries in held.items() if canaries}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {CANARIES['netrc']}\n")
    (home / ".netrc").chmod(0o600)
    return home


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    planted = {name: canary for name, canary in CANARIES.items() if name.isupper()}
    # not by a secret's name, so that the text around it has to tell
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        **planted,
        "CANARY_URL": CANARIES["url"],
        "HOME": str(home),
        "RAY_TMPDIR": f"/tmp/ray-{os.getpid()}",
    }


def test_nothing_that_a_run_leaves_holds_a_secret(
    tmp_path: Path, environment: dict[str, str]
) -> None:  # the record, W&B's files, Ray Train's folder, the log of a failure, and all that is printed
    write_corpus(tmp_path)
    keys = tiny(
        tmp_path, launcher="ray", workers__cpus=1, record__wandb="offline", run__name="run",
        schedule__tokens=512 * 4,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FAIL_AT_THE_END, *keys],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=4 * PATIENCE_SECONDS,
    )
    run = tmp_path / "outputs/run"
    assert done.returncode == 1, done.stderr.decode()
    assert b"error: training failed: 401 from http://***@host/?api_key=***, sent" in done.stderr
    assert (run / "summary.json").exists() and (run / "config.yaml").exists()
    [wandb] = run.glob("wandb/offline-run-*/*.wandb")
    assert wandb.stat().st_size > 1000
    failure = (run / "failure.log").read_text()
    assert "401 from http://***@host/?api_key=***, sent {'Authorization': '***'} and ***\n" in failure
    assert found_in(done.stdout + done.stderr) == []
    assert found_under(run) == {}


@pytest.mark.parametrize(
    ("key", "canary"),
    [
        ("run.name=${oc.env:WANDB_API_KEY}", "WANDB_API_KEY"),
        ("data.source=${oc.decode:${oc.env:AWS_SECRET_ACCESS_KEY}}", "AWS_SECRET_ACCESS_KEY"),
        (f"data.source=http://me:{CANARIES['url']}@host/corpus.jsonl", "url"),
        (f"record.wandb_api_key={CANARIES['word']}", "word"),
    ],
)
def test_a_key_that_brings_a_secret_is_refused_in_words_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, key: str, canary: str
) -> None:
    from training import launch

    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, CANARIES[name])
    for dry_run in ([], ["--dry-run"]):
        assert launch.main([*dry_run, *tiny(tmp_path), key]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and key.partition("=")[0] in err
        assert found_in(err.encode()) == []
    assert list(tmp_path.iterdir()) == []


def test_no_file_beside_the_code_travels_with_it(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in (".gitignore", *inventory.CODE):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, checkout / name)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    expected = zipfile.ZipFile(io.BytesIO(package.pack(root=checkout).data)).namelist()
    assert "training/launch.py" in expected
    (tmp_path / "key").write_text(CANARIES["word"])
    for room in ("cluster", "training/configs"):
        for name in (".env", "id_ed25519", "notes.yaml", "scratch.py"):
            (checkout / room / name).write_text(CANARIES["word"])
        (checkout / room / "link").symlink_to(tmp_path / "key")
    for git in (True, False):
        if not git:  # an unpacked archive: what has no suffix of code stays, and there is no more to go by
            shutil.rmtree(checkout / ".git")
            for file in [*checkout.rglob("notes.yaml"), *checkout.rglob("scratch.py")]:
                file.unlink()
            expected = [name for name in expected if not name.endswith(".md")]
        archive = zipfile.ZipFile(io.BytesIO(package.pack(root=checkout).data))
        assert [name for name in archive.namelist() if found_in(archive.read(name))] == []
        assert archive.namelist() == expected
