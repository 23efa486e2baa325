from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from answers import wait_for
from conftest import Running

from server import files
from server.auth import KeyRing


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring looks at its file whenever it is asked."""
    monkeypatch.setattr(files, "CHECK_SECONDS", 0.0)


def test_every_key_opens_and_nothing_near_one_does() -> None:
    ring = KeyRing(["first", " second ", "dritté"])
    for key in ("first", "second", "dritté"):
        assert ring.knows(key.encode())
    for key in ("", "firs", "first ", "first,second", "#", "third"):
        assert not ring.knows(key.encode())


def test_a_file_has_a_key_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who: since when\n\n one \ntwo # no comment\n#three\n")
    ring = KeyRing(["always"], str(file))
    assert [key for key in ("always", "one", "two # no comment") if not ring.knows(key.encode())] == []
    assert [key for key in ("", "two", "#three", "three", "# who: since when") if ring.knows(key.encode())] == []


def test_keys_change_with_their_file(tmp_path: Path, at_once: None, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    ring = KeyRing(["always"], str(file))
    with caplog.at_level(logging.INFO):
        file.write_text("new\nold\n")
        assert ring.knows(b"new")
        assert ring.knows(b"old")
        other = tmp_path / "keys.new"
        other.write_text("newer\n")
        other.rename(file)  # as whoever changes it in one step does
        assert ring.knows(b"newer")
        assert not ring.knows(b"old")
    assert ring.knows(b"always")
    assert "2 API keys are in force" in caplog.text
    assert "newer" not in caplog.text


@pytest.mark.parametrize("spoil", ["empty", "comments", "gone", "bytes"])
def test_a_file_that_is_spoilt_leaves_the_last_keys_and_is_logged_once(
    tmp_path: Path, at_once: None, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    ring = KeyRing([], str(file))
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "comments": b"# none\n\n", "bytes": b"\xff\xfe\n"}[spoil])
    for _ in range(3):
        assert ring.knows(b"old")
        assert not ring.knows(b"")
        assert not ring.knows(b"# none")
    assert len([record for record in caplog.records if str(file) in record.message]) == 1
    file.write_text("fresh\n")
    os.utime(file, ns=(0, 0))  # also where the clock went back
    assert ring.knows(b"fresh")
    assert not ring.knows(b"old")


@pytest.mark.parametrize(("content", "named"), [(None, "No such file"), ("", "no key"), ("# a\n", "no key")])
def test_a_ring_does_not_begin_without_a_key_of_its_file(tmp_path: Path, content: str | None, named: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"^api_key_file {file}: .*{named}"):
        KeyRing(["always"], str(file))


def test_keys_are_exchanged_while_the_server_runs(serve_in_thread: Callable[..., Running], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    running = serve_in_thread(settings={"api_key": ["a", "b"], "api_key_file": str(file)})
    with running.client() as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        assert [status(key) for key in ("a", "b", "old", "new")] == [200, 200, 200, 401]
        file.write_text("new\n")
        wait_for(lambda: status("new") == 200)
        assert [status(key) for key in ("a", "b", "old")] == [200, 200, 401]
