"""The operators as torch sees them: schema, fake and autograd rules, compilation; and the errors of the public functions."""

import os
import subprocess
import sys

import pytest
import torch

from msf_fast import fuse_scales, match_codes, select_codes, vote_scales
from msf_fast.kernels import launch

ops = torch.ops.msf_fast


@pytest.fixture
def inputs(place, random):
    def leaf(*shape):
        return random(*shape).to(place.device).requires_grad_()

    scalar = torch.tensor(0.7, device=place.device), torch.tensor(3, device=place.device)
    return leaf(2, 4, 8, 20), leaf(2, 2, 4, 20), leaf(10, 20), *scalar


def test_operators_pass_opcheck(place, inputs):
    fine, coarse, codebook, temperature, seed = inputs
    index = torch.randint(0, 10, (2, 4, 8), device=place.device)  # no -1: for opcheck, NaN is not equal to NaN
    backend = place.backend
    for noise_seed in (None, seed):
        torch.library.opcheck(ops.match_codes.default, (fine, codebook, temperature, noise_seed, "exact", backend))
    torch.library.opcheck(ops.vote_scales.default, ([fine, coarse], codebook, temperature, None, "exact", backend))
    torch.library.opcheck(ops.select_codes.default, (codebook, index, backend))
    plain = [part.detach() for part in (fine, codebook, temperature)]
    row_grads = torch.rand(2, 2, 4, 8, device=place.device)
    torch.library.opcheck(ops.match_codes_backward.default, (*plain, None, "exact", index, *row_grads, True))
    torch.library.opcheck(ops.match_codes_backward.default, (*plain, seed, "exact", index, *row_grads, False))
    winners = [index.clamp(max=1), torch.zeros(2, 2, 4, dtype=torch.int64, device=place.device)]
    torch.library.opcheck(ops.vote_scales_backward.default, (winners, [plain[0], coarse.detach()], backend))
    torch.library.opcheck(ops.select_codes_backward.default, (plain[0], index, 10, backend))


@pytest.mark.parametrize("paper", [False, True], ids=["release", "paper"])
def test_operators_of_fusion_pass_opcheck(place, random, inputs, paper):
    fine, coarse, codebook, temperature, seed = inputs
    features, books = [fine, coarse], [codebook, codebook.detach()[:7].requires_grad_(), codebook.detach()[:3]]
    own = [torch.zeros_like(part).requires_grad_() for part in features] if paper else []
    for noise_seed in (None, seed):
        arguments = (features, own, books, temperature, noise_seed, "exact", place.backend)
        torch.library.opcheck(ops.fuse_scales.default, arguments)
    winners = [torch.zeros(part.shape[:3], dtype=torch.int64, device=place.device) for part in features]
    indices = [torch.stack([winner, winner + 1], -1) for winner in winners]
    grads = [random(*part.shape[:3], 40 if paper else 20).to(place.device) for part in features]
    arguments = (winners, indices, grads, grads, [10, 7, 3], paper, place.backend)
    torch.library.opcheck(ops.fuse_scales_backward.default, arguments)


def objective(backend):
    def run(fine, coarse, codebook, temperature, seed):
        match = match_codes(fine, codebook, temperature=temperature, noise_seed=seed, backend=backend)
        votes = vote_scales([fine, coarse], codebook, temperature=0.5, noise_seed=7, backend=backend)
        own = select_codes(codebook, match.index, backend=backend)
        total = match.confidence.sum() + match.distance.square().mean() + own.sum()
        for own_features in (None, [fine * 2, coarse]):
            fused = fuse_scales(
                [fine, coarse], [codebook] * 3, own_features=own_features, noise_seed=seed, backend=backend
            )
            total = total + sum((part.feature * part.code).mean() for part in fused)
        return total + sum((vote.feature * vote.code).sum() for vote in votes)

    return run


def values_and_gradients(function, inputs):
    value = function(*inputs)
    return value, *torch.autograd.grad(value, inputs[:3])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_break(place, inputs, random, compiler):
    if compiler == "inductor" and place.backend == "triton" and place.device == "cpu":
        pytest.skip("the operators are opaque to the compiler: one inductor test a device is enough")
    run = objective(place.backend)
    compiled = torch.compile(run, fullgraph=True, backend=compiler, dynamic=True)
    for images in (2, 3):
        grown = [torch.cat([part.detach()] * 2)[:images].requires_grad_() for part in inputs[:2]]
        now = *grown, *inputs[2:]
        for got, wanted in zip(values_and_gradients(compiled, now), values_and_gradients(run, now), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_new_batch_and_temperature_do_not_recompile(random):
    count = 0

    def counting(graph, example_inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(
        lambda features, codebook, temperature: match_codes(features, codebook, temperature=temperature).confidence,
        fullgraph=True, backend=counting, dynamic=True,
    )  # fmt: skip
    for images, temperature in ((2, 0.5), (3, 0.7), (7, 0.9)):
        compiled(random(images, 4, 20), random(10, 20), torch.tensor(temperature))
    assert count == 1


@pytest.mark.gpu
def test_captures_in_a_cuda_graph(random):
    features = [random(2, 8 >> scale, 8 >> scale, 20).cuda() for scale in range(3)]
    codebook, seed = random(30, 20).cuda(), torch.tensor(1, device="cuda")

    def run():
        match = match_codes(features[0], codebook, noise_seed=seed)
        votes = vote_scales(features, codebook, noise_seed=seed)
        fused = fuse_scales(features, [codebook] * 4, noise_seed=seed)
        return [*match, *(part for scale in [*votes, *fused] for part in scale)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        for got, wanted in zip(captured, run(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


Z, E = torch.zeros(4, 3), torch.zeros(5, 3)
SCALES = [torch.zeros(1, 4, 4, 3), torch.zeros(1, 2, 2, 3)]
FIVE_SCALES = [torch.zeros(1, 16 >> scale, 16 >> scale, 3) for scale in range(5)]
WRONG = [
    (lambda: match_codes(Z, torch.zeros(5, 2)), ValueError, r"codebook must have the features' 3 channels.*\(5, 2\)"),
    (lambda: match_codes(Z, torch.zeros(0, 3)), ValueError, r"codebook must be \(m, c\) with m from 1.*\(0, 3\)"),
    (lambda: match_codes(Z, torch.zeros(3)), ValueError, r"codebook must be \(m, c\).*\(3,\)"),
    (lambda: match_codes(Z, torch.zeros(65537, 3)), ValueError, "65536"),
    (lambda: match_codes(torch.zeros(2, 1025), torch.zeros(2, 1025)), ValueError, "features must be .*1024"),
    (lambda: match_codes(torch.zeros(()), E), ValueError, "features must be"),
    (lambda: match_codes(Z.long(), E), TypeError, "features must be float32.*int64"),
    (lambda: match_codes([1.0], E), TypeError, "features must be a tensor, but is list"),
    (lambda: match_codes(Z, E.to("meta")), ValueError, "codebook must be on the features' device cpu.*meta"),
    (lambda: match_codes(Z, E, temperature=0.0), ValueError, "temperature must be above 0.*0.0"),
    (lambda: match_codes(Z, E, temperature=float("nan")), ValueError, "temperature must be above 0"),
    (lambda: match_codes(Z, E, temperature="1"), TypeError, "temperature must be a number.*str"),
    (lambda: match_codes(Z, E, temperature=torch.ones(2)), ValueError, r"temperature .*0-d.*\(2,\)"),
    (lambda: match_codes(Z, E, noise_seed=1.5), TypeError, "noise_seed must be None, an int.*float"),
    (lambda: match_codes(Z, E, noise_seed=2**63), ValueError, "noise_seed must fit"),
    (lambda: match_codes(Z, E, noise_seed=torch.zeros(())), ValueError, "noise_seed .*float32"),
    (lambda: match_codes(Z, E, precision="high"), ValueError, 'precision must be "exact" or "fast".*high'),
    (lambda: match_codes(Z, E, backend="cuda"), ValueError, "backend must be.*cuda"),
    (lambda: match_codes(Z.double(), E, backend="triton"), ValueError, "float64"),
    (lambda: vote_scales(SCALES[0], E), TypeError, "features must be a list of tensors.*Tensor"),
    (lambda: vote_scales([], E), ValueError, "features must hold from 1 to 16 scales"),
    (lambda: vote_scales([SCALES[0], SCALES[0]], E), ValueError, r"features\[1\] is \(1, 4, 4, 3\)"),
    (lambda: vote_scales([Z], E), ValueError, r"features\[0\] must be \(b, h, w, c\)"),
    (lambda: vote_scales([SCALES[0], SCALES[1].half()], E), ValueError, r"features\[1\] must be torch.float32"),
    (lambda: fuse_scales(SCALES[0], [E] * 2), TypeError, "features must be a list of tensors.*Tensor"),
    (lambda: fuse_scales(SCALES, E), ValueError, "codebooks must be a list .* 3 in all, but is Tensor"),
    (lambda: fuse_scales(SCALES, [E] * 2), ValueError, "codebooks must be a list .* 3 in all, but is list of 2"),
    (lambda: fuse_scales(SCALES, [E, E, E[:, :2]]), ValueError, r"codebooks\[2\] must have the features' 3 channels"),
    (lambda: fuse_scales(SCALES, [E, E[:0], E]), ValueError, r"codebooks\[1\] must be \(m, c\) with m from 1"),
    (lambda: fuse_scales(SCALES, [E, E, [1.0]]), TypeError, r"codebooks\[2\] must be a tensor, but is list"),
    (lambda: fuse_scales(SCALES, [E, E.half(), E]), ValueError, r"codebooks\[1\] must be torch.float32 .*float16"),
    (lambda: fuse_scales(SCALES, [E] * 3, own_features=SCALES[0]), TypeError, "own_features must be a list"),
    (lambda: fuse_scales(SCALES, [E] * 3, own_features=SCALES[:1]), ValueError, "own_features must have the shapes"),
    (
        lambda: fuse_scales(SCALES, [E] * 3, own_features=[part.half() for part in SCALES]),
        ValueError,
        "own_features must be torch.float32 on cpu like features, but are torch.float16",
    ),
    (
        lambda: fuse_scales(SCALES, [E] * 3, own_features=[SCALES[0], SCALES[1].half()]),
        ValueError,
        r"own_features\[1\] must be torch.float32",
    ),
    (lambda: fuse_scales(SCALES, [E] * 3, temperature=-1.0), ValueError, "temperature must be above 0.*-1.0"),
    (lambda: fuse_scales(SCALES, [E] * 3, noise_seed="1"), TypeError, "noise_seed must be None, an int.*str"),
    (lambda: fuse_scales(SCALES, [E] * 3, precision=1), ValueError, "precision must be"),
    (lambda: fuse_scales(FIVE_SCALES, [E] * 6, backend="triton"), ValueError, "at most 4 scales, not 5"),
    (lambda: vote_scales(FIVE_SCALES, E, backend="triton"), ValueError, "at most 4 scales, not 5"),
    (
        lambda: fuse_scales([part.double() for part in SCALES], [E.double()] * 3, backend="triton"),
        ValueError,
        "float64",
    ),
    (lambda: select_codes(E, torch.zeros(2)), TypeError, "index must be of torch.int64"),
    (lambda: select_codes(E, [0]), TypeError, "index must be a tensor"),
    (lambda: select_codes(E, torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "index must be on"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_triton_backend_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        match_codes(Z, E, backend="triton")
    monkeypatch.setattr(launch, "triton", None)
    with pytest.raises(ValueError, match="not installed"):
        match_codes(Z, E, backend="triton")


def test_imports_without_triton():
    program = (
        "import sys, torch; sys.modules['triton'] = None; import msf_fast; "
        "print(msf_fast.match_codes(torch.eye(3), torch.eye(3)).index.tolist())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[0, 1, 2]", run.stderr
