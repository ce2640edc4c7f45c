"""tests/lab/startup.py: one start, measured by part."""

import pytest

from cluster.cli import RunError
from tests.commands import tiny, write_corpus
from tests.lab.startup import start


@pytest.mark.stack
def test_a_start_is_measured_by_part_and_a_refused_one_is_no_measurement(tmp_path):
    write_corpus(tmp_path)
    keys = [key for key in tiny(tmp_path) if not key.startswith(("run.", "data.directory"))]
    parts = start(tmp_path, "one", keys)
    assert all(parts[f"{part}_seconds"] > 0 for part in ("command", "data", "model", "step"))
    with pytest.raises(RunError, match=r"(?s)exit code 2.*batch\.tokns"):
        start(tmp_path, "typo", [*keys, "batch.tokns=3"])
