"""``pytest bench``: groups match, vote, fusion, quantizer, codebook gradient, slot attention. ``-k match`` selects one;
``--quick`` is tiny.

    pip install -e ".[test,bench]"
    pytest bench --benchmark-json=result.json && python -m bench.summary result.json --out report

The first test of a shape measures all its implementations in alternating rounds; each test then reports its own. Every
implementation passes a gate (`bench.judge`) before it is timed. Run it on an idle machine, as OpenMP's threads spin
(OMP_WAIT_POLICY=active).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from bench import baselines, measure
from bench.roofline import Work

SECONDS, QUICK_SECONDS = 8.0, 0.0  # per shape, for all its implementations


class Case(NamedTuple):
    """One task at one shape.

    size: the shape (rows, codes, channels, ...), for the columns and axes of tables and pictures.
    inputs: makes one set of inputs.
    functions: implementation → maker of a function of the inputs. The maker raises `baselines.Absent` if the
    implementation cannot run here.
    check: (implementation, outputs, eager's outputs, inputs); raises AssertionError for wrong outputs.
    work: the least bytes and operations.
    """

    size: dict[str, Any]
    inputs: Callable[[], tuple]
    functions: dict[str, Callable[[], Callable]]
    check: Callable
    work: Work


class ReplayClock:
    """Gives pytest-benchmark the durations that were measured earlier, in rounds with the other implementations."""

    def __init__(self):
        self.time, self.durations = 0.0, iter(())

    def now(self) -> float:
        return self.time

    def advance(self) -> None:
        self.time += next(self.durations)


CLOCK = ReplayClock()


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="tiny shapes, compiled without code generation, to see whether it runs at all",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == measure.FOLDER:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.now, disable_gc=False))


def pytest_benchmark_update_machine_info(config, machine_info):
    for name in ("node", "release", "cpu"):  # they concern only this host
        machine_info.pop(name, None)
    machine_info.update(measure.environment(), quick=config.getoption("--quick"))


@pytest.fixture(scope="session")
def quick(pytestconfig) -> bool:
    return pytestconfig.getoption("--quick")


@pytest.fixture(scope="session")
def compiled(quick) -> Callable[[Callable], Callable]:
    """torch.compile for one shape; a quick run only traces."""
    return lambda function: torch.compile(function, dynamic=False, backend="aot_eager" if quick else "inductor")


def _measure(case: Case, seconds: float) -> dict[str, Any]:
    """Implementation → Measured, or the exception that prevented it."""
    torch.compiler.reset()
    sets = measure.input_sets(case.inputs)
    results, functions, eager = {}, {}, None
    for name, make in case.functions.items():
        try:
            function = make()
            outputs = function(*sets[0])
            eager = outputs if name == "eager" else eager
            case.check(name, outputs, eager, sets[0])
            function(*sets[0])
            functions[name] = function
        except Exception as error:  # the others are still measured; this one's own test raises
            results[name] = error
    outputs = eager = None  # free them before memory is counted
    return results | measure.measure(functions, sets, seconds)


@pytest.fixture(scope="session")
def _measured():
    """The results of the latest case, as the tests of one shape follow each other."""
    return {}


@pytest.fixture
def report(benchmark, request, quick, _measured) -> Callable[[str, Callable[[], Case], str], None]:
    """A function (group, case maker, implementation) that reports the implementation. It measures the case unless that
    is the latest one."""

    def run(group: str, make_case: Callable[[], Case], implementation: str) -> None:
        parameters = {name: value for name, value in request.node.callspec.params.items() if name != "implementation"}
        key = (request.node.originalname, str(parameters))
        if key not in _measured:
            _measured.clear()
            torch.manual_seed(0)
            case = make_case()
            _measured[key] = case, _measure(case, QUICK_SECONDS if quick else SECONDS)
        case, results = _measured[key]
        found = results[implementation]
        if isinstance(found, baselines.Absent):
            pytest.skip(str(found))
        if isinstance(found, Exception):
            raise found
        shape = ", ".join(f"{name} {value}" for name, value in case.size.items())
        benchmark.group = f"{group}: {shape}, {measure.DEVICE.type}"
        benchmark.extra_info.update(
            group=group,
            size=case.size,
            implementation=implementation,
            peak_extra_bytes=found.memory,
            floor_bytes=case.work.bytes,
            floor_operations=case.work.operations,
            cuda_graph=found.graph,
            **measure.environment(),
        )
        CLOCK.durations = iter(found.seconds)
        benchmark.pedantic(CLOCK.advance, rounds=len(found.seconds))

    return run
