from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading

import pytest

from sfumato.allocator import KEEPER, Keeper, kept, policy

FAULTS = """
import resource, sys
import torch
from sfumato.allocator import kept, policy

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.empty(10_000_000).fill_(1)  # 40 MB, above any threshold of glibc's own rule
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
plain = faults(3)
with kept():
    faults(12)  # until small ones have found places between them
    inside = faults(3)
print(plain, inside, faults(3), policy()[0])
"""


def test_the_policy_says_why() -> None:
    assert policy({"SFUMATO_ALLOCATOR": "system"}) == ("system", "left alone by SFUMATO_ALLOCATOR=system")
    assert policy({"MALLOC_MMAP_THRESHOLD_": "9"})[0] == "system"
    assert policy({"LD_PRELOAD": "/usr/lib/libjemalloc.so"}) == ("system", "jemalloc is preloaded and left alone")
    with pytest.raises(ValueError, match="SFUMATO_ALLOCATOR = 'jemalloc'; use one of keep, system, or leave it unset"):
        policy({"SFUMATO_ALLOCATOR": "jemalloc"})


@pytest.mark.skipif(policy({})[0] == "system", reason="the allocator is not glibc's")
@pytest.mark.parametrize("asked", ["keep", "system"])
def test_large_buffers_are_kept_inside_and_only_there(asked: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"SFUMATO_ALLOCATOR": asked}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    *numbers, name = done.stdout.split()
    plain, inside, after = map(int, numbers)
    print(f"page faults of three buffers of 40 MB: {plain}, kept {inside}, afterwards {after}")
    assert name == asked and plain > 20 and after > plain / 2
    assert inside < plain / 10 if asked == "keep" else inside > plain / 2


def test_it_counts_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_ALLOCATOR", "system")
    with kept():
        assert KEEPER._inside == 0
    keeper = Keeper()
    threads = [threading.Thread(target=keeper.enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keeper._inside == 4
    for _ in threads:
        keeper.leave()
    assert keeper._inside == 0 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
