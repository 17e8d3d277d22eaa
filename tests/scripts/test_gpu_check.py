"""The GPU check: real on virtual GPUs; what needs CUDA is held against a scripted node and a fake NVML."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
import torch
from gpu_checks import contexts, copies, memory
from gpu_checks import setup as checks_setup
from gpu_checks.record import Check, Findings, Outcome, Record, Unavailable
from gpu_checks.setup import Loaded, Parked, Setup

MIB = 1 << 20
TOTAL_MIB = 80_000


class FakeNvml:
    """Looks like ``pynvml`` with one GPU. ``used_mib``: what is in use, reading after reading; the last one stays."""

    class NVMLError(Exception):
        pass

    def __init__(self, *used_mib: float, gpus: int = 1) -> None:
        self.used_mib = list(used_mib) or [0.0]
        self.gpus = gpus
        self.open = 0
        self.compute_mode = 0
        self.processes: list[Any] = []

    def nvmlInit(self) -> None:
        if not self.gpus:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        used_mib = self.used_mib.pop(0) if len(self.used_mib) > 1 else self.used_mib[0]
        used = int(used_mib * MIB)
        return SimpleNamespace(total=TOTAL_MIB * MIB, used=used, free=TOTAL_MIB * MIB - used)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA Model T"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        return self.compute_mode

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return self.processes


class ScriptedNode:
    """Answers what it was told to."""

    def __init__(self, answers: dict[str, dict[str, Any]], memory_mib: float, load_s: float) -> None:
        self.answers = answers
        self.load_s = load_s
        self.memory_bytes = int(memory_mib * MIB)
        self.node = SimpleNamespace(processes=list)

    async def load(self, spec: Any) -> Loaded:
        return Loaded(self.load_s, self.memory_bytes)

    async def until_waiting(self, spec: Any, but: int | None = None) -> int:
        return 4712 if but == 4711 else 4711

    async def ask(self, spec: Any, what: str, value: float = 0.0) -> dict[str, Any]:
        return self.answers[what]

    async def until_measured(self, spec: Any, at_least_bytes: int) -> int:
        return int(self.answers["hoard"]["told_bytes"])

    async def offload(self, spec: Any) -> Parked:
        return Parked(0.02, 300 * MIB, 256 * MIB)

    async def restore(self, spec: Any) -> Loaded:
        return Loaded(0.01, self.memory_bytes)

    async def unload(self, spec: Any) -> float:
        return 0.1

    def report(self, spec: Any) -> Any:
        return SimpleNamespace(pid=4711, device_bytes=self.memory_bytes, private_bytes=0)


Scripted = Callable[..., Record]


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Runs one check as on a GPU whose node answers as told."""

    def run(check: Check, nvml: FakeNvml, memory_mib: float = 600.0, **answers: dict[str, Any]) -> Record:
        @asynccontextmanager
        async def node(
            self: Setup, memory_bytes: int | None = None, pool_contexts: int = 0
        ) -> AsyncIterator[ScriptedNode]:
            yield ScriptedNode(answers, memory_mib, 0.2 if pool_contexts else 0.5)

        monkeypatch.setattr(Setup, "node", node)
        setup = Setup(tmp_path, nvml_library=nvml, model_mib=256)
        setup.torch_cuda = "12.8"
        return asyncio.run(gpu_check.run_check("it", check, setup))

    return run


# As a whole


def test_the_checks_pass_on_virtual_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "SWAPS", 4)
    names = [name for name in gpu_check.CHECKS if name not in ("locality", "zygote")]  # those compare times
    status = gpu_check.main(["--virtual", "--json", "--model-mib", "4", "--only", ",".join(names)])
    document = json.loads(capsys.readouterr().out)
    records = {record["name"]: record for record in document["checks"]}
    needs_cuda = {"device", "allocator", "bandwidth", "staging", "overlap", "contexts"}
    assert {name for name, record in records.items() if record["outcome"] == "SKIP"} == needs_cuda
    assert [record for record in records.values() if record["outcome"] == "FAIL"] == []
    assert (status, document["virtual"], list(records)) == (0, True, names)
    assert records["memory figures"]["figures"]["node_mib"] == 4
    assert records["retry"]["figures"]["status"] == 502
    assert "raised by hand" in records["sticky error"]["why"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_checks_pass_on_this_machines_gpu() -> None:
    assert gpu_check.main(["--json"]) == 0


def test_forks_and_policies_are_compared_on_virtual_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check.policies, "MOST_CALLS", 20)
    setup = Setup(tmp_path, nvml_library=None, model_mib=4)
    progress = gpu_check.Console(quiet=True)
    forks, policies = asyncio.run(gpu_check.run_checks(["zygote", "locality"], setup, progress))
    assert "forked by the zygote" not in forks.why
    assert forks.figures["forked_load_s"] > 0
    assert "calls failed" not in policies.why
    assert policies.figures["calls"] == 20
    assert all(policies.figures[f"{policy}_misses"] >= 3 for policy in ("lb", "lalb", "lalb_o3"))


def test_without_a_gpu_it_says_so_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([], nvml_library=FakeNvml(gpus=0)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("no CUDA GPU can be used (Driver Not Loaded)")
    assert len(said.err.splitlines()) == 1


def test_a_gpu_without_a_torch_that_could_use_it_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Setup, "torch_cuda", "")
    library = FakeNvml(gpus=2)
    assert gpu_check.main([], nvml_library=library) == 0
    said = capsys.readouterr()
    assert said.out.count("torch is built without CUDA") >= len(gpu_check.CHECKS) - 1
    assert said.err.endswith(f"0 PASS, 0 FAIL, {len(gpu_check.CHECKS)} SKIP\n")
    assert library.open == 0


def test_a_failure_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fine(setup: Setup, found: Findings) -> None:
        found.figures |= {"load_s": 1.23456, "total_mib": 81559.0, "gpu": "[T]"}
        found.note = "as it should be"

    async def wrong(setup: Setup, found: Findings) -> None:
        found.expect(True, "never said")
        found.expect(False, "one thing")
        found.expect(False, "another")

    monkeypatch.setattr(gpu_check, "CHECKS", {"fine": fine, "wrong": wrong})
    assert gpu_check.main(["--virtual"]) == 1
    out = capsys.readouterr().out
    for shown in ("one thing; another", "load_s 1.235", "total_mib 81559", "gpu [T]", "as it should be"):
        assert shown in out


@pytest.mark.parametrize("arguments", [["--only", "nix"], ["--model-mib", "1"]])
def test_what_cannot_be_asked_for_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_of:
        gpu_check.parse(arguments)
    assert exit_of.value.code == 2
    assert "nix" in capsys.readouterr().err or "1" in arguments


def test_a_check_that_breaks_or_hangs_is_a_failure_of_its_own(tmp_path: Path) -> None:
    async def breaks(setup: Setup, found: Findings) -> None:
        found.figures["so_far"] = 1
        raise KeyError("x")

    async def hangs(setup: Setup, found: Findings) -> None:
        await asyncio.Event().wait()

    async def cannot(setup: Setup, found: Findings) -> None:
        setup.need_cuda()

    setup = Setup(tmp_path, nvml_library=None, model_mib=4)
    broken = asyncio.run(gpu_check.run_check("it", breaks, setup))
    assert (broken.outcome, broken.why, broken.figures) == (Outcome.FAIL, "KeyError: 'x'", {"so_far": 1})
    hung = asyncio.run(gpu_check.run_check("it", hangs, setup, 0.01))
    assert (hung.outcome, hung.why) == (Outcome.FAIL, "took longer than 0.01 s")
    skipped = asyncio.run(gpu_check.run_check("it", cannot, setup))
    assert (skipped.outcome, skipped.why) == (Outcome.SKIP, "needs a CUDA GPU")


# What only a GPU can show


SEEN = {
    "name": "NVIDIA Model T",
    "visible": 1,
    "total_bytes": 79_000 * MIB,
    "torch": "2",
    "cuda": "12.8",
    "capability": "9.0",
    "allocated_bytes": 256 * MIB,
    "reserved_bytes": 260 * MIB,
}


def test_nvml_and_torch_must_see_the_same_gpu(on_a_gpu: Scripted) -> None:
    record = on_a_gpu(memory.device, FakeNvml(500), device=SEEN)
    assert (record.outcome, record.figures["gpu"], record.figures["driver"]) == (
        Outcome.PASS,
        "NVIDIA Model T",
        "580.1",
    )
    exclusive = FakeNvml(500)
    exclusive.compute_mode = 3
    assert "compute mode (3)" in on_a_gpu(memory.device, exclusive, device=SEEN).why
    other = SEEN | {"name": "Another", "visible": 2, "total_bytes": 1000 * MIB}
    record = on_a_gpu(memory.device, FakeNvml(500), device=other)
    assert record.outcome is Outcome.FAIL
    for problem in ("torch calls the GPU Another", "sees 2 GPUs", "differ by a tenth", "more than there is"):
        assert problem in record.why


def test_a_models_figure_is_held_against_torch_and_the_device(on_a_gpu: Scripted) -> None:
    library = FakeNvml(1000, 1600)
    library.processes = [SimpleNamespace(pid=4711, usedGpuMemory=600 * MIB), SimpleNamespace(pid=1, usedGpuMemory=None)]
    record = on_a_gpu(memory.figures, library, device=SEEN)
    assert (record.outcome, record.figures["device_grew_mib"], record.figures["nvml_process_mib"]) == (
        Outcome.PASS,
        600,
        600,
    )
    # The device says that far more was taken.
    library.used_mib = [1000, 4000]
    assert "did not grow by what the node counts" in on_a_gpu(memory.figures, library, device=SEEN).why
    # In a container the driver's process ids mean nothing; torch's figure has to do.
    record = on_a_gpu(memory.figures, FakeNvml(1000, 1600), memory_mib=260, device=SEEN)
    assert record.outcome is Outcome.PASS
    assert "another PID namespace" in record.why
    record = on_a_gpu(memory.figures, FakeNvml(0, 100), memory_mib=100, device=SEEN)
    assert "the node counts less than the weights" in record.why


def test_processes_that_wait_must_save_time_and_keep_to_what_is_set_aside(
    on_a_gpu: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SETTLED_WITHIN_S", 0.05)
    library = FakeNvml(500, 900, 510)
    library.processes = [SimpleNamespace(pid=4711, usedGpuMemory=396 * MIB), SimpleNamespace(pid=1, usedGpuMemory=None)]
    record = on_a_gpu(contexts.contexts, library, scale={"value": 4.0})
    assert (record.outcome, record.figures["waiting_mib"], record.figures["nvml_process_mib"]) == (
        Outcome.PASS,
        400,
        396,
    )
    assert (record.figures["load_s"], record.figures["load_without_s"]) == (0.2, 0.5)
    # Memory that is not given back, more of it than is set aside, and nothing gained.
    original = ScriptedNode.__init__

    def slow(self: ScriptedNode, answers: Any, memory_mib: float, load_s: float) -> None:
        original(self, answers, memory_mib + 1000 * load_s, 1 - load_s)

    monkeypatch.setattr(ScriptedNode, "__init__", slow)
    monkeypatch.setattr(ScriptedNode, "report", lambda *_: SimpleNamespace(pid=1))
    assert on_a_gpu(contexts.contexts, FakeNvml(500, 1100), scale={"value": 2.0}).why == (
        "the load did not get the process that waited; the process that waited answers wrongly; "
        "a load is no sooner there with the context open; a process that waits takes more than is set aside for it; "
        "the model's size is another than without; 600 MiB did not come back"
    )


def test_a_gpu_that_nobody_opens_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_setup, "WAITS_WITHIN_S", 0.05)
    node = SimpleNamespace(
        prepare=lambda spec: None, waiting_with=lambda gpu_id: [7], gpus=[SimpleNamespace(gpu_id="g")]
    )

    async def story() -> None:
        driven = checks_setup.Driven(node)
        assert await driven.until_waiting(None) == 7
        with pytest.raises(TimeoutError, match="no process waits with the GPU open"):
            await driven.until_waiting(None, but=7)

    asyncio.run(story())


def test_what_onnx_takes_must_be_counted(on_a_gpu: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setup, "onnx_model", Path("identities.onnx"))
    assert on_a_gpu(memory.onnx, FakeNvml(), scale={"value": 21.0}).outcome is Outcome.PASS
    record = on_a_gpu(memory.onnx, FakeNvml(), memory_mib=9, scale={"value": 20.0})
    assert record.why == "3 times 7 was 20.0; the node counts less than the weights"


def test_an_onnxruntime_without_cuda_is_no_failure(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this one knows CUDA")
    with pytest.raises(Unavailable, match="onnxruntime-gpu"):
        _ = Setup(tmp_path, nvml_library=FakeNvml(), model_mib=4).onnx_model


def test_processes_that_cannot_be_ended_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_setup, "STOPPED_WITHIN_S", 0.01)
    with pytest.raises(TimeoutError, match="dmesg"):
        asyncio.run(checks_setup.in_time(asyncio.sleep(60)))


def test_memory_that_does_not_come_back_is_found(on_a_gpu: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SETTLED_WITHIN_S", 0.05)
    assert on_a_gpu(memory.residency, FakeNvml(1000, 1500, 1010), scale={"value": 21.0}).outcome is Outcome.PASS
    record = on_a_gpu(memory.residency, FakeNvml(1000, 1500), scale={"value": 20.0})
    assert record.why == "3 times 7 was 20.0; 500 MiB did not come back"


def test_the_allocators_cache_is_seen_and_can_be_had_back(on_a_gpu: Scripted) -> None:
    at_rest, used = {"reserved_bytes": 260 * MIB}, {"reserved_bytes": 520 * MIB, "peak_bytes": 512 * MIB}
    answers = {"scale": {}, "release": at_rest, "workspace": used}
    assert on_a_gpu(memory.allocator, FakeNvml(), **answers).outcome is Outcome.PASS
    record = on_a_gpu(memory.allocator, FakeNvml(), memory_mib=300, **answers)
    assert record.why == "the node reports less than torch holds"


def test_what_runs_leave_behind_is_to_be_told(on_a_gpu: Scripted) -> None:
    for told_mib, why in (
        (900, ""),
        (0, "what a run left behind was not told"),
        (600, "what a run left behind was not told"),
        (3000, "more was told than a run left behind"),
    ):
        record = on_a_gpu(memory.growth, FakeNvml(), hoard={"told_bytes": told_mib * MIB})
        assert (record.outcome is Outcome.PASS, record.why) == (not why, why)


def test_copies_are_judged_by_their_share_of_a_pinned_one(on_a_gpu: Scripted) -> None:
    rates = dict.fromkeys(("pinned", "to_pinned", "offload", "restore", "memcpy"), 20.0)
    rates |= {"pageable": 5.0, "to_fresh": 20.0}
    named = {f"{name}_gb_per_s": rate for name, rate in rates.items()} | {"pinned_bytes": 1.0}
    record = on_a_gpu(copies.bandwidth, FakeNvml(), bandwidth=named)
    assert (record.outcome, record.figures["pageable_share"], record.figures["restore_share"]) == (
        Outcome.PASS,
        0.25,
        1.0,
    )
    # Where memcpy is slower than the bus, it is what can be reached.
    slow_host = named | {"to_fresh_gb_per_s": 5.0, "offload_gb_per_s": 4.0, "memcpy_gb_per_s": 10.0}
    record = on_a_gpu(copies.bandwidth, FakeNvml(), bandwidth=slow_host | {"restore_gb_per_s": 8.0})
    assert (record.outcome, record.figures["offload_share"]) == (Outcome.PASS, 0.8)
    slow = named | {"pinned_bytes": 0.0, "restore_gb_per_s": 10.0, "offload_gb_per_s": 2.0, "pageable_gb_per_s": 30.0}
    record = on_a_gpu(copies.bandwidth, FakeNvml(), bandwidth=slow)
    assert record.why == (
        "the driver would not pin the ring that copies go through; "
        "a pinned copy is slower than a pageable one; "
        "offload reaches 10% of the slower of a pinned copy and memcpy; "
        "restore reaches 50% of the slower of a pinned copy and memcpy"
    )


def test_loads_are_judged_by_their_share_of_a_pinned_copy_and_by_what_they_pin(on_a_gpu: Scripted) -> None:
    fine = {"load_gb_per_s": 20.0, "mapped_gb_per_s": 4.0, "pinned_gb_per_s": 25.0, "memcpy_gb_per_s": 30.0}
    fine |= {"equal": 1.0, "pins": 0.0, "pinned_bytes": 32.0 * MIB, "pinned_changed_bytes": 0.0}
    record = on_a_gpu(copies.staging, FakeNvml(), staging=fine)
    assert (record.outcome, record.figures["load_share"], record.figures["mapped_share"]) == (Outcome.PASS, 0.8, 0.16)
    wrong = fine | {"load_gb_per_s": 19.0, "equal": 0.0, "pins": 7.0, "pinned_changed_bytes": 1.0}
    assert on_a_gpu(copies.staging, FakeNvml(), staging=wrong).why == (
        "a load reaches 76% of a pinned copy (memcpy 30 GB/s); what came through the ring is not what was sent; "
        "memory was pinned 7 times by later loads and transitions; the ring changed its size"
    )


def test_parking_must_free_the_device(on_a_gpu: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "ROUNDS", 1)
    record = on_a_gpu(copies.parking, FakeNvml(900, 640), scale={"value": 21.0})
    assert (record.outcome, record.figures["freed_mib"], record.figures["parked_mib"]) == (Outcome.PASS, 260, 256)
    assert record.figures["restore_gb_per_s"] == pytest.approx(256 * MIB / 0.01 / 1e9)
    record = on_a_gpu(copies.parking, FakeNvml(900, 890), scale={"value": 0.0})
    assert record.why == "an offload freed 10 MiB; 3 times 7 was 0.0 after a restore"


KEPT = {"calls": 1.0, "same": 1.0, "shared": 1.0}


def test_a_parked_models_tensors_are_asked_for_and_graphs_must_stay(
    on_a_gpu: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "ROUNDS", 1)
    answers: dict[str, dict[str, Any]] = {"state": KEPT, "refused": {"code": 712.0, "value": 8.0}, "capture": {}}
    record = on_a_gpu(copies.tensors, FakeNvml(), **answers)
    assert record.why == "a model with a CUDA graph was parked"  # the scripted node parks whatever it is told to
    answers |= {"state": KEPT | {"same": 0.0, "shared": 0.0}, "refused": {"code": 0.0, "value": 7.0}}
    record = on_a_gpu(copies.tensors, FakeNvml(), **answers)
    assert record.why == (
        "other values after 0 restores; what shared memory does not any more after 0 restores; "
        "memory was pinned twice; a kernel after a refusal computed wrongly; a model with a CUDA graph was parked"
    )


@pytest.mark.parametrize(("ratio", "outcome"), [(1.9, Outcome.PASS), (1.01, Outcome.FAIL)])
def test_copies_must_overlap_with_compute(on_a_gpu: Scripted, ratio: float, outcome: Outcome) -> None:
    assert on_a_gpu(copies.overlap, FakeNvml(), overlap={"ratio": ratio}).outcome is outcome


def test_a_gpu_that_tells_no_memory_cannot_be_checked(tmp_path: Path) -> None:
    class Silent(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
            raise self.NVMLError("Not Supported")

    nvml = Setup(tmp_path, nvml_library=Silent(), model_mib=4).nvml
    assert nvml is not None
    with pytest.raises(Unavailable, match="does not say"):
        memory.used_mib(nvml)
