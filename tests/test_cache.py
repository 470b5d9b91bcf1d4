"""The cache of base spectra: served bit by bit or computed again, whatever happens to the folder meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from spectra.cache import ABANDONED, BLOCK, Entry, SpectrumCache, key_of
from spectra.errors import SpectraError
from spectra.linalg.svd import NotFiniteError, Spectrum, svd
from tests.strategies import weights

PRECISIONS = (torch.float32, torch.float64)
SPAWN = multiprocessing.get_context("spawn")


def never() -> Spectrum:
    raise AssertionError("what is in the cache was computed again")


def weight(seed: int, m: int = 12, n: int = 8) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def some_spectrum(seed: int, m: int = 12, n: int = 8) -> Spectrum:
    """What a computation might have given; the same in every process."""
    generator = torch.Generator().manual_seed(1000 + seed)
    U, V = (torch.randn(side, min(m, n), generator=generator) for side in (m, n))
    return Spectrum(U, torch.randn(min(m, n), generator=generator).double(), V, "gram64")


def ask(cache: SpectrumCache, seed: int, compute: Callable[[], Spectrum] | None = None) -> Spectrum:
    found = cache.spectrum(weight(seed), torch.float32, compute or (lambda: some_spectrum(seed)))
    assert_same(found, some_spectrum(seed))
    return found


def path_of(cache: SpectrumCache, seed: int) -> Path:
    return cache.folder / f"{key_of(weight(seed), torch.float32)}.safetensors"


def held(cache: SpectrumCache, *seeds: int) -> set[int]:
    return {seed for seed in seeds if path_of(cache, seed).exists()}


def assert_same(found: Spectrum, expected: Spectrum) -> None:
    """Bit by bit, and in the same memory order where the order of a matrix can be told."""
    assert found.algorithm == expected.algorithm
    for X, Y in ((found.U, expected.U), (found.S, expected.S), (found.V, expected.V)):
        assert X.dtype == Y.dtype
        assert X.shape == Y.shape
        assert X.is_contiguous() == Y.is_contiguous()
        assert torch.equal(X.reshape(-1).view(torch.uint8), Y.reshape(-1).view(torch.uint8))


def bits(W: Tensor) -> list[int]:
    return W.reshape(-1).view(torch.uint8).tolist()


# What is served


@given(W=weights(), dtype=st.sampled_from(PRECISIONS))
def test_a_served_spectrum_is_bitwise_the_computed_one(
    tmp_path_factory: pytest.TempPathFactory, W: Tensor, dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    computed = SpectrumCache(folder).spectrum(W, dtype, lambda: svd(W, dtype))
    again = SpectrumCache(folder)
    served = again.spectrum(W, dtype, never)
    assert_same(served, computed)
    assert_same(served, svd(W, dtype))
    assert (again.hits, again.misses, again.notes) == (1, 0, ())


@pytest.mark.parametrize("turned_U", [False, True])
@pytest.mark.parametrize("turned_V", [False, True])
def test_products_with_a_served_spectrum_round_as_with_the_computed_one(
    tmp_path: Path, turned_U: bool, turned_V: bool
) -> None:
    W = weight(0, 96, 80)
    spectrum = svd(W)
    U = spectrum.U.T.contiguous().T if turned_U else spectrum.U.contiguous()
    V = spectrum.V.T.contiguous().T if turned_V else spectrum.V.contiguous()
    computed = Spectrum(U, spectrum.S, V, spectrum.algorithm)
    SpectrumCache(tmp_path).spectrum(W, torch.float32, lambda: computed)
    served = SpectrumCache(tmp_path).spectrum(W, torch.float32, never)
    assert served.U.stride() == U.stride()
    assert served.V.stride() == V.stride()
    assert torch.equal(served.U.T @ W @ served.V, U.T @ W @ V)


def test_vectors_that_are_views_of_something_larger_are_kept_whole(tmp_path: Path) -> None:
    W, spectrum = weight(0), some_spectrum(0)
    scattered = Spectrum(spectrum.U.repeat(1, 2)[:, :8], spectrum.S, spectrum.V.repeat(2, 2)[::2, ::2], "gram64")
    SpectrumCache(tmp_path).spectrum(W, torch.float32, lambda: scattered)
    served = SpectrumCache(tmp_path).spectrum(W, torch.float32, never)
    assert torch.equal(served.U, scattered.U)
    assert torch.equal(served.V, scattered.V)


def test_an_entry_is_a_safetensors_file_that_others_can_read(tmp_path: Path) -> None:
    for W in (weight(0), weight(0).double()):  # the second one's factors lie column by column
        cache = SpectrumCache(tmp_path)
        cache.spectrum(W, W.dtype, lambda W=W: svd(W))  # type: ignore[misc]
        with safe_open(tmp_path / f"{key_of(W, W.dtype)}.safetensors", "pt") as file:
            X = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        U = X["U"] if "U" in X else X["U_transposed"].T
        V = X["V"] if "V" in X else X["V_transposed"].T
        assert (U.double() * X["S"] @ V.double().T - W).abs().max() < 1e-5
        assert metadata["shape"] == "12x8"
        assert metadata["algorithm"] == svd(W).algorithm
        assert metadata["vectors"] == str(W.dtype).removeprefix("torch.")


def test_weights_that_differ_in_anything_are_kept_apart(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    W = weight(0, 6, 6)
    nudged = W.clone()
    nudged[5, 5] = torch.nextafter(nudged[5, 5], torch.tensor(9.0))
    for X in (W, W.T, nudged, W.double(), W.bfloat16(), W.bfloat16().float(), W.reshape(4, 9), W.reshape(9, 4)):
        for dtype in PRECISIONS:
            assert_same(cache.spectrum(X, dtype, lambda X=X, dtype=dtype: svd(X, dtype)), svd(X, dtype))  # type: ignore[misc]
    assert (cache.hits, cache.misses) == (0, 16)


def test_what_compute_refuses_is_refused_and_not_kept(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    W = torch.full((3, 3), float("nan"))
    for _ in range(2):
        with pytest.raises(NotFiniteError):
            cache.spectrum(W, torch.float32, lambda: svd(W))
    assert cache.entries() == []
    with pytest.raises(ValueError, match="float64"):
        cache.spectrum(weight(0), torch.float64, lambda: some_spectrum(0))
    assert cache.entries() == []


# The key


@given(W=weights(), dtype=st.sampled_from(PRECISIONS))
def test_the_key_depends_on_the_entries_and_not_on_how_they_lie_in_memory(W: Tensor, dtype: torch.dtype) -> None:
    m, n = W.shape
    larger = torch.zeros(2 * m + 1, 3 * n + 2, dtype=W.dtype)
    larger[1::2, 2::3] = W
    shuffled = torch.zeros(m, 1, n, 2, dtype=W.dtype)
    shuffled[:, 0, :, 1] = W
    layouts = (
        W.clone(memory_format=torch.contiguous_format),
        W.T.contiguous().T,
        larger[1::2, 2::3],
        shuffled[:, 0, :, 1],
        torch.nn.Parameter(W),
    )
    assert {key_of(layout, dtype) for layout in layouts} == {key_of(W, dtype)}


@given(W=weights(), dtype=st.sampled_from(PRECISIONS))
def test_a_transposed_view_is_another_matrix(W: Tensor, dtype: torch.dtype) -> None:
    same = W.shape == W.T.shape and bits(W) == bits(W.T)
    assert (key_of(W.T, dtype) == key_of(W, dtype)) == same


@pytest.mark.parametrize("shape", [(1, BLOCK // 4 + 77), (3, BLOCK // 4 + 77), (BLOCK // 64, 33)])
def test_the_key_of_a_weight_that_is_hashed_in_blocks(shape: tuple[int, int]) -> None:
    W = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(torch.float32).reshape(shape)
    strided = torch.zeros(shape[0], shape[1] + 1)[:, 1:]
    strided.copy_(W)
    key = key_of(W, torch.float32)
    assert key_of(strided, torch.float32) == key
    assert key_of(W.T.contiguous().T, torch.float32) == key
    strided[-1, -1] = 1.0
    assert key_of(strided, torch.float32) != key


# A folder that was damaged


@given(data=st.data())
def test_a_changed_bit_anywhere_costs_a_computation_and_never_an_answer(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = SpectrumCache(tmp_path_factory.mktemp("cache"))
    ask(cache, 0)
    path = path_of(cache, 0)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    ask(cache, 0)
    assert (cache.hits, cache.misses) == (0, 2)
    ask(cache, 0, never)  # and the file is mended


@given(length=st.integers(0, 1300))
def test_a_truncated_file_is_computed_again(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    cache = SpectrumCache(tmp_path_factory.mktemp("cache"))
    ask(cache, 0)
    content = path_of(cache, 0).read_bytes()
    path_of(cache, 0).write_bytes(content[: min(length, len(content) - 1)])
    ask(cache, 0)
    assert cache.misses == 2
    ask(cache, 0, never)


FOREIGN = {
    "longer": lambda content: content + b"\0",
    "another program's": lambda _: b"hello\n" * 1000,
    "nested beyond reason": lambda _: (4000).to_bytes(8, "little") + b"[" * 4000,
    "no metadata": lambda _: (16).to_bytes(8, "little") + b'{"a":1}         ',
    "enormous by its own account": lambda content: content.replace(b'"shape":"12x8"', b'"shape":"99999999999x8"'),
    "of a dtype that is none": lambda content: content.replace(b'"vectors":"float32"', b'"vectors":"argsort"'),
    "another version's": lambda content: content.replace(b'"algorithm":"gram64"', b'"algorithm":"gram32"'),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_file_is_computed_again_and_replaced(tmp_path: Path, what: str) -> None:
    cache = SpectrumCache(tmp_path)
    ask(cache, 0)
    content = path_of(cache, 0).read_bytes()
    damaged = FOREIGN[what](content)
    assert damaged != content
    path_of(cache, 0).write_bytes(damaged)
    assert all(isinstance(entry, Entry) for entry in cache.entries())
    ask(cache, 0)
    assert cache.misses == 2
    ask(cache, 0, never)


def test_a_renamed_entry_is_not_served_for_another_weight(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    ask(cache, 0)
    shutil.move(path_of(cache, 0), path_of(cache, 1))
    ask(cache, 1)
    ask(cache, 0)
    assert (cache.hits, cache.misses) == (0, 3)


def test_a_safetensors_file_of_the_right_tensors_is_not_believed(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    wrong = some_spectrum(7)
    save_file({"U": wrong.U, "S": wrong.S, "V": wrong.V}, path_of(cache, 0), {"key": path_of(cache, 0).stem})
    ask(cache, 0)
    ask(cache, 0, never)


def test_a_folder_in_the_place_of_an_entry_is_noted_and_harms_nothing(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    path_of(cache, 0).mkdir()
    ask(cache, 0)
    ask(cache, 0)
    assert cache.misses == 2
    assert len(cache.notes) == 1


def test_a_broken_entry_is_listed_as_such(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    ask(cache, 0)
    path_of(cache, 0).write_bytes(b"short")
    (entry,) = cache.entries()
    assert (entry.bytes, entry.algorithm) == (5, "unreadable")


@pytest.mark.parametrize("remains", [False, True], ids=["removed", "replaced by a file"])
def test_a_folder_that_goes_away_costs_the_entries_and_is_noted_once(tmp_path: Path, remains: bool) -> None:
    cache = SpectrumCache(tmp_path / "cache")
    ask(cache, 0)
    shutil.rmtree(cache.folder)
    if remains:
        cache.folder.touch()
    ask(cache, 0)
    ask(cache, 1)
    assert (cache.hits, cache.misses) == (0, 3)
    (note,) = cache.notes
    assert str(cache.folder) in note


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_becomes_read_only_still_serves(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    ask(cache, 0)
    tmp_path.chmod(0o555)
    try:
        ask(cache, 0, never)
        ask(cache, 1)
        assert len(cache.notes) == 1
        with pytest.raises(SpectraError, match="choose another folder"):
            SpectrumCache(tmp_path)
    finally:
        tmp_path.chmod(0o755)


def test_what_cannot_be_a_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SpectraError, match=r"cannot write into the cache .*file.*; choose another folder for it$"):
            SpectrumCache(folder)
    with pytest.raises(SpectraError, match="must not be negative"):
        SpectrumCache(tmp_path, -1)


# The limit


def entry_size(folder: Path) -> int:
    cache = SpectrumCache(folder)
    ask(cache, 0)
    return path_of(cache, 0).stat().st_size


def age(cache: SpectrumCache, *seeds: int) -> None:
    """Set the times of use of these entries, the first one's the longest ago."""
    for index, seed in enumerate(seeds):
        os.utime(path_of(cache, seed), (1e9 + index, 1e9 + index))


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path / "cache", int(3.5 * entry_size(tmp_path / "other")))
    for seed in (0, 1, 2):
        ask(cache, seed)
    age(cache, 0, 1, 2)
    ask(cache, 0, never)  # a hit is a use
    path_of(cache, 1).read_bytes()  # somebody's reading, a backup, is none
    ask(cache, 3)
    assert held(cache, 0, 1, 2, 3) == {0, 2, 3}
    age(cache, 3, 2, 0)
    ask(cache, 4)
    assert held(cache, 0, 1, 2, 3, 4) == {0, 2, 4}
    assert [entry.key for entry in cache.entries()] == [path_of(cache, seed).stem for seed in (4, 0, 2)]


def test_the_folder_never_exceeds_the_limit_and_keeps_the_newest(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path, 20_000)
    for index in range(60):
        m, n = 1 + 7 * index % 23, 1 + 5 * index % 19
        W = weight(index, m, n)
        cache.spectrum(W, torch.float32, lambda W=W: svd(W))  # type: ignore[misc]
        entries = cache.entries()
        assert sum(entry.bytes for entry in entries) <= 20_000
        assert key_of(W, torch.float32) in {entry.key for entry in entries}
    assert len(entries) > 5


def test_an_entry_larger_than_the_limit_is_not_kept_and_drives_nothing_out(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path, 2 * entry_size(tmp_path))
    large = weight(5, 40, 40)
    for _ in range(2):
        assert_same(cache.spectrum(large, torch.float32, lambda: svd(large)), svd(large))
    assert (cache.hits, cache.misses, cache.notes) == (0, 2, ())
    assert held(cache, 0) == {0}
    nothing = SpectrumCache(tmp_path / "nothing", 0)
    ask(nothing, 0)
    assert nothing.entries() == []


def test_a_smaller_limit_takes_effect_and_spares_what_is_not_an_entry(tmp_path: Path) -> None:
    size = entry_size(tmp_path)
    cache = SpectrumCache(tmp_path)
    for seed in range(6):
        ask(cache, seed)
    (tmp_path / "model.safetensors").write_bytes(bytes(10 * size))
    ask(SpectrumCache(tmp_path, 2 * size), 6)
    assert held(cache, *range(7)) == {6}
    assert (tmp_path / "model.safetensors").exists()


def test_clear_says_what_it_freed_and_removes_only_its_own(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    for seed in range(3):
        ask(cache, seed)
    (tmp_path / "model.safetensors").write_text("mine")
    assert cache.clear() == 3 * entry_size(tmp_path / "other")
    assert cache.entries() == []
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    ask(cache, 0)
    ask(cache, 0, never)


# Threads


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run work(0), work(1), ... at once; raises what one of them raised."""
    failures: list[BaseException] = []
    together = threading.Barrier(count)

    def run(index: int) -> None:
        together.wait()
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


def test_threads_that_ask_for_the_same_spectrum_compute_it_once(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    computed = []

    def compute() -> Spectrum:
        computed.append(1)
        time.sleep(0.1)  # so that the others come meanwhile
        return some_spectrum(0)

    in_threads(lambda _: bool(ask(cache, 0, compute)) and None, 8)
    assert len(computed) == 1
    assert (cache.hits, cache.misses) == (7, 1)


def test_a_thread_that_fails_does_not_fail_the_others(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    computed = []

    def compute() -> Spectrum:
        computed.append(1)
        time.sleep(0.05)
        if len(computed) == 1:
            raise MemoryError
        return some_spectrum(0)

    failed = []

    def work(_: int) -> None:
        try:
            ask(cache, 0, compute)
        except MemoryError:
            failed.append(1)

    in_threads(work, 4)
    assert (len(failed), len(computed), cache.hits) == (1, 2, 2)


def test_threads_with_a_full_folder_get_their_own_spectra(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    cache = SpectrumCache(tmp_path / "cache", 4 * size)
    umask = os.umask(0o027)
    try:
        in_threads(lambda index: [ask(cache, (index + step) % 9) for step in range(30)] and None, 6)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(umask)
    assert cache.hits + cache.misses == 180
    assert cache.notes == ()
    assert sum(entry.bytes for entry in cache.entries()) <= 4 * size
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {0o640}


# Processes


def use_at_random(folder: Path, limit: int, seed: int, results: SimpleQueue[tuple[int, int, tuple[str, ...]]]) -> None:
    cache = SpectrumCache(folder, limit)
    generator = torch.Generator().manual_seed(seed)
    for step in range(80):
        ask(cache, int(torch.randint(9, (1,), generator=generator)))
        cache.entries()
        if step % 25 == 24:
            cache.clear()
    results.put((cache.hits, cache.misses, cache.notes))


def test_processes_share_a_folder_while_they_fill_and_clear_it(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    results: SimpleQueue[tuple[int, int, tuple[str, ...]]] = SPAWN.SimpleQueue()
    processes = [
        SPAWN.Process(target=use_at_random, args=(tmp_path / "cache", 5 * size, seed, results)) for seed in (1, 2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
        hits, misses, notes = results.get()
        assert hits + misses == 80
        assert notes == ()
    assert all(entry.algorithm == "gram64" for entry in SpectrumCache(tmp_path / "cache").entries())
    assert not list((tmp_path / "cache").glob(".*"))


def fill_for_ever(folder: Path) -> None:
    cache = SpectrumCache(folder)
    for seed in range(10**9):
        W = torch.full((4, 4), float(seed))
        cache.spectrum(W, torch.float32, lambda W=W: svd(W))  # type: ignore[misc]


def test_a_killed_writer_leaves_a_usable_folder(tmp_path: Path) -> None:
    process = SPAWN.Process(target=fill_for_ever, args=(tmp_path,))
    process.start()
    until = time.monotonic() + 100
    while len(list(tmp_path.glob("[0-9a-f]*.safetensors"))) < 20 and time.monotonic() < until:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache = SpectrumCache(tmp_path)
    assert len(cache.entries()) >= 20
    assert all(entry.algorithm != "unreadable" for entry in cache.entries())
    for seed in range(20):
        W = torch.full((4, 4), float(seed))
        cache.spectrum(W, torch.float32, never)
    ask(cache, 0)
    ask(cache, 0, never)


def write_too_much(folder: Path, dies: bool, results: SimpleQueue[tuple[int, tuple[str, ...]]]) -> None:
    """Where no file may exceed 600 bytes: the write ends in the middle, with an error or with the process."""
    cache = SpectrumCache(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if dies:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    ask(cache, 0)
    ask(cache, 1)
    results.put((cache.misses, cache.notes))


def test_a_full_disk_loses_no_spectrum(tmp_path: Path) -> None:
    results: SimpleQueue[tuple[int, tuple[str, ...]]] = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=write_too_much, args=(tmp_path, False, results))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    misses, (note,) = results.get()
    assert misses == 2
    assert "File too large" in note
    assert list(tmp_path.iterdir()) == []


def test_what_a_writer_left_that_died_in_the_middle_is_swept_away_in_time(tmp_path: Path) -> None:
    results: SimpleQueue[tuple[int, tuple[str, ...]]] = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=write_too_much, args=(tmp_path, True, results))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGXFSZ
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    cache = SpectrumCache(tmp_path)
    assert cache.entries() == []
    ask(cache, 0)
    assert left.exists()  # it might be of a writer that is still at work
    os.utime(left, (time.time() - 2 * ABANDONED,) * 2)
    ask(SpectrumCache(tmp_path), 1)
    assert not left.exists()
    left.write_bytes(bytes(100))
    assert cache.clear() == 2 * entry_size(tmp_path / "other") + 100
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# The commands


def invoke(*arguments: str) -> str:
    from spectra_cli import cache

    app = typer.Typer()
    app.callback()(lambda: None)
    cache.register(app)
    return CliRunner().invoke(app, ["cache", *arguments], catch_exceptions=False).stdout


def test_ls_and_clear(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    ask(cache, 0)
    W = weight(1, 30, 20).double()
    cache.spectrum(W, torch.float64, lambda: svd(W))
    path_of(cache, 2).write_bytes(b"broken")
    age(cache, 2, 0)
    listed = invoke("ls", str(tmp_path))
    lines = listed.splitlines()
    assert "30 x 20" in lines[1]
    assert "float64" in lines[1]
    assert "gesdd64" in lines[1]
    assert "12 x 8" in lines[2]
    assert "2001-09-09" in lines[2]
    assert "unreadable" in lines[3]
    assert lines[4].startswith("3 spectra, 0.0 MiB, in ")
    rows = json.loads(invoke("ls", str(tmp_path), "--json"))
    assert [row["shape"] for row in rows] == [[30, 20], [12, 8], [0, 0]]
    assert rows[0]["key"] == key_of(W, torch.float64)
    assert "freed" in invoke("clear", str(tmp_path))
    assert cache.entries() == []
    assert invoke("ls", str(tmp_path)).startswith("0 spectra")


@pytest.mark.parametrize("command", ["ls", "clear"])
def test_a_folder_that_is_not_there_is_refused_and_not_made(tmp_path: Path, command: str) -> None:
    with pytest.raises(SpectraError, match=r"there is no folder .*nowhere; give the one"):
        invoke(command, str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
