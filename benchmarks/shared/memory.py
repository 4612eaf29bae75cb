"""Resident memory of a process, and an environment in which freed memory shows in it."""

from pathlib import Path

# glibc gives freed memory back to the system, so that the next measurement does not hide in it.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def resident(field: str) -> int:
    """Resident memory of this process in bytes: VmRSS as it is, VmHWM at its highest."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
