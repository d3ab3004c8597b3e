"""`dyvte-engine serve` in a process of its own on 127.0.0.1."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from .common import until

LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:(\d+))")


class ServerProcess:
    """Ready when it is made. `options` are the command's; its stderr is in `log`."""

    def __init__(self, log: Path, *options: str, model: str = "nano", **environment: str):
        self.log = log
        words = [sys.executable, "-m", "dyvte_engine.commands.main", "serve", model, "--port", "0", *options]
        paths = os.pathsep.join(filter(None, sys.path))
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                words, env={**os.environ, "PYTHONPATH": paths, **environment}, stderr=stderr
            )
        try:
            until(self._listens, 120)
            self.address, self.port = self._found[1], int(self._found[2])
            until(self._healthy, 60)
        except BaseException:
            self.kill()
            raise

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        self._found = LISTENING.search(self.log.read_text())
        return self._found is not None

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def memory(self) -> float:
        """MiB of it that are in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    @property
    def descriptors(self) -> int:
        """Open files and connections."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def gauge(self, name: str) -> float:
        """A value of /metrics."""
        return float(re.search(rf"^dyvte:{name}{{.*}} (\S+)$", httpx.get(f"{self.address}/metrics").text, re.M)[1])

    @property
    def idle(self) -> bool:
        """No request is under way, no page is promised to one."""
        return not any(map(self.gauge, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")))

    def stop(self, seconds: float = 90) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
