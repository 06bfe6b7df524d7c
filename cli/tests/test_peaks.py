"""What processes and their children take together."""

import os
import subprocess
import sys

from soundstage_cli.peaks import find_family, sum_used

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
input()
child.communicate()
"""


def test_a_family_is_a_process_and_all_that_descend_from_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert find_family(parent.pid) == [parent.pid, child]
        assert find_family(child) == [child]
        assert set(find_family(os.getpid())) >= {os.getpid(), parent.pid, child}
        parent.communicate("\n")


def test_what_a_family_has_of_a_card_is_that_of_its_members() -> None:
    used = {1: 10, 2: 20, 3: 40}
    assert sum_used([1, 3, 7], used) == 50
    assert sum_used([7], used) is None
