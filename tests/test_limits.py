"""Lessons beside each other are as many as the container has cores and memory for, however it says so."""

import os

import pytest

from course_lib.course import limits
from course_lib.course import run as runner

GIGABYTE = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a file system in which Linux tells about control groups; the machine has 8 cores, 32 GB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 32 * GIGABYTE // 4096}.get)

    def make(groups, files):
        for name, text in {
            "proc/self/cgroup": groups,
            **{f"sys/fs/cgroup/{file}": files[file] for file in files},
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize(
    "groups, files, cores, memory",
    [
        ("", {}, 8, 32),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, 8, 32),
        ("0::/\n", {"cpu.max": "200000 100000\n", "memory.max": f"{6 * GIGABYTE}\n"}, 2, 6),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1, 32),  # half a core more is none
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1, 32),
        ("0::/\n", {"cpu.max": "3200000 100000\n"}, 8, 32),  # more than there is
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3, 32),  # what is around counts too
        (
            "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n",
            {
                "cpu,cpuacct/docker/x/cpu.cfs_quota_us": "400000\n",
                "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
                "memory/docker/x/memory.limit_in_bytes": f"{5 * GIGABYTE}\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            4,
            5,
        ),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 8, 32),
        ("nonsense\n", {"cpu.max": "", "memory.max": "much"}, 8, 32),
    ],
)
def test_limits_of_a_container_are_known(machine, groups, files, cores, memory):
    root = machine(groups, files)
    assert (limits.cores(root), limits.memory(root)) == (cores, memory * GIGABYTE)


def test_other_systems_have_no_control_groups(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (limits.cores(tmp_path), limits.memory(tmp_path)) == (1, None)


@pytest.mark.parametrize(
    "said, count", [("4", 4), ("2,1", 2), (" 3 ", 3), ("", 1), ("0", 1), ("many", 1), ("-2", 1), ("2.5", 2)]
)
def test_threads_are_the_first_number_or_one(monkeypatch, said, count):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert limits.threads() == count
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert limits.threads() == 1


@pytest.mark.parametrize(
    "cores, memory, threads, at_once",
    [(2, 16, "1", 2), (2, 4, "1", 1), (8, 32, "2,1", 4), (1, 1, "4", 1), (4, None, "", 1), (16, 128, "1", 16)],
)
def test_so_many_lessons_run_beside_each_other(monkeypatch, cores, memory, threads, at_once):
    monkeypatch.setattr(limits, "cores", lambda: cores)
    monkeypatch.setattr(limits, "memory", lambda: memory and memory * GIGABYTE)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert runner._fitting() == at_once
