"""Requests that do not come as they should, on the socket; TLS; and browsers of other origins."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import events, expected, wait_for
from conftest import Running, ServerProcess

from server.connection import MAX_HEAD_BYTES
from server.files import check_certificate

Serve = Callable[..., Running]
BODY = json.dumps({"prompt": "abc", "max_tokens": 3, "temperature": 0}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


async def dialogue(running: Running, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Sends the pieces and gives all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause)
    async with asyncio.timeout(15):
        data = await reader.read()
    writer.close()
    return data


def parsed(data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of the one response in `data`, whose length must be right."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert b"content-length: %d" % len(body) in lines
    assert b"connection: close" in lines
    error: dict[str, Any] = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(lines[0].split()[1]), error


@pytest.mark.parametrize(
    "pieces",
    [
        (b"",),
        (b"POST /v1/comp",),
        (b"\r\n",),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",),
        (HEAD % len(BODY),),
        (HEAD % len(BODY), BODY[:5]),
    ],
    ids=["nothing", "part of a line", "an empty line", "half a head", "no body", "half a body"],
)
async def test_a_request_that_is_not_sent_to_its_end_is_a_408(
    serve_in_thread: Serve, pieces: tuple[bytes, ...]
) -> None:
    running = serve_in_thread(settings={"header_timeout": 0.3})
    status, error = parsed(await dialogue(running, *pieces))
    assert (status, error["code"]) == (408, "request_not_sent")
    with running.client() as client:
        assert client.get("/health").status_code == 200


async def test_a_head_that_comes_drop_by_drop_is_no_whole_one(serve_in_thread: Serve) -> None:
    running = serve_in_thread(settings={"header_timeout": 0.5})
    reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
    answer = asyncio.create_task(reader.read())
    async with asyncio.timeout(15):
        writer.write(b"GET /health HTTP/1.1\r\n")
        while not answer.done():
            writer.write(b"x: y\r\n")
            await asyncio.sleep(0.05)
    assert parsed(await answer)[0] == 408
    writer.close()


async def test_a_body_may_take_longer_than_the_timeout_while_it_comes(serve_in_thread: Serve) -> None:
    running = serve_in_thread(settings={"header_timeout": 0.6})
    pieces = [BODY[at : at + 10] for at in range(0, len(BODY), 10)]
    head = HEAD.replace(b"host: x", b"host: x\r\nconnection: close")
    data = await dialogue(running, head % len(BODY), *pieces, pause=0.15)
    assert data.startswith(b"HTTP/1.1 200 ")
    assert b'"text":"abc"' in data


async def test_an_answer_is_not_cut_by_a_next_request_that_stops_short(serve_in_thread: Serve) -> None:
    running = serve_in_thread(settings={"header_timeout": 0.2}, tick_seconds=0.02)
    body = json.dumps({"prompt": "abc", "max_tokens": 50, "temperature": 0, "stream": True}).encode()
    data = await dialogue(running, HEAD % len(body) + body, b"GET /health HT")
    first, _, rest = data.partition(b"0\r\n\r\n")
    lines = [line for line in first.decode().split("\n") if line.startswith("data: ")]
    pieces = events("\n\n".join(lines))
    assert "".join(event["choices"][0]["text"] for event in pieces).encode() == expected(b"abc", 50)
    assert parsed(rest)[0] == 408


async def test_a_head_without_end_is_a_431(serve_in_thread: Serve) -> None:
    running = serve_in_thread()
    status, error = parsed(await dialogue(running, b"GET / HTTP/1.1\r\nx: " + b"y" * (MAX_HEAD_BYTES + 1)))
    assert (status, error["code"]) == (431, "headers_too_large")


async def test_what_is_no_http_is_a_400_of_the_same_shape(serve_in_thread: Serve) -> None:
    status, error = parsed(await dialogue(serve_in_thread(), b"\x16\x03\x01 hello\r\n\r\n"))
    assert (status, error["code"]) == (400, "invalid_http")


async def test_a_connection_serves_many_requests_and_pipelined_ones(serve_in_thread: Serve) -> None:
    running = serve_in_thread(settings={"header_timeout": 0.3})
    last = HEAD.replace(b"host: x", b"host: x\r\nconnection: close") % len(BODY) + BODY
    data = await dialogue(running, (HEAD % len(BODY) + BODY) * 3, last, pause=0.5)
    assert data.count(b"HTTP/1.1 200 ") == 4


# TLS


def make_certificate(directory: Path) -> tuple[str, str]:
    """A certificate for 127.0.0.1 and its key, made for these tests."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    try:
        subprocess.run(
            [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    return str(cert), str(key)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("in_one_file", [False, True])
def test_a_server_with_a_certificate_speaks_https(
    serve_process: Callable[..., ServerProcess], certificate: tuple[str, str], tmp_path: Path, in_one_file: bool
) -> None:
    cert, key = certificate
    settings = {"ssl_certfile": cert, "ssl_keyfile": key}
    if in_one_file:
        both = tmp_path / "both.pem"
        both.write_text(Path(cert).read_text() + Path(key).read_text())
        settings = {"ssl_certfile": str(both)}
    server = serve_process(settings=settings, ready=False)
    assert server.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=cert)
    with httpx.Client(base_url=server.url, verify=context, trust_env=False, timeout=20) as client:
        assert client.get("/health").json() == {"status": "ok"}


def test_a_certificate_is_renewed_while_the_server_runs(
    serve_process: Callable[..., ServerProcess], certificate: tuple[str, str], tmp_path: Path
) -> None:
    old, new = certificate, make_certificate(tmp_path)
    cert, key = (Path(shutil.copy(path, tmp_path / name)) for path, name in zip(old, ("c.pem", "k.pem"), strict=True))
    log = tmp_path / "log"
    server = serve_process(settings={"ssl_certfile": str(cert), "ssl_keyfile": str(key)}, ready=False, log=log)

    def client(authority: str) -> httpx.Client:
        context = ssl.create_default_context(cafile=authority)
        return httpx.Client(base_url=server.url, verify=context, trust_env=False, timeout=20)

    def is_known_to(authority: str) -> bool:
        try:
            with client(authority) as fresh:
                return fresh.get("/health").status_code == 200
        except httpx.ConnectError:
            return False

    with client(old[0]) as open_before:
        assert open_before.get("/health").status_code == 200
        assert not is_known_to(new[0])
        cert.write_text("half a")
        wait_for(lambda: "no certificate in PEM form" in log.read_text())
        assert is_known_to(old[0])
        shutil.copy(new[1], key)
        shutil.copy(new[0], cert)
        wait_for(lambda: is_known_to(new[0]))
        assert not is_known_to(old[0])
        assert open_before.get("/health").status_code == 200
    assert log.read_text().count("no certificate in PEM form") == 1


def test_files_that_are_no_certificate_and_key_are_told_apart(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    check_certificate(cert, key)
    with pytest.raises(ValueError, match=f"^ssl_certfile {key}: no certificate"):
        check_certificate(key, key)
    with pytest.raises(ValueError, match=f"^ssl_certfile {cert}: no certificate .* in the same file"):
        check_certificate(cert, None)
    other, locked = str(tmp_path / "other.pem"), str(tmp_path / "locked.pem")
    make = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out"
    subprocess.run([*make.split(), other], check=True, capture_output=True)
    with pytest.raises(ValueError, match=f"^ssl_keyfile {other}: not the key of {cert}"):
        check_certificate(cert, other)
    lock = f"openssl pkey -in {key} -aes256 -passout pass:secret -out {locked}"
    subprocess.run(lock.split(), check=True, capture_output=True)
    with pytest.raises(ValueError, match="unencrypted"):
        check_certificate(cert, locked)


# Origins

PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


def test_pages_of_other_origins_are_not_let_in_by_default(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"origin": "https://a.example"})
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert http.options("/v1/completions", headers={"origin": "https://a.example", **PREFLIGHT}).status_code == 405


def test_pages_of_allowed_origins_are_let_in_with_a_key(serve_in_thread: Serve) -> None:
    settings = {"allowed_origins": ["https://a.example", "http://localhost:3000"], "api_key": ["k"]}
    with serve_in_thread(settings=settings).client() as client:
        for origin in settings["allowed_origins"]:
            asked = client.options("/v1/completions", headers={"origin": origin, **PREFLIGHT})
            assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, origin)
            assert "authorization" in asked.headers["access-control-allow-headers"]
            answer = client.get("/v1/models", headers={"origin": origin, "authorization": "Bearer k"})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            refused = client.get("/v1/models", headers={"origin": origin})  # the page may read why
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
        stranger = {"origin": "https://b.example"}
        assert client.options("/v1/completions", headers={**stranger, **PREFLIGHT}).status_code == 400
        answer = client.get("/v1/models", headers={**stranger, "authorization": "Bearer k"})
        assert "access-control-allow-origin" not in answer.headers


def test_any_origin_may_be_allowed(serve_in_thread: Serve) -> None:
    with serve_in_thread(settings={"allowed_origins": ["*"]}).client() as client:
        answer = client.get("/v1/models", headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
