"""What torch frees stays for the next batch; a user who has set limits is heard."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from kvembed.heap import keep_for_the_next_batch
{set}
@torch.inference_mode()
def batch(states=torch.randn(2048, 576)):
    for _ in range(30):  # layers
        wide = states * states.pow(2).mean(-1, keepdim=True).rsqrt()
        wide = torch.cat([wide] * 3, -1)
        torch.nn.functional.silu(wide) * wide
batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(setting, monkeypatch, **environment):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(set=setting)], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly")
def test_no_page_is_fetched_twice(monkeypatch):
    given_back = faults("", monkeypatch)
    assert given_back > 10_000  # pages; more than 1 MB a layer
    assert faults("keep_for_the_next_batch()", monkeypatch) < given_back / 10
    assert faults("keep_for_the_next_batch()", monkeypatch, MALLOC_MMAP_THRESHOLD_="65536") > given_back / 2
