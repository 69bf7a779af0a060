from pathlib import Path

import psutil
import pytest

from knockon import cluster, devices
from knockon.data import memory
from knockon.data.memory import free_memory, written

NONE = 9223372036854771712
"""How version 1 of control groups says that there is no limit."""


def group(folder: Path, names: tuple[str, str], numbers: tuple[object, object], stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in zip(names, numbers, strict=True):
        (folder / name).write_text(f"{number}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{stat}\n")


def second(folder: Path, limit: object, used: int, cache: int = 0) -> None:
    group(folder, ("memory.max", "memory.current"), (limit, used), f"inactive_file {cache}")


def first(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(folder, names, (limit, used), f"inactive_file 1\ntotal_inactive_file {cache}")


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (2.5e9, "2.5 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_amounts_are_written_as_people_read_them(amount: float, text: str) -> None:
    assert written(amount) == text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def belongs(root: Path, text: str) -> Path:
    (root / "proc/self/cgroup").write_text(text)
    return root / "sys/fs/cgroup"


def about(left: int) -> object:
    return pytest.approx(left, rel=0.05)


def test_without_a_control_group_the_machine_counts(root: Path, tmp_path: Path) -> None:
    for text in ("", "0::/\n", "0::/user/job\n", "3:cpu:/x\n0::/\n"):
        belongs(root, text)
        assert free_memory(root) == about(psutil.virtual_memory().available)
    assert free_memory(tmp_path / "nothing") == about(psutil.virtual_memory().available)


def test_the_own_group_counts_and_its_page_cache_is_free(root: Path) -> None:
    groups = belongs(root, "0::/slurm/job\n")
    second(groups / "slurm/job", 9000, 4000, cache=1500)
    assert free_memory(root) == 9000 - 4000 + 1500
    second(groups / "slurm/job", "max", 4000)
    assert free_memory(root) == about(psutil.virtual_memory().available)


def test_groups_above_count_and_groups_beside_do_not(root: Path) -> None:
    groups = belongs(root, "0::/slurm/job/step\n")
    second(groups / "slurm", 700, 200)
    second(groups / "slurm/job", 9000, 4000)
    second(groups / "slurm/other", 50, 40)
    assert free_memory(root) == 500
    second(groups, 300, 200)
    assert free_memory(root) == 100


def test_an_exhausted_group_leaves_nothing(root: Path) -> None:
    second(belongs(root, "0::/\n"), 100, 120)
    assert free_memory(root) == 0


def test_version_1_has_a_folder_for_memory(root: Path) -> None:
    groups = belongs(root, "5:cpu,cpuacct:/a\n4:memory,hugetlb:/docker/x\n0::/\n")
    first(groups / "memory", NONE, 4000)
    assert free_memory(root) == about(psutil.virtual_memory().available)
    first(groups / "memory/docker/x", 9000, 4000, cache=1000)
    first(groups / "memory/a", 10, 4)
    assert free_memory(root) == 6000


def test_a_container_sees_its_group_as_the_topmost(root: Path) -> None:
    """The path is that of the machine outside, of which there are no folders in here."""
    first(belongs(root, "4:memory:/docker/x\n") / "memory", 9000, 4000)
    assert free_memory(root) == 5000


def test_what_is_free_is_shared_with_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1200)
    assert memory.own_memory() == 1200
    monkeypatch.setattr(devices, "neighbors", lambda: 3)
    assert memory.own_memory() == 400
    monkeypatch.setattr(cluster, "limit", lambda: 300)
    assert memory.own_memory() == 300
