"""Asking malloc to keep its memory."""

import platform
import subprocess
import sys
import textwrap

import pytest

from memzoo import host


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_kept_pages_are_not_taken_from_the_system_again():
    """A block of 64 MB, freed and taken again: its pages are there. In a process of its own, as this is for good."""
    code = """
        import ctypes, resource
        from memzoo import host
        assert host.keep_pages()
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = libc.malloc(2**26)
            ctypes.memset(block, 1, 2**26)
            libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(faults(), faults())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    first, again = map(int, done.stdout.split())
    assert again < first / 10


def test_other_systems_say_no(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert host.keep_pages() is False
