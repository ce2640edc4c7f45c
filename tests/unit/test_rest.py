from cluster.rest import _reason

TRACEBACK = """Traceback (most recent call last):
  File "job_head.py", line 1, in submit_job
    raise RuntimeError(1)
ray.exceptions.RuntimeEnvError: first
During handling of it another:
FileNotFoundError: [Errno 2] No such file or directory
.
"""


def test_the_reason_is_the_last_error_and_not_the_last_line():
    assert _reason(TRACEBACK) == "FileNotFoundError: [Errno 2] No such file or directory ."
    assert _reason("No available agent\n") == "No available agent"
    assert _reason("") == ""
