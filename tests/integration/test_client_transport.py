"""The transport with a mock server: arrival times, connections, and single httpx requests."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx
import pytest
from cryptography import x509

from helpers.certificates import write_certificate
from helpers.faulty_server import FaultScript, MockServer, start_faulty_server
from servegrid.client import sockets
from servegrid.client.transport import Exchange, MeasuringTransport, WaveResult

MS = 1_000_000


def send(
    server: MockServer,
    transport: MeasuringTransport,
    requests: int,
    users: int,
    tokens: int = 5,
    name: str = "t",
    timeout_s: float = 30,
    idle_timeout_s: float = 10,
) -> WaveResult:
    with httpx.Client(base_url=server.endpoint.base_url) as client:
        built = [
            client.build_request(
                "POST",
                "/v1/completions",
                headers={"X-Request-Id": f"{name}/{number}"},
                json={"prompt": [1, 2, 3], "max_tokens": tokens},
            )
            for number in range(requests)
        ]
    return transport.send_wave(built, users, timeout_s=timeout_s, idle_timeout_s=idle_timeout_s)


@pytest.fixture
def transport() -> Iterator[MeasuringTransport]:
    with MeasuringTransport() as created:
        yield created


def lateness_ns(exchanges: list[Exchange], sent: dict[str, list[int]], name: str) -> list[int]:
    """Arrival minus the server's send time, for every piece."""
    late = []
    for number, exchange in enumerate(exchanges):
        times = sent[f"{name}/{number}"]
        assert len(exchange.arrival_ns) == len(times)
        late += [client - server for client, server in zip(exchange.arrival_ns, times, strict=True)]
    return late


def test_over_tcp_a_late_reader_gets_the_kernels_arrival_times(
    transport: MeasuringTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = sockets.TcpConnection.receive

    def late_by_30_ms(connection: sockets.TcpConnection) -> tuple[int, bytes]:
        time.sleep(0.03)
        return receive(connection)

    with start_faulty_server(FaultScript(ttft_s=0.05, itl_s=0.1)) as server:
        send(server, transport, 1, 1, name="before")
        monkeypatch.setattr(sockets.TcpConnection, "receive", late_by_30_ms)
        result = send(server, transport, 1, 1, tokens=10)
        sent = server.log().sent
    assert result.stamps == "kernel"
    assert median(lateness_ns(result.exchanges, sent, "t")) < 10 * MS


def test_over_a_unix_socket_a_late_reader_gets_late_arrival_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test above can fail: here the full delay is visible."""
    receive = sockets.Connection.receive

    def late_by_30_ms(connection: sockets.Connection) -> tuple[int, bytes]:
        time.sleep(0.03)
        return receive(connection)

    path = str(tmp_path / "s")
    with (
        start_faulty_server(FaultScript(ttft_s=0.05, itl_s=0.1, unix_socket=path)) as server,
        MeasuringTransport(path) as transport,
    ):
        send(server, transport, 1, 1, name="before")
        monkeypatch.setattr(sockets.Connection, "receive", late_by_30_ms)
        result = send(server, transport, 1, 1, tokens=10)
        sent = server.log().sent
    assert result.stamps == "reader"
    assert min(lateness_ns(result.exchanges, sent, "t")) >= 30 * MS


def test_a_burst_is_sent_at_once_over_connections_that_are_already_open(
    transport: MeasuringTransport,
) -> None:
    with start_faulty_server(FaultScript(ttft_s=0.3, accept_after_s=0.2)) as server:
        result = send(server, transport, 32, 32)
        assert server.log().connections == 33 + 1  # one to find the server, one for the log
    exchanges = result.exchanges
    assert {exchange.scheduled_ns for exchange in exchanges} == {result.start_ns}
    assert sorted(exchange.user or 0 for exchange in exchanges) == list(range(32))
    sent = [exchange.sent_ns or 0 for exchange in exchanges]
    assert max(sent) < min(exchange.arrival_ns[0] for exchange in exchanges)


def test_in_a_closed_loop_a_user_continues_when_its_last_request_has_ended(
    transport: MeasuringTransport,
) -> None:
    with start_faulty_server(FaultScript(itl_s=0.01)) as server:
        result = send(server, transport, 10, 3)
    assert all(exchange.failure is None for exchange in result.exchanges)
    by_user: dict[int | None, list[Exchange]] = {}
    for exchange in result.exchanges:
        by_user.setdefault(exchange.user, []).append(exchange)
    assert set(by_user) == {0, 1, 2}
    for exchanges in by_user.values():
        due = [result.start_ns, *[exchange.done_ns for exchange in exchanges[:-1]]]
        assert [exchange.scheduled_ns for exchange in exchanges] == due
        assert all(
            exchange.scheduled_ns <= exchange.sent_ns < exchange.arrival_ns[0] <= exchange.done_ns
            for exchange in exchanges
            if exchange.scheduled_ns is not None and exchange.sent_ns is not None
        )


@pytest.mark.parametrize("close_after", ["announced", "silently"])
def test_connections_that_the_server_closes_are_opened_again(
    transport: MeasuringTransport, close_after: str
) -> None:
    with start_faulty_server(FaultScript(close_after=close_after)) as server:  # type: ignore[arg-type]
        for wave in range(3):
            result = send(server, transport, 4, 2, name=f"wave{wave}")
            assert [exchange.failure for exchange in result.exchanges] == [None] * 4
        log = server.log()
    assert len(log.requests) == 12
    assert log.connections == 12 + 2


def test_a_response_can_end_with_the_connection(transport: MeasuringTransport) -> None:
    with start_faulty_server(FaultScript(framing="close")) as server:
        result = send(server, transport, 4, 2)
    for exchange in result.exchanges:
        assert exchange.failure is None and exchange.raw.endswith(b"data: [DONE]\n\n")


def test_connections_stay_open_between_waves(transport: MeasuringTransport) -> None:
    with start_faulty_server(FaultScript()) as server:
        for wave in range(3):
            send(server, transport, 4, 4, name=f"wave{wave}")
        assert server.log().connections == 4 + 2


def test_a_request_larger_than_the_sockets_buffers_is_sent_in_parts(
    transport: MeasuringTransport,
) -> None:
    prompt = list(range(2_000_000))
    with start_faulty_server(FaultScript()) as server:
        url = f"{server.endpoint.base_url}/v1/completions"
        request = httpx.Request("POST", url, json={"prompt": prompt, "max_tokens": 1})
        (exchange,) = transport.send_wave([request], 1, timeout_s=60, idle_timeout_s=30).exchanges
        (seen,) = server.log().requests
    assert exchange.failure is None
    assert seen["body"]["prompt"] == prompt


def test_an_unreachable_server_is_a_connect_error(
    transport: MeasuringTransport, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "http://no.such.host.invalid"):
        with pytest.raises(httpx.ConnectError), httpx.Client(transport=transport) as client:
            client.get(f"{url}/health")
    missing = MeasuringTransport(str(tmp_path / "none"))
    with (
        pytest.raises(httpx.ConnectError, match="No such file"),
        httpx.Client(transport=missing) as client,
    ):
        client.get("http://localhost/health")


def test_every_request_fails_if_the_server_is_gone(
    transport: MeasuringTransport,
) -> None:
    with start_faulty_server(FaultScript()) as server:
        send(server, transport, 2, 2)
    result = send(server, transport, 2_000, 2)
    kinds = [exchange.failure and exchange.failure.kind for exchange in result.exchanges]
    assert kinds == ["connect"] * 2_000


def test_the_open_file_limit_is_raised_as_far_as_the_system_allows(
    transport: MeasuringTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    monkeypatch.setattr(sockets.resource, "getrlimit", lambda _: (100, 1000))
    monkeypatch.setattr(sockets.resource, "setrlimit", lambda _, limit: limits.append(limit))
    sockets.raise_open_file_limit(36)
    assert limits == []
    sockets.raise_open_file_limit(37)
    assert limits == [(101, 1000)]
    with pytest.raises(sockets.LoadError, match="937 concurrent requests need 1001 open files"):
        sockets.raise_open_file_limit(937)


# As an ordinary httpx transport.


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_single_requests_get_the_same_response_as_from_httpx(
    transport: MeasuringTransport, framing: str
) -> None:
    script = FaultScript(framing=framing)  # type: ignore[arg-type]
    body = {"prompt": [1], "max_tokens": 2}
    with (
        start_faulty_server(script) as server,
        httpx.Client(base_url=server.endpoint.base_url, transport=transport) as measuring,
        httpx.Client(base_url=server.endpoint.base_url) as ordinary,
    ):
        assert measuring.get("/health").status_code == 200
        response = measuring.post("/v1/completions", json=body)
        expected = ordinary.post("/v1/completions", json=body)
    assert (response.status_code, response.text) == (expected.status_code, expected.text)
    assert response.headers == expected.headers


def test_failures_of_single_requests_are_httpx_errors(transport: MeasuringTransport) -> None:
    expected = {
        "reset": httpx.ReadError,
        "close": httpx.RemoteProtocolError,
        "malformed_chunk": httpx.RemoteProtocolError,
        "stall": httpx.ReadTimeout,
    }
    for fault, error in expected.items():
        script = FaultScript(fault=fault, fault_on="", fault_after=1)  # type: ignore[arg-type]
        with start_faulty_server(script) as server, pytest.raises(error):
            client = httpx.Client(transport=transport, timeout=0.3)
            url = f"{server.endpoint.base_url}/v1/completions"
            client.post(url, json={"prompt": [1], "max_tokens": 2})


def test_other_url_schemes_are_refused(transport: MeasuringTransport) -> None:
    with pytest.raises(httpx.UnsupportedProtocol, match="ftp://host/x: neither http nor https"):
        transport.handle_request(httpx.Request("GET", "ftp://host/x"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key."""
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return write_certificate(tmp_path_factory.mktemp("tls") / "certificate.pem", address)


def test_tls_arrivals_are_read_times(certificate: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    script = FaultScript(itl_s=0.01, certificate=str(certificate))
    with start_faulty_server(script) as server, MeasuringTransport(tls=trusting) as transport:
        for wave in range(2):
            result = send(server, transport, 6, 3, name=f"wave{wave}")
            assert result.stamps == "reader"
            for exchange in result.exchanges:
                assert exchange.failure is None
                assert exchange.raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
                assert len(exchange.arrival_ns) >= 5


def test_an_untrusted_certificate_is_a_connect_error(certificate: Path) -> None:
    with (
        start_faulty_server(FaultScript(certificate=str(certificate))) as server,
        httpx.Client(transport=MeasuringTransport()) as client,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.get(f"{server.endpoint.base_url}/health")
