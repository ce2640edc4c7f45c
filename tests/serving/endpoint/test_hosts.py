"""Which names requests may carry, by what the endpoint listens on."""

import pytest
from starlette.datastructures import Headers

from serving.endpoint.hosts import allowed_hosts, require_allowed
from serving.endpoint.openai_api import Refusal


@pytest.mark.parametrize(
    ("host", "more", "name", "allowed"),
    [
        ("127.0.0.1", (), "localhost", True),
        ("127.0.0.1", (), "gpu.example", False),
        ("127.0.0.2", (), "127.0.0.2:8000", True),
        ("localhost", (), "[::1]:8000", True),
        ("::1", (), "gpu.example", False),
        ("127.0.0.1", ("Gpu.Example",), "gpu.example:443", True),
        ("127.0.0.1", ("gpu.example",), "other.example", False),
        ("0.0.0.0", (), "gpu.example", True),  # its names are not known here
        ("0.0.0.0", ("gpu.example",), "other.example", False),
        ("0.0.0.0", ("gpu.example",), "0.0.0.0:8000", True),
        ("192.0.2.1", (), "gpu.example", True),
    ],
)
def test_a_host_is_allowed_by_name(host, more, name, allowed):
    names = allowed_hosts(host, more)
    headers = Headers({"host": name})
    if allowed:
        assert names is None or require_allowed(headers, names) is None
    else:
        assert names is not None
        with pytest.raises(Refusal, match=r"deployment\.allowed_hosts") as refused:
            require_allowed(headers, names)
        assert refused.value.status == 403


def test_a_request_without_either_header_is_let_in():
    names = allowed_hosts("127.0.0.1", ())
    assert names is not None
    require_allowed(Headers({}), names)
