"""Proxies, TLS and limits of time, with scripted servers. The proxy is one of them, too."""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from helpers.certificates import write_certificate
from helpers.scripted_server import Answer, Request, completion, data, scripted_server
from servegrid.cli.main import main
from servegrid.client import measure
from servegrid.client import requests as client_requests
from servegrid.errors import ConfigError, LoadError
from servegrid.node.network import Proxy, find_proxy, tls_context
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload
from servegrid.telemetry.server import http_get, is_healthy

BURST = Workload("burst", 2, 9, 3, 2, warmup_waves=0, timeout_s=20, idle_timeout_s=10)
HOST = "model.example"
"""A name that only the proxy knows."""
PROXY_VARIABLES = [
    f"{prefix}_{kind}"
    for prefixes in (("http", "https", "all", "no"), ("HTTP", "HTTPS", "ALL", "NO"))
    for prefix in prefixes
    for kind in (("proxy",) if prefix.islower() else ("PROXY",))
]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in PROXY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of a private authority for HOST, with its key."""
    return write_certificate(tmp_path_factory.mktemp("tls") / "ca.pem", x509.DNSName(HOST))


def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@contextmanager
def tunnel_proxy(target: str, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[list[bytes]]:
    """A proxy on 127.0.0.1 that connects every tunnel to the port of `target`. The first item of
    the list is its address, the others are the heads that it read."""
    port = int(target.rpartition(":")[2])
    heads: list[bytes] = []

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # either side may leave
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1)
            heads.append(head)
            client.sendall(answer)
            if b" 200 " not in answer:
                return
            with socket.create_connection(("127.0.0.1", port)) as server:
                other = {client: server, server: client}
                while True:
                    for ready in select.select(list(other), [], [])[0]:
                        received = ready.recv(65536)
                        if not received:
                            return
                        other[ready].sendall(received)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        heads.append(f"127.0.0.1:{listener.getsockname()[1]}".encode())
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield heads
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_http_goes_through_the_proxy_with_the_whole_url(monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(request: Request) -> Answer:
        return completion(request) if request.method == "POST" else data("ok")

    with scripted_server(respond) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:s%40cret@"))
        endpoint = Endpoint(f"http://{HOST}:8000", "m")
        measurement = measure(endpoint, BURST, None, "s")
        assert http_get(endpoint, "/health") == (200, b"ok")
    assert measurement.errors == [None, None]
    assert {request.path for request in proxy.requests} == {
        f"http://{HOST}:8000/v1/completions",
        f"http://{HOST}:8000/health",
    }
    expected = "Basic " + base64.b64encode(b"me:s@cret").decode()
    assert {request.headers["Proxy-Authorization"] for request in proxy.requests} == {expected}
    assert measurement.facts["proxy"] == proxy.url.removeprefix("http://")
    assert "cret" not in str(measurement.facts)


def test_https_goes_through_a_tunnel_to_a_server_with_a_private_authority(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        scripted_server(
            lambda request: completion(request) if request.method == "POST" else data("ok"),
            server_tls(certificate),
        ) as server,
        tunnel_proxy(server.url) as heads,
    ):
        monkeypatch.setenv("https_proxy", f"http://me:secret@{heads[0].decode()}")
        endpoint = Endpoint(f"https://{HOST}", "m", ca_file=str(certificate))
        measurement = measure(endpoint, BURST, None, "s")
        assert is_healthy(endpoint)
    assert measurement.errors == [None, None]
    assert measurement.facts["tls_verified"] is True
    assert "secret" not in str(measurement.facts)
    for head in heads[1:]:
        assert head.startswith(f"CONNECT {HOST}:443 HTTP/1.".encode())
        assert b"Proxy-Authorization: Basic " in head


def test_a_proxy_that_refuses_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"
    with tunnel_proxy(":1", answer) as heads:
        monkeypatch.setenv("HTTPS_PROXY", heads[0].decode())
        with pytest.raises(LoadError, match=r"refuses a tunnel: HTTP/1\.1 407"):
            measure(Endpoint(f"https://{HOST}", "m"), BURST, None, "s")


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({"https_proxy": "http://p:3128"}, f"https://{HOST}", Proxy("p", 3128)),
        ({"HTTPS_PROXY": "p:3128"}, f"https://{HOST}", Proxy("p", 3128)),
        ({"all_proxy": "http://p:3128"}, f"http://{HOST}", Proxy("p", 3128)),
        ({"https_proxy": "http://p"}, f"http://{HOST}", None),
        ({"http_proxy": "http://p", "no_proxy": ".example"}, f"http://{HOST}:8000", None),
        ({"http_proxy": "http://p", "no_proxy": "*"}, f"http://{HOST}:8000", None),
        # An engine on this node is never reached through a proxy.
        ({"http_proxy": "http://p"}, "http://127.0.0.1:8000", None),
        ({"http_proxy": "http://p"}, "http://[::1]:8000", None),
        ({"http_proxy": "http://p"}, "http://localhost:8000", None),
        ({}, f"http://{HOST}", None),
    ],
)
def test_the_proxy_comes_from_the_environment(
    variables: dict[str, str], url: str, proxy: Proxy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_proxy(url) == proxy


@pytest.mark.parametrize("value", ["socks5://me:secret@p:1080", "http://p:secret", "http://"])
def test_another_kind_of_proxy_is_refused_without_its_password(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", value)
    with pytest.raises(
        ConfigError, match=r"Correct `https_proxy`, or name .* `no_proxy`"
    ) as caught:
        find_proxy(f"https://{HOST}")
    assert "secret" not in str(caught.value)


def direct(url: str, **tls: object) -> Endpoint:
    return Endpoint(url.replace("127.0.0.1", "localhost"), "m", **tls)  # type: ignore[arg-type]


def test_a_private_authority_is_refused_unless_it_is_named_or_the_check_is_skipped(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted_server(completion, server_tls(certificate)) as server:
        with pytest.raises(LoadError, match="certificate verify failed"):
            measure(direct(server.url), BURST, None, "s")
        # The certificate is for another name, so naming the authority is not enough here.
        with pytest.raises(LoadError, match="certificate verify failed"):
            measure(direct(server.url, ca_file=str(certificate)), BURST, None, "s")
        unchecked = measure(direct(server.url, verify_tls=False), BURST, None, "s")
    assert unchecked.errors == [None, None]
    assert unchecked.facts["tls_verified"] is False


def test_the_variable_ssl_cert_file_names_the_authorities(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    (trusted,) = tls_context(None, True).get_ca_certs()
    assert trusted["subject"] == ((("commonName", HOST),),)


def test_a_file_without_certificates_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca_file .*none: no certificates .*Name a PEM file"):
        tls_context(str(tmp_path / "none"), True)


def test_a_server_that_only_sends_pings_does_not_hold_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pings = Answer([(0.05, b": ping\n\n")] * 200, media_type="text/event-stream")
    monkeypatch.setattr(client_requests, "PROBE_TIMEOUT_S", 0.5)
    short = Workload("burst", 1, 9, 3, 1, warmup_waves=0, timeout_s=0.5, idle_timeout_s=120)
    started = time.monotonic()
    with scripted_server(lambda request: pings) as server:
        measurement = measure(Endpoint(server.url, "m"), short, None, "s")
    assert time.monotonic() - started < 5
    assert measurement.errors[0] is not None and measurement.errors[0].startswith("timeout")


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@h/v1", "https://secret@h", "http://h/v1?key=secret", "http://h#secret"],
)
def test_credentials_in_a_url_are_refused_and_not_shown(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["load", "--url", url, "--model", "m", "--concurrency", "1", "--requests", "1"]
    words += ["--input-len", "9", "--output-len", "5", "--output", "x", "--protocol", "burst"]
    with pytest.raises(SystemExit):
        main(words)
    printed = capsys.readouterr()
    assert "give the key with --api-key-env" in printed.err
    assert "secret" not in printed.err + printed.out
