from __future__ import annotations

from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from structlog.testing import capture_logs

from tolaria.security.certificates import TlsFiles
from tolaria.service.protection import _warn_of_expiry

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("content", [None, "half of a certi"])
async def test_a_certificate_that_cannot_be_read_is_logged_and_ends_nothing(
    tmp_path: Path, content: str | None
) -> None:
    """The one in force stays, and another look follows."""
    path = tmp_path / "server.pem"
    if content is not None:
        path.write_text(content)
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_warn_of_expiry, TlsFiles("server", str(path), str(path)))
            with anyio.fail_after(60):
                while not logs:
                    await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    (line,) = logs
    assert line["event"] == "certificate_expiry_unknown"
    assert "server.tls_cert" in line["detail"]
