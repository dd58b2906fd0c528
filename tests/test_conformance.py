"""The project's numbers against those of an independent float64 implementation (tests/vectors/README.md)."""

import numpy as np
import pytest
import torch

from msf_fast import adjusted_rand_index, match_codes, mean_best_overlap, mean_iou
from msf_fast.kernels import reference
from msf_fast.nn.decoder import AutoregressiveDecoder
from msf_fast.nn.quantizer import MultiScaleQuantizer
from msf_fast.nn.slot_attention import SlotAttention

MATCH = ("paper_c256_m64", "release_c256_m256", "diffusion_c4_m64", "odd_c20_m100", "one_code")
FUSE = ("three_scales", "two_scales", "four_scales", "c4", "one_scale")
# (backend, dtype): the torch backend reaches float64; the kernels compute in float32, in the interpreter where there is no GPU.
BACKENDS = [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read(path, case: str) -> dict[str, torch.Tensor]:
    with np.load(path) as arrays:
        prefix = case + "/"
        return {name[len(prefix) :]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith(prefix)}


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.cpu().to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


def gap(features, codebook):
    """Relative gap between the two least distances of each row, in float64."""
    distances = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    least = distances.topk(min(2, distances.shape[1]), largest=False).values
    return torch.full(least.shape[:1], torch.inf) if least.shape[1] == 1 else (least[:, 1] - least[:, 0]) / least[:, 0]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("case", MATCH)
def test_match(vectors, case, backend, dtype):
    given = read(vectors / "match.npz", case)
    features, codebook = given["z"].to(DEVICE, dtype), given["codebook"].to(DEVICE, dtype)
    found = match_codes(features, codebook, temperature=float(given["sigma"]), backend=backend)
    if dtype == torch.float64:
        assert torch.equal(found.index.cpu(), given["index"])
        close(found.confidence, given["confidence"], 1e-5)
        close(found.distance, given["distance"], 1e-5)
        return
    agree = found.index.cpu() == given["index"]
    assert bool((agree | (gap(given["z"], given["codebook"]) < 1e-4)).all())
    close(found.confidence, given["confidence"], 1e-4)
    close(found.distance, given["distance"], 1e-4)


def near_ties(features, books, temperature, output):
    """(b, h, w): where float32 may decide a scale's match or vote another way than float64."""
    candidates = [reference.resize_scale(one, source - output) for source, one in enumerate(features)]
    shape = features[output].shape[:-1]
    pairs = [(features[output], books[output + 1]), *[(candidate, books[0]) for candidate in candidates]]
    ties = torch.stack([gap(rows.flatten(0, 2), book).view(shape) for rows, book in pairs]).amin(0) < 1e-4
    confidence = torch.stack([reference.match_codes(candidate, books[0], temperature)[1] for candidate in candidates])
    if len(candidates) > 1:
        first, second = confidence.topk(2, dim=0).values
        ties |= (first - second) / first < 2e-4  # each is right within 1e-4
    return ties


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("case", FUSE)
def test_fuse(vectors, case, backend, dtype):
    given = read(vectors / "fuse.npz", case)
    scales = int(given["n_scale"])
    books = [given["codebook_shared"], *[given[f"codebook_scale{scale}"] for scale in range(scales)]]
    quantizer = MultiScaleQuantizer(
        "release", books[0].shape[1], [len(book) for book in books], "learned", backend=backend
    )
    for module, book in zip(quantizer.books, books, strict=True):
        module.weight.data = book
    quantizer.to(DEVICE, dtype)
    features = [given[f"z{scale}"].to(DEVICE, dtype) for scale in range(scales)]
    tolerance = 1e-5 if dtype == torch.float64 else 1e-4
    for scale, found in enumerate(quantizer(features, float(given["sigma"]))):
        index = given[f"index{scale}"]
        differ = (found.index.cpu() != index).any(-1)
        # In float32 a near-tie may fall the other way; feature and code are another candidate's then.
        exact = [given[f"z{one}"] for one in range(scales)]
        sure = ~near_ties(exact, books, float(given["sigma"]), scale)
        assert sure.double().mean() > 0.9
        if dtype == torch.float64:
            sure = torch.ones_like(sure)
        assert not (differ & sure).any()
        close(found.feature.cpu()[sure], given[f"encode{scale}"][sure], tolerance)
        close(found.code.cpu()[sure], given[f"quant{scale}"][sure], tolerance)


SLOT_ATTENTION_NAMES = {
    "norm1kv": "norm_features",
    "norm1q": "norm_slots",
    "norm2": "norm_mlp",
    "proj_q": "to_query",
    "proj_k": "to_key",
    "proj_v": "to_value",
    "rnn": "update",
    "ffn.0": "mlp.0",
    "ffn.2": "mlp.3",
}


def slot_attention_name(name: str) -> str:
    module, parameter = name.rsplit(".", 1)
    return f"{SLOT_ATTENTION_NAMES[module]}.{parameter}"


@pytest.mark.parametrize("case", ["plain", "bilevel", "one_iter"])
def test_slot_attention(vectors, case):
    given = read(vectors / "slot_attention.npz", case)
    features, query = given["input"].requires_grad_(), given["query"].requires_grad_()
    module = SlotAttention(
        features.shape[-1], query.shape[-1], int(given["num_iter"]), bilevel=case == "bilevel"
    ).double()
    module.load_state_dict(
        {slot_attention_name(name[6:]): value for name, value in given.items() if name.startswith("param.")}
    )
    slots, attention = module(features, query)[:2]
    close(slots.detach(), given["slots"], 1e-5)
    close(attention.detach(), given["attention"], 1e-5)
    slots.backward(given["grad_slots"])
    close(features.grad, given["grad_input"], 1e-5)
    close(query.grad, given["grad_query"], 1e-5)
    gradients = {name[5:]: value for name, value in given.items() if name.startswith("grad.")}
    assert len(gradients) == len(list(module.parameters()))
    for name, expected in gradients.items():
        close(module.get_parameter(slot_attention_name(name)).grad, expected, 1e-5)


@pytest.mark.parametrize("case", ["random", "blobs", "more_slots", "fewer_slots"])
def test_metrics(vectors, case):
    given = read(vectors / "metrics.npz", case)
    maps = given["predicted"], given["target"]
    close(adjusted_rand_index(*maps), given["ari"], 1e-5)
    close(adjusted_rand_index(*maps, foreground=True), given["ari_fg"], 1e-5)
    close(mean_best_overlap(*maps), given["mbo"], 1e-5)
    close(mean_iou(*maps), given["miou"], 1e-5)


def test_slate_decoder(vectors):
    given = read(vectors / "ar_decoder.npz", "two_layers")
    names = {
        "bos": "start",
        "posit_embed._pe": "position",
        "norm0.weight": "norm.weight",
        "readout.weight": "classify.weight",
    }
    state = {name[6:]: value for name, value in given.items() if name.startswith("param.")}
    codes, slots, logits = given["input"], given["slots"], given["logits"]
    module = AutoregressiveDecoder(codes.shape[1], codes.shape[2], [logits.shape[-1]], blocks=2).double()
    module.load_state_dict(
        {names.get(name, name.replace("backbone.layers", "blocks")): value for name, value in state.items()}
    )
    (found,) = module(codes, slots)
    close(found.detach(), logits, 1e-5)
