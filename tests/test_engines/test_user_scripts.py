"""The scripts in docs/guides/engines/ run before and after their diff, which is one import and one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "guides" / "engines"
SCRIPT = re.compile(r"^<!-- script -->\n```diff\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
# Counts what the script sends, from outside.
METER = """
import json, os, runpy, sys
from dist_ssn.comm import CommMeter
if sys.argv[1] == "deepspeed":
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # is compiled at the start otherwise, for half a minute
meter = CommMeter().__enter__()
runpy.run_path("script.py", run_name="__main__")
if os.environ["RANK"] == "0":
    print(json.dumps(sum(r["logical_bytes"] for r in meter.ledger.rows() if r["purpose"] != "initialization")))
sys.stdout.flush()
os._exit(0)  # one of gloo's threads may abort the interpreter at its end (docs/faq.md)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_a_users_own_script_needs_one_line(engine: str, tmp_path: Path) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    text = (DOCS / f"{engine}.md").read_text()
    (diff,) = SCRIPT.findall(text)
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert added == ["import dist_ssn", "dist_ssn.share(model, 0.1)"]
    assert all(line[:1] in (" ", "+", "") for line in diff.splitlines())
    for name, content in FILE.findall(text):
        (tmp_path / name).write_text(content)
    (tmp_path / "metered.py").write_text(METER)
    sent = []
    for signs in (" ", " +"):
        lines = [line[1:] for line in diff.splitlines() if not line or line[0] in signs]
        (tmp_path / "script.py").write_text("\n".join(lines) + "\n")
        command = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        done = subprocess.run(
            [sys.executable, *command, "metered.py", engine],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        sent.append(int(re.findall(r"^\d+$", done.stdout, re.M)[-1]))
    dense, shared = sent
    assert dense / shared > 5  # a tenth of the weights, and all biases and norms
