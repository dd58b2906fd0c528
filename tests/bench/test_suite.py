"""The benchmark suite runs, gates and reports at tiny shapes: ``pytest bench --quick``, ``bench.summary``,
``bench.profile``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import baselines, judge, measure, profiling, summary
from bench.roofline import Work, floor_seconds
from msf_fast.engine.configuration import make_config
from msf_fast.engine.pipeline import build_stages
from msf_fast.errors import ConfigError
from msf_fast.kernels import reference
from msf_fast.nn.slot_attention import SlotAttention

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "match",
    "match over rows",
    "match over codes",
    "vote",
    "fusion",
    "quantizer",
    "codebook gradient",
    "slot attention",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """JSON of a quick run of every group."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--quick",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--benchmark-json={path}",
    ]
    # Inside a worker of pytest-xdist, pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return path


def test_every_group_is_measured(result):
    benchmarks = json.loads(result.read_text())["benchmarks"]
    assert {one["extra_info"]["group"] for one in benchmarks} == GROUPS
    for one in benchmarks:
        info = one["extra_info"]
        assert info["implementation"] in one["name"]
        assert one["stats"]["rounds"] >= measure.MIN_ROUNDS
        assert 0 < one["stats"]["median"] < 60
        assert info["peak_extra_bytes"] > 0
        assert info["floor_bytes"] > 0
        assert info["versions"]["torch"] == torch.__version__


def test_report_of_a_run(result, tmp_path, capsys):
    limits = {"measured": {"bandwidth": 1e10, "exact_rate": 1e11}, "environment": {"device": measure.device_name()}}
    (tmp_path / "profile.json").write_text(json.dumps(limits))
    summary.main([str(result), "--out", str(tmp_path), "--profile", str(tmp_path / "profile.json")])
    text = (tmp_path / "report.md").read_text()
    assert text == capsys.readouterr().out
    assert text.count("| msf_fast |") == sum(" | eager | " in line for line in text.splitlines())
    assert "10 GB/s and 0.10 TFLOP/s (0.10 on 16 bits), measured" in text


def row(implementation, seconds, rows=10):
    return summary.Row(
        "device", "match", (("rows", rows), ("codes", 2), ("channels", 4)), implementation, seconds, 2**20, None
    )


def test_report_ratios():
    table = summary.table([row("eager", 6e-3), row("compiled", 3e-3), row("msf_fast", 2e-3), row("eager", 1.0, 20)])
    lines = table.splitlines()[2:]
    assert lines[2] == "| match | 10 × 2, c 4 | msf_fast | 2 ms | 3.00 | 1.50 | 1.0 MiB | - |"
    assert lines[3] == "| match | 20 × 2, c 4 | eager | 1 s | 1.00 | - | 1.0 MiB | - |"


def test_compact_report_has_a_row_a_shape():
    rows = [row("eager", 6e-3), row("vector-quantize-pytorch", 5e-3), row("msf_fast", 2e-3), row("eager", 1.0, 20)]
    lines = summary.compact_table(rows).splitlines()
    assert lines[0] == (
        "| group | shape | msf_fast | eager / ours | compiled / ours | vector-quantize-pytorch / ours | extra MiB, ours | eager |"
    )
    assert lines[2:] == ["| match | 10 × 2, c 4 | 2 ms | 3.00 | - | 2.50 | 1.0 | 1.0 |"]
    lines = summary.compact_table([row("msf_fast", 2e-3)._replace(share=0.5)]).splitlines()
    assert lines[2:] == ["| match | 10 × 2, c 4 | 2 ms | - | - | 1.0 | - | 50% |"]


def test_compact_report_of_a_run(result, tmp_path, capsys):
    limits = {"measured": {"bandwidth": 1e10, "exact_rate": 1e11}, "environment": {"device": measure.device_name()}}
    (tmp_path / "profile.json").write_text(json.dumps(limits))
    summary.main([str(result), "--compact", "--profile", str(tmp_path / "profile.json")])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    shapes = {str(sorted(one["extra_info"]["size"].items())) for one in json.loads(result.read_text())["benchmarks"]}
    assert len(lines) >= len(shapes)
    assert all(line[-1].endswith("% |") for line in lines)


def test_report_refuses_another_file(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"other\.json"):
        summary.main([str(tmp_path / "other.json")])


def test_profile_writes_its_result(tmp_path, capsys):
    profiling.main(["--quick", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name == profiling.file_name(result["environment"]["device"], result["environment"]["device_type"])
    assert result["measured"]["bandwidth"] > 0
    kernel = result["kernels"][0]
    assert kernel["share_of_floor"] == pytest.approx(kernel["floor_seconds"] / kernel["seconds"])
    stages = result["step"]["stages"]
    assert set(stages["autoencoder"]["parts"]) >= {"loading", "encoder", "fusion", "fusion, published", "optimiser"}
    assert set(stages["slate"]["parts"]) >= {"backbone", "autoencoder", "slot attention, published", "decoder"}
    for stage in stages.values():
        assert all(part["forward_seconds"] > 0 for part in stage["parts"].values())
        seconds = [stage["totals"][name]["seconds"] for name in ("eager, published", "msf_fast, eager")]
        assert stage["published_over_ours"] == pytest.approx(seconds[0] / seconds[1])
    assert capsys.readouterr().out.count("eager published / msf_fast: ") == 2


@pytest.mark.parametrize("fusion", ["paper", "release"])
def test_published_model_computes_the_model_s_loss_and_gradients(fusion):
    config = make_config("slate")
    config.settings.fusion, config.settings.slate.blocks = fusion, 1
    images = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    progress, seed = torch.tensor(0.3), torch.tensor(0)
    for stage in build_stages(config).values():
        stage.thaw()
        model = stage.model.train()
        results = []
        for one in (model, baselines.published_model(model)):
            torch.manual_seed(0)
            loss = one.losses({"image": images}, progress, seed).total
            trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
            results.append((loss.detach(), *torch.autograd.grad(loss, trained, materialize_grads=True)))
        names = ("loss", *(name for name, parameter in model.named_parameters() if parameter.requires_grad))
        judge.check_close(names, *results, 1e-2)  # near-ties of random weights may be decided differently


def test_peak_memory_counts_tensors_held_together():
    if measure.DEVICE.type != "cpu":
        pytest.skip("the CUDA allocator rounds sizes up")
    features = torch.ones(1000)
    # The sum lives until the product exists. A few more bytes are Python's numbers as tensors.
    assert 8000 <= measure.peak_memory(lambda: (features + 1) * 2) < 8100
    assert measure.peak_memory(lambda: (features + 1).sum()) < 4100


def test_interleaved_rounds_attribute_durations():
    """Each duration belongs to its function, whatever the order of a round."""
    small, large = torch.ones(100, 100), torch.ones(900, 900)
    functions = {"small": lambda one: small @ small, "large": lambda one: large @ large}
    found = measure.measure(functions, [(small,)], 0.0)
    assert found["small"].median < found["large"].median
    assert len(found["small"].seconds) == len(found["large"].seconds) == measure.MIN_ROUNDS


def test_gate_finds_a_wrong_code_and_excuses_a_near_tie():
    codebook = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    features = torch.tensor([[0.1, 0.0], [1.0, 1e-7], [1.9, 0.0]])
    index, confidence, _ = reference.match_codes(features, codebook)
    judge.check_match(features, codebook, index, confidence, 1e-4)
    index[1] = 1 - index[1]  # equally near to both codes
    judge.check_match(features, codebook, index, confidence, 1e-4)
    with pytest.raises(AssertionError):
        judge.check_match(features, codebook, index, confidence * 1.01, 1e-4)
    index[2] = 0
    with pytest.raises(AssertionError, match="1 of 3 rows"):
        judge.check_match(features, codebook, index, confidence, 1e-4)


@pytest.mark.parametrize("spoiled", range(5), ids=["index", "winner", "confidence", "feature", "code"])
def test_gate_of_votes_finds_each_wrong_output(random_pyramid, spoiled):
    codebook = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    votes = [list(vote) for vote in reference.vote_scales(random_pyramid, codebook)]
    judge.check_votes(random_pyramid, codebook, votes, 1e-4)
    votes[1][spoiled] = votes[1][spoiled] + 1
    with pytest.raises(AssertionError):
        judge.check_votes(random_pyramid, codebook, votes, 1e-4)


@pytest.mark.parametrize("spoiled", range(3), ids=["index", "feature", "code"])
def test_gate_of_fusion_finds_each_wrong_output(random_pyramid, spoiled):
    generator = torch.Generator().manual_seed(1)
    books = [torch.randn(codes, 3, generator=generator) for codes in (6, 5, 4)]
    fused = [list(one) for one in reference.fuse_scales(random_pyramid, books[0], books[1:])]
    judge.check_fusion(random_pyramid, books, fused, 1e-4)
    fused[0][spoiled] = fused[0][spoiled] + 1
    with pytest.raises(AssertionError):
        judge.check_fusion(random_pyramid, books, fused, 1e-4)


@pytest.fixture
def random_pyramid():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4 >> scale, 4 >> scale, 3, generator=generator) for scale in range(2)]


def test_published_slot_attention_computes_the_module_s_function():
    torch.manual_seed(0)
    module = SlotAttention(12, 8)
    features, query = torch.randn(2, 30, 12), torch.randn(2, 4, 8)
    found = baselines.slot_attention(module, features, query)
    judge.check_close(("slots", "attention"), found, module(features, query)[:2], 1e-4)


def test_floor_share_uses_the_work(result):
    info = json.loads(result.read_text())["benchmarks"][0]["extra_info"]
    assert floor_seconds(Work(info["floor_bytes"], info["floor_operations"]), 1.0, 1e30) == info["floor_bytes"]
