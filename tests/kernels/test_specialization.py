"""A new number of rows or images compiles nothing: Triton's key stays the same. And the recorder of launches binds as Triton does."""

import pytest
import torch

from msf_fast import fuse_scales, match_codes, select_codes, vote_scales
from msf_fast.kernels import fuse, launch, lookup, match, slot_attention
from msf_fast.kernels.shipped import MODULES, kernel_names, recorded_launches, shipped_launches

ROWS = (1, 16, 17, 1000)  # Triton specialises 1 and multiples of 16
IMAGES = (1, 2, 3, 16)


def launch_all(rows, images, channels, noise):
    """Calls every launcher: matches and selects `rows` rows, fuses `images` images of one size."""
    seed, temperature = torch.tensor(1) if noise else None, torch.tensor(0.5)
    codebook = torch.zeros(70, channels)
    match.launch_match(torch.zeros(rows, channels), codebook, temperature, seed, "exact")
    index = torch.zeros(rows, dtype=torch.int64)
    for codes in (70, 300):  # the product with the one-hot matrix, and rows sorted by code
        lookup.launch_select(torch.zeros(codes, channels), index)
        lookup.launch_select_backward(torch.zeros(rows, channels), index, codes)
    features = [torch.zeros(images, 12 >> scale, 20 >> scale, channels) for scale in range(3)]
    books = [torch.zeros(codes, channels) for codes in (70, 9, 10, 8)]
    winners = [torch.zeros(scale.shape[:3], dtype=torch.int64) for scale in features]
    indices = [torch.zeros(*scale.shape[:3], 2, dtype=torch.int64) for scale in features]
    for mode, own in (("vote", []), ("release", []), ("paper", features)):
        some = books[:1] if mode == "vote" else books
        fuse.launch_fuse(features, own, some, temperature, seed, "exact", mode)
        grads = [torch.cat([scale] * 2, -1) for scale in features] if own else features
        fuse.launch_feature_gradients(winners, grads, mode)
        if mode != "vote":
            lookup.launch_code_gradients(indices, grads, [len(book) for book in books], bool(own))
    query, values = torch.zeros(images, 7, 64), torch.zeros(images, rows, 64)
    for slot_mask in (None, torch.ones(images, 7, dtype=torch.bool)):
        update, _, mass = slot_attention.launch_slot_attention(query, values, False, slot_mask)
        slot_attention.launch_slot_attention_backward(query, values, update, mass, update, None, slot_mask)


@pytest.mark.skipif(launch.triton is None, reason="needs Triton")
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("channels", [4, 20])
def test_launches_are_specialised_alike(channels, noise):
    """Triton's own binder gives the same keys for all numbers of rows and images, as on an H100."""
    seen = []
    for rows, images in zip(ROWS, IMAGES, strict=True):
        with recorded_launches(90) as launches:
            launch_all(rows, images, channels, noise)
        keys = {}
        for one in launches:
            keys.setdefault(one.kernel.__name__, set()).add(one.key)
        seen.append(keys)
    rows_alone = "match_small_kernel"
    assert set(kernel_names()) - set(seen[0]) == ({rows_alone, "prepare_kernel"} - set(seen[0]))
    assert (rows_alone in seen[0]) == (channels == 4)
    for name in seen[0]:
        for later in seen[1:]:
            assert later[name] == seen[0][name], name


@pytest.mark.skipif(launch.triton is None, reason="needs Triton")
@pytest.mark.parametrize("target", launch.ARCHITECTURES)
def test_every_kernel_is_recorded_for_every_architecture(target):
    launches = shipped_launches(target)
    assert {one.kernel.__name__ for one in launches} == set(kernel_names())
    assert len({one.key for one in launches}) == len(launches)
    assert len(launches) >= 90


@pytest.mark.skipif(launch.triton is None, reason="needs Triton")
def test_recorded_as_triton_binds():
    """Types, compile-time values and divisibility of one launch, compared with values written by hand."""
    with recorded_launches(90) as launches:
        match.launch_match(torch.zeros(5, 4), torch.zeros(64, 4), torch.tensor(1.0), None, "exact")
    (one,) = launches
    assert one.signature["features_pointer"] == "*fp32"
    assert one.signature["index_pointer"] == "*i64"
    assert one.signature["code_count"] == "i32"
    assert one.constants["channel_stride"] == 1  # Triton makes 1 a compile-time value
    assert one.constants["NOISE"] is False
    assert one.options == {"num_warps": 4, "num_stages": 1}
    names = list(one.signature)
    divisible = {names[place[0]] for place, found in one.attributes.items() if ["tt.divisibility", 16] in found}
    assert "code_count" in divisible  # 64
    assert "row_stride" not in divisible  # 4
    assert "row_count" not in divisible  # not specialised


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [4, 20])
def test_nothing_is_compiled_anew(random, channels):
    kernels = [kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")]

    def step(rows, images):
        codes = random(70, channels).cuda().requires_grad_()
        found = match_codes(random(rows, channels).cuda().requires_grad_(), codes, noise_seed=1)
        (found.distance.sum() + select_codes(codes, found.index).sum()).backward()
        features = [random(images, 12 >> scale, 20 >> scale, channels).cuda().requires_grad_() for scale in range(3)]
        sum(vote.feature.sum() for vote in vote_scales(features, codes)).backward()
        for own in (None, features):
            fused = fuse_scales(features, [codes] * 4, own_features=own)
            sum(part.feature.sum() + part.code.sum() for part in fused).backward()
        torch.cuda.synchronize()
        # The first item that a kernel holds for a device is the dictionary of its compiled variants.
        return [sum(len(held[0]) for held in kernel.device_caches.values()) for kernel in kernels]

    first = step(ROWS[0], IMAGES[0])
    assert sum(first) > 0
    for rows, images in zip(ROWS[1:], IMAGES[1:], strict=True):
        assert step(rows, images) == first
