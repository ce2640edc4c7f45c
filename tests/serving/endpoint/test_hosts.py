"""Who may ask: names and origins that requests carry, and the key."""

from contextlib import nullcontext

import httpx
import pytest
from openai import AuthenticationError, OpenAI
from starlette.datastructures import Headers

from cluster.cli import UserError
from serving.endpoint.hosts import allowed_hosts, require_allowed
from serving.endpoint.keys import digest_of
from serving.endpoint.refusal import Refusal
from tests.fake_engine import counting_engine
from tests.serving.endpoint.server import Server


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


def test_origins_that_are_named_may_ask_from_anywhere():
    headers = Headers({"host": "localhost", "origin": "https://a.example"})
    for origins, allowed in ((("https://a.example",), True), (("*",), True), (("http://a.example",), False)):
        with nullcontext() if allowed else pytest.raises(Refusal, match="origin: "):
            require_allowed(headers, frozenset({"localhost"}), origins=origins)


# --- the key ------------------------------------------------------------------------------------------------


def test_the_key_of_an_unset_variable_is_refused_with_its_name():
    assert digest_of(None) is None
    with pytest.raises(UserError, match=r"deployment\.api_key: the environment has no MY_KEY"):
        digest_of("MY_KEY", {"MY_KEY": " "})


def test_who_has_no_key_gets_health_alone_and_errors_have_openai_s_codes():
    digest = digest_of("MY_KEY", {"MY_KEY": "sk-secret\n"})
    server = Server(counting_engine(), key_digest=digest, origins=("https://a.example",))
    try:
        for key in ("none", "sk-secret", "sk-secre"):
            client = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
            if key == "sk-secret":
                assert client.completions.create(model="counting", prompt="a", max_tokens=1).choices
                continue
            with pytest.raises(AuthenticationError, match="needs its key") as refused:
                client.completions.create(model="counting", prompt="a")
            assert refused.value.code == "invalid_api_key" and key not in str(refused.value)
        statuses = {
            path: httpx.get(f"{server.url}{path}").status_code
            for path in ("/health", "/version", "/metrics", "/v1/models", "/openapi.json")
        }
        assert [*statuses.values()] == [200, 200, 200, 401, 401]
        # A browser asks first, without the key; only pages of that origin are answered.
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        for origin, status in (("https://a.example", 200), ("https://b.example", 400)):
            headers = asked | {"origin": origin}
            answer = httpx.options(f"{server.url}/v1/completions", headers=headers)
            assert answer.status_code == status
            assert (answer.headers.get("access-control-allow-origin") == origin) == (status == 200)
    finally:
        server.close()
