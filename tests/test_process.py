"""What torch frees stays for the next batch, if the user has set no limits; a team of threads is let go."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from kvembed.process import keep_freed_memory
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
    given_back = max(faults("", monkeypatch) for _ in range(3))  # how much is given back depends on where things lie
    assert given_back > 10_000  # pages; more than 1 MB a layer
    assert faults("keep_freed_memory()", monkeypatch) < given_back / 10
    assert faults("keep_freed_memory()", monkeypatch, MALLOC_MMAP_THRESHOLD_="65536") > given_back / 2


def test_what_is_imported_is_never_looked_through_again():
    code = """
import gc, sys
from kvembed.process import import_models
looked = []
gc.callbacks.append(lambda phase, _: looked.append(phase))
import_models()
assert "kvembed.embedder" in sys.modules and not looked
assert gc.isenabled() and gc.get_freeze_count() > 100_000
frozen = gc.get_freeze_count()
import_models()
assert gc.isenabled() and gc.get_freeze_count() == frozen
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems' OpenMP has no such teams")
def test_the_threads_of_one_who_leaves_are_let_go():
    code = """
import os, time, torch
from kvembed.process import release_openmp_threads
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
before = count()
states = torch.ones(1 << 22) * 2
team = count()
release_openmp_threads()
for _ in range(500):  # the kernel lists a thread that has ended a moment longer
    if count() == before:
        break
    time.sleep(0.01)
print(before, team, count(), float((states * 2).sum()) / states.numel())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    before, team, left, computed = map(float, done.stdout.split())
    assert team == before + 3
    assert left == before
    assert computed == 4
