"""The competition of slots compared with its definition in float64: update, attention, gradients, on every backend."""

import functools

import pytest
import torch

from msf_fast.kernels import reference, slot_attention

step = torch.ops.msf_fast.slot_attention_step

# images, features, slots, channels. One feature, one slot, less than a tile, several tiles and a rest, several splits and a rest (more
# than 16 * 64 features), more slots than a tile of 16, fewer and more channels than a tile of 64 and as many, the most slots and channels.
SIZES = [
    (2, 1, 7, 20),
    (3, 63, 1, 16),
    (2, 500, 11, 70),
    (1, 2300, 3, 4),
    (2, 200, 7, 64),
    (2, 63, 7, 256),
    (1, 40, 24, 130),
    (1, 17, 64, 512),
]


def draw(random, size):
    images, count, slots, channels = size
    query, features = random(images, slots, channels) * 2 * channels**-0.5, random(images, count, channels)
    return query, features, random(images, slots, channels), random(images, slots, count)


def gradients(function, query, features, grad_update, grad_attention):
    """Update, attention, and both gradients; through the attention only if a gradient for it is given."""
    query, features = query.detach().requires_grad_(), features.detach().requires_grad_()
    update, attention = function(query, features)[:2]
    outputs, grads = [update], [grad_update]
    if grad_attention is not None:
        outputs, grads = [update, attention], [grad_update, grad_attention.to(attention.dtype)]
    return [update.detach(), attention.detach(), *torch.autograd.grad(outputs, (query, features), grads)]


def close(found, expected, relative):
    """Equal up to a share of the largest value, as the error of an entry comes from the terms of its sum."""
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=0, atol=relative * float(wanted.abs().max()))


@pytest.mark.parametrize("with_gradient_of_attention", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_matches_definition(place, poisoned, random, size, with_gradient_of_attention):
    query, features, grad_update, grad_attention = draw(random, size)
    grad_attention = grad_attention if with_gradient_of_attention else None
    given = [None if one is None else one.to(place.device) for one in (query, features, grad_update, grad_attention)]
    wide = [None if one is None else one.double() for one in (query, features, grad_update, grad_attention)]
    found = gradients(lambda *leaves: step(*leaves, True, place.backend), *given)
    assert [one.dtype for one in found] == [torch.float32] * 4
    close(found, gradients(reference.slot_attention_step, *wide), 1e-5)
    again = gradients(lambda *leaves: step(*leaves, True, place.backend), *given)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("size", [(2, 200, 7, 64), (2, 130, 8, 32), (1, 90, 24, 64), (1, 70, 40, 130)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(place, poisoned, random, dtype, size):
    given = [one.to(dtype) for one in draw(random, size)]
    expected = gradients(reference.slot_attention_step, *[one.double() for one in given])
    found = gradients(lambda *leaves: step(*leaves, True, place.backend), *[one.to(place.device) for one in given])
    assert [one.dtype for one in found] == [dtype, torch.float32, dtype, dtype]
    close(found, expected, 4 * torch.finfo(dtype).eps)


def test_attention_only_where_asked_for(place, poisoned, random):
    query, features, grad_update, _ = (one.to(place.device) for one in draw(random, (2, 150, 5, 20)))
    whole = gradients(lambda *leaves: step(*leaves, True, place.backend), query, features, grad_update, None)
    without = gradients(lambda *leaves: step(*leaves, False, place.backend), query, features, grad_update, None)
    assert without[1].shape == (2, 5, 0)
    assert all(torch.equal(one, other) for one, other in zip(whole[::2], without[::2], strict=True))
    torch.testing.assert_close(without[3], whole[3])
    torch.testing.assert_close(whole[1].sum(1), torch.ones(2, 150, device=place.device))


def test_strides(place, random):
    query, features, grad_update, grad_attention = draw(random, (2, 90, 5, 20))
    turned = query.transpose(0, 2).contiguous().transpose(0, 2), features.mT.contiguous().mT
    turned_grads = grad_update.mT.contiguous().mT, grad_attention.mT.contiguous().mT
    run = lambda *given: gradients(  # noqa: E731
        lambda *leaves: step(*leaves, True, place.backend), *[one.to(place.device) for one in given]
    )
    for one, other in zip(run(*turned, *turned_grads), run(query, features, grad_update, grad_attention), strict=True):
        torch.testing.assert_close(one, other)


def test_features_that_are_not_finite(place, poisoned, random):
    query, features, _, _ = draw(random, (3, 150, 5, 20))
    features[0, 140, 3], features[1, 0, 0] = torch.nan, torch.inf
    update, attention, _ = step(query.to(place.device), features.to(place.device), True, place.backend)
    assert update[:2].isnan().all()
    assert update[2].isfinite().all()
    assert (attention.isnan().any(1).sum(1).cpu() == torch.tensor([1, 1, 0])).all()
    assert step(query[:0].to(place.device), features[:0].to(place.device), True, place.backend)[1].shape == (0, 5, 150)


def test_operators_pass_opcheck(place, random):
    query, features, grad_update, grad_attention = (one.to(place.device) for one in draw(random, (2, 40, 5, 20)))
    for asked in (True, False):
        leaves = query.clone().requires_grad_(), features.clone().requires_grad_()
        torch.library.opcheck(step.default, (*leaves, asked, place.backend))
        update, attention, mass = step(query, features, asked, place.backend)
        arguments = query, features, update, attention, mass, grad_update, grad_attention if asked else None
        torch.library.opcheck(torch.ops.msf_fast.slot_attention_step_backward.default, (*arguments, place.backend))


def test_gradient_of_float64(random):
    query, features, _, _ = (one.double().requires_grad_() for one in draw(random, (2, 6, 3, 4)))
    assert torch.autograd.gradcheck(lambda *leaves: step(*leaves, True, "torch")[:2], (query, features))


@pytest.mark.parametrize("size", [(2, 300, 7, 256), (1, 100, 24, 300), (1, 70, 40, 200)])
def test_tiles_of_bfloat16(monkeypatch, random, size):
    """The tiles of Ampere and later for bfloat16, tested in float32, as the interpreter has no bfloat16 products."""
    constants_of = slot_attention.slot_attention_constants

    def constants(target, slots, channels, dtype, backward, masked):
        constants, launch = constants_of(90, slots, channels, torch.bfloat16, backward, masked)
        return constants | {"WIDE": True, "PRECISION": "ieee"}, launch

    monkeypatch.setattr(slot_attention, "slot_attention_constants", constants)
    given = draw(random, size)
    expected = gradients(reference.slot_attention_step, *[one.double() for one in given])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = gradients(lambda *leaves: step(*leaves, True, "triton"), *[one.to(device) for one in given])
    close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("query", "features", "error", "message"),
    [
        ((1, 65, 4), (1, 3, 4), ValueError, r"query must hold from 1 to 64 slots, but is \(1, 65, 4\)"),
        ((1, 2, 513), (1, 3, 513), ValueError, r"c from 1 to 512, but are \(1, 3, 513\)"),
        ((1, 2, 4), (1, 0, 4), ValueError, "n at least 1"),
        ((1, 2, 4), (2, 3, 4), ValueError, r"query \(1, 2, 4\) and features \(2, 3, 4\) must agree"),
    ],
)
def test_what_the_kernels_refuse(query, features, error, message):
    with pytest.raises(error, match=message):
        step(torch.zeros(query), torch.zeros(features), True, "triton")
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=f"must both be float32.*{dtype}"):
            step(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4, dtype=dtype), True, "triton")


def draw_mask(images, slots):
    """A mask that differs between the images. At least one slot of each image takes part."""
    mask = torch.ones(images, slots, dtype=torch.bool)
    for image in range(images):
        mask[image, image % slots :: 3 if image == 0 else 2] = False
        mask[image, (image + 1) % slots] = True
    return mask


# As above: one feature, less than a tile, several tiles and a rest, several splits, more slots than a tile, channels in parts.
MASKED_SIZES = [(2, 1, 7, 20), (2, 63, 11, 16), (2, 500, 11, 70), (1, 2300, 3, 4), (2, 63, 24, 256), (1, 17, 64, 512)]


@pytest.mark.parametrize("with_gradient_of_attention", [False, True])
@pytest.mark.parametrize("size", MASKED_SIZES)
def test_masked_slots_take_no_part(place, poisoned, random, size, with_gradient_of_attention):
    query, features, grad_update, grad_attention = draw(random, size)
    mask = draw_mask(size[0], size[2])
    grad_attention = grad_attention if with_gradient_of_attention else None
    wide = [None if one is None else one.double() for one in (query, features, grad_update, grad_attention)]
    expected = gradients(lambda *leaves: reference.slot_attention_step(*leaves, slot_mask=mask), *wide)
    # The query of a masked slot and its incoming gradients do not matter.
    query[~mask] = torch.nan
    grad_update[~mask] = torch.nan
    if grad_attention is not None:
        grad_attention[~mask] = torch.inf
    given = [None if one is None else one.to(place.device) for one in (query, features, grad_update, grad_attention)]
    found = gradients(lambda *leaves: step(*leaves, True, place.backend, mask.to(place.device)), *given)
    # With one feature, the update is nearly that feature for any attention, so the gradient is a small difference of large numbers.
    close(found, expected, 1e-5 if size[1] > 1 else 1e-4)
    update, attention, grad_query, _ = (one.cpu() for one in found)
    for masked in (update[~mask], attention[~mask], grad_query[~mask]):
        assert not masked.any()
    mass = step(*given[:2], False, place.backend, mask.to(place.device))[2].cpu()
    assert (mass[~mask] == torch.tensor(slot_attention.EPSILON)).all()


def test_masked_is_a_competition_of_the_others(place, poisoned, random):
    given = [one.to(place.device) for one in draw(random, (3, 150, 7, 20))]
    keep = [0, 2, 3, 6]
    mask = torch.zeros(3, 7, dtype=torch.bool, device=place.device)
    mask[:, keep] = True
    found = gradients(lambda *leaves: step(*leaves, True, place.backend, mask), *given)
    query, features, grad_update, grad_attention = given
    few = query[:, keep], features, grad_update[:, keep], grad_attention[:, keep]
    expected = gradients(lambda *leaves: step(*leaves, True, place.backend), *few)
    for one, other in zip((*(part[:, keep] for part in found[:3]), found[3]), expected, strict=True):
        torch.testing.assert_close(one, other)
    everyone = gradients(lambda *leaves: step(*leaves, True, place.backend, torch.ones_like(mask)), *given)
    unmasked = gradients(lambda *leaves: step(*leaves, True, place.backend), *given)
    for one, other in zip(everyone, unmasked, strict=True):
        torch.testing.assert_close(one, other)


def test_image_without_a_slot(place, poisoned, random):
    """Zeros, and no NaN; the other image has the same result as alone."""
    given = [one.to(place.device) for one in draw(random, (2, 70, 5, 20))]
    mask = torch.tensor([[False] * 5, [True] * 5], device=place.device)
    found = gradients(lambda *leaves: step(*leaves, True, place.backend, mask), *given)
    alone = gradients(lambda *leaves: step(*leaves, True, place.backend), *(one[1:] for one in given))
    for both, one in zip(found, alone, strict=True):
        assert not both[0].any()
        torch.testing.assert_close(both[1:], one)
    wide = [one.cpu().double() for one in given]
    expected = reference.slot_attention_step(*wide[:2], slot_mask=mask.cpu())
    close(found[:2], expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_in_half_precision(place, poisoned, random, dtype):
    given = [one.to(dtype) for one in draw(random, (2, 200, 7, 64))]
    mask = draw_mask(2, 7)
    wide = [one.double() for one in given]
    expected = gradients(lambda *leaves: reference.slot_attention_step(*leaves, slot_mask=mask), *wide)
    mask = mask.to(place.device)
    found = gradients(
        lambda *leaves: step(*leaves, True, place.backend, mask), *[one.to(place.device) for one in given]
    )
    close(found, expected, 4 * torch.finfo(dtype).eps)


def test_masked_operators_pass_opcheck(place, random):
    query, features, grad_update, grad_attention = (one.to(place.device) for one in draw(random, (2, 40, 5, 20)))
    mask = draw_mask(2, 5).to(place.device)
    for asked in (True, False):
        leaves = query.clone().requires_grad_(), features.clone().requires_grad_()
        torch.library.opcheck(step.default, (*leaves, asked, place.backend, mask))
        update, attention, mass = step(query, features, asked, place.backend, mask)
        arguments = query, features, update, attention, mass, grad_update, grad_attention if asked else None
        backward = torch.ops.msf_fast.slot_attention_step_backward.default
        torch.library.opcheck(backward, (*arguments, place.backend, mask))


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_break(place, random, masked):
    query, features, grad_update, grad_attention = (one.to(place.device) for one in draw(random, (3, 40, 5, 20)))
    mask = draw_mask(3, 5).to(place.device) if masked else None

    def run(query, features, mask):
        return step(query * 2, features, True, place.backend, mask)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for images in (2, 3):
        now = [one[:images] for one in (query, features, grad_update, grad_attention)]
        some = mask[:images] if masked else None
        got = gradients(functools.partial(compiled, mask=some), *now)
        wanted = gradients(functools.partial(run, mask=some), *now)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_gradient_of_float64_with_a_mask(random):
    query, features, _, _ = (one.double().requires_grad_() for one in draw(random, (3, 6, 3, 4)))
    mask = torch.tensor([[True, False, True], [False, True, False], [False] * 3])
    assert torch.autograd.gradcheck(lambda *leaves: step(*leaves, True, "torch", mask)[:2], (query, features))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mask_that_does_not_fit(backend):
    query, features = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    with pytest.raises(TypeError, match=r"slot_mask must be of torch\.bool, but is of torch\.float32"):
        step(query, features, True, backend, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"slot_mask must be \(b, s\), \(2, 3\) for this query, but is \(3,\)"):
        step(query, features, True, backend, torch.ones(3, dtype=torch.bool))


@pytest.mark.gpu
def test_what_does_not_fit_goes_to_torch():
    query, features = torch.zeros(1, 2, 4, device="cuda"), torch.zeros(1, 3, 4, device="cuda")
    assert slot_attention.choose_backend(query, features) == "triton"
    assert slot_attention.choose_backend(query.double(), features.double()) == "torch"
    assert slot_attention.choose_backend(query.new_zeros(1, 65, 4), features) == "torch"
    assert slot_attention.choose_backend(query.new_zeros(1, 2, 513), features.new_zeros(1, 3, 513)) == "torch"
