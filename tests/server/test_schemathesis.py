"""schemathesis on `/openapi.json`: what the document allows and what it forbids, at every route.

No answer is a 5xx, and status, content type and body are what the document says. That what it allows is always answered
is not asked for: it cannot say what one field means for another, and that a whole number is written without a fraction.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from answers import samples, wait_for
from conftest import Running, ServerProcess

RUN = "--generation-deterministic --exclude-checks positive_data_acceptance --max-failures 20 --no-color --report json"


def explore(url: str, directory: Path, options: str) -> dict[str, Any]:
    """Runs schemathesis against a server; what it found wrong fails the test. Gives its report."""
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *RUN.split(), *options.split()],
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (report,) = directory.glob("schemathesis-report/*.json")
    return json.loads(report.read_text())  # type: ignore[no-any-return]


def assert_explored(report: dict[str, Any], document: Any) -> None:
    """Every operation of the document was asked, and answered more than with a refusal."""
    operations = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    assert report["operations"]["tested"] == len(operations) >= 12
    for operation in operations:
        assert sum(phase["accepted"] for phase in report["valid_rates"][operation].values()) > 0, operation


def test_all_that_the_document_allows_and_forbids_is_answered_as_it_says(shared: Running, tmp_path: Path) -> None:
    report = explore(shared.url, tmp_path, "--max-examples 10 --phases examples,coverage,fuzzing,stateful")
    assert report["test_cases"]["generated"] > 500
    with shared.client() as client:
        assert_explored(report, client.get("/openapi.json").json())
        wait_for(lambda: shared.server.service.client.num_live == 0)
        assert samples(client.get("/metrics").text)["hnet_prompt_backlog_bytes"] == 0


def test_hnet_serve_answers_as_its_document_says(demo: ServerProcess, tmp_path: Path) -> None:
    report = explore(demo.url, tmp_path, "--max-examples 4 --phases examples,fuzzing")
    with demo.client() as client:
        assert_explored(report, client.get("/openapi.json").json())
        wait_for(lambda: samples(client.get("/metrics").text)["hnet_num_requests_running"] == 0)
