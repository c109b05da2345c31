"""Models in alternation, their sites timed by hooks: on a stopwatch that counts its marks, and on small models."""

import pytest
import torch
from torch import nn

from augment_cli.analysis import source
from augment_cli.errors import AugmentError
from augment_cli.latency.bench import FEWEST_ROUNDS, ModelBench
from augment_cli.latency.stopwatch import CUDAStopwatch, SiteClock
from augment_cli.planning.latency import LatencySettings
from tests.conftest import plan_of


class Counting:
    """Marks are 0, 1, 2, ...; `finish` is recorded."""

    def __init__(self) -> None:
        self.marks = self.finished = 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks - 1

    def finish(self) -> None:
        self.finished += 1

    def between(self, start: int, end: int) -> float:
        return float(end - start)


class Plus(nn.Module):
    """Sets marks of its own, forward and backward, so that its time on a counting stopwatch is known."""

    def __init__(self, watch: Counting, forward: int, backward: int) -> None:
        super().__init__()
        self.watch, self.counts = watch, (forward, backward)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        for _ in range(self.counts[0]):
            self.watch.mark()
        inside = x * self.weight
        if inside.requires_grad:
            inside.register_hook(self.mark_backward)
        return inside * 1

    def mark_backward(self, gradient) -> None:
        for _ in range(self.counts[1]):
            self.watch.mark()


def test_a_site_is_timed_forward_and_backward_and_nothing_around_it_is():
    watch = Counting()
    model = nn.Sequential(Plus(watch, 7, 9), Plus(watch, 2, 5), nn.ReLU(inplace=True), Plus(watch, 4, 11))
    clock = SiteClock(model, ["1"], watch)
    x = torch.ones(2, requires_grad=True)
    model(x).sum().backward()
    forward, backward = 2 + 1, 5 + 1  # the marks within, and a step from the last one to the clock's own
    assert clock.take() == {"1": forward + backward}
    assert clock.take() == {}
    with torch.inference_mode():
        model(torch.ones(2))
    assert clock.take() == {"1": forward}


class Stream:
    """A CUDA device whose work is done when it is waited for, a millisecond for each mark."""

    def __init__(self, monkeypatch, device: str) -> None:
        self.now, self.waited, self.device = 0, -1, torch.device(device)
        stream = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self, at) -> None:
                assert at is stream
                self.time = stream.now = stream.now + 1

            def elapsed_time(self, end) -> float:
                assert max(self.time, end.time) <= stream.waited, "an event is read before it has happened"
                return float(end.time - self.time)

        monkeypatch.setattr("torch.cuda.Event", Event)
        monkeypatch.setattr("torch.cuda.current_stream", self.of)
        monkeypatch.setattr("torch.cuda.synchronize", self.wait)

    def of(self, device: torch.device) -> "Stream":
        assert device == self.device
        return self

    def wait(self, device: torch.device) -> None:
        assert device == self.device
        self.waited = self.now


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_events_are_of_the_devices_stream_and_read_when_it_is_done(mode, monkeypatch):
    stream = Stream(monkeypatch, "cuda:1")
    model = source.create(source.describe("test_resnet")[0])
    plan = plan_of("test_resnet", "aa")
    names = [site.name for site in plan.sites]
    settings = LatencySettings(batch=2, threads=1, mode=mode)
    bench = ModelBench(model, (3, 160, 160), settings, watch=CUDAStopwatch("cuda:1"))
    rounds = bench.time_sites(names, [plan.sites], 0.0)
    marks = 1e6 if mode == "inference" else 2e6  # nanoseconds
    for of_source, variant in rounds:
        assert of_source.sites == variant.sites == dict.fromkeys(names, marks)
        assert of_source.total == variant.total == 2 * marks * len(names) + 1e6
    assert stream.waited == stream.now
    assert bench.pass_seconds() == pytest.approx(1e-3)


def test_calls_of_one_module_add_up():
    watch = Counting()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Plus(watch, 3, 0)

        def forward(self, x):
            return self.part(self.part(x))

    model = Twice()
    clock = SiteClock(model, ["part"], watch)
    with torch.no_grad():
        model(torch.ones(1))
    assert clock.take() == {"part": 8.0}


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return source.create(source.describe("test_resnet")[0])


def bench_of(model: nn.Module, **settings) -> ModelBench:
    return ModelBench(model, (3, 32, 32), LatencySettings(threads=1, seconds=1, **settings))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_round_has_a_pass_of_the_source_and_of_each_variant_with_all_their_sites(mode):
    described, _ = source.describe("test_resnet")
    model = source.create(described)
    plan = plan_of("test_resnet", "aa")
    names = [site.name for site in plan.sites]
    watch = Counting()
    bench = ModelBench(model, (3, 160, 160), LatencySettings(batch=2, threads=1, mode=mode), watch=watch)
    rounds = bench.time_sites(names, [plan.sites, plan.sites[:2]], 0.01)
    assert len(rounds) == FEWEST_ROUNDS
    spans = 1.0 if mode == "inference" else 2.0  # a step from the first mark to the last, forward and backward
    for of_source, whole, part in rounds:
        assert of_source.sites == dict.fromkeys(names, spans)
        assert whole.sites == dict.fromkeys(names, spans)
        assert part.sites == dict.fromkeys(names[:2], spans)
        assert of_source.total == 2 * spans * len(names) + 1
    assert all(p.grad is None for p in model.parameters())
    assert watch.finished == 2 * 3 * (FEWEST_ROUNDS + 1)


def test_the_source_the_threads_and_the_random_state_stay_as_they_were(small):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    threads, state, training = torch.get_num_threads(), torch.get_rng_state(), small.training
    ModelBench(small, (3, 160, 160), LatencySettings(threads=threads + 1, mode="training", batch=2)).time_models(
        [plan_of("test_resnet", "aa").sites], 0.01
    )
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert small.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_more_time_means_more_rounds(small):
    bench = bench_of(small)
    assert len(bench.time_models([], 0.5)) > len(bench.time_models([], 0.0)) == FEWEST_ROUNDS


def test_a_model_that_does_not_run_so_is_refused_in_one_line():
    model = nn.Sequential(nn.Conv2d(3, 8, 32), nn.BatchNorm2d(8))
    with pytest.raises(AugmentError, match=r"^training on cpu, batch 1, .*: Expected more than 1 value"):
        bench_of(model, mode="training").time_models([], 0.0)


def test_progress_is_told(small):
    told = []
    bench = ModelBench(small, (3, 160, 160), LatencySettings(threads=1), lambda *args: told.append(args))
    bench.time_models([], 0.0)
    assert told == [("timing models", done, FEWEST_ROUNDS) for done in range(1, FEWEST_ROUNDS)]
