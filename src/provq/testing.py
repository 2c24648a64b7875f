"""The laws of a quantizer, each a check that can fail, for provq's own and for third parties'.

    from functools import partial
    check_quantizer(partial(MyQuantizer, dim=8))

A law takes a callable that makes a fresh quantizer, and raises AssertionError with what it found.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from provq.errors import UserError
from provq.quantizers.base import Quantized, Quantizer

Make = Callable[[], Quantizer]
Law = Callable[[Make], None]


def check_quantizer(make: Make) -> None:
    """Hold a quantizer against every law.

    Args:
        make: Makes a fresh quantizer; picklable, for two processes call it too, such as a `functools.partial`.

    Raises:
        AssertionError: A law is broken; the message says which and how.
    """
    for law in QUANTIZER_LAWS:
        law(make)
    check_two_ranks([make])


def hard_output_is_the_code(make: Make) -> None:
    """At hardness 1 and in evaluation the output equals `lookup(indices)` to the bit."""
    for training in (True, False):
        quantizer, z = _started(make, training)
        before = copy.deepcopy(quantizer)  # the step may teach the codebook
        quantized, indices, _ = quantizer(z)
        if quantizer.codebook_sizes:
            _require(torch.equal(quantized, before.lookup(indices)), "hard output differs from lookup(indices)")


def soft_output_is_the_latent(make: Make) -> None:
    """At hardness 0 the output equals the relaxed latents to the bit."""
    quantizer, z = _started(make)
    quantizer.hardness.fill_(0.0)
    continuous = quantizer.leave(quantizer.enter(z))
    _require(torch.equal(quantizer(z).quantized, continuous), "output at hardness 0 differs from the relaxed latents")


def blend_is_linear(make: Make) -> None:
    """In between the output lies on the line from the relaxed latents to the code, in float64 up to rounding.

    Where parts harden one after the other (`stagger`) it lies between the two in each element.
    """
    quantizer, z = _started(make)
    quantizer.hardness.fill_(0.25)
    before = copy.deepcopy(quantizer)
    quantized, indices, _ = quantizer(z)
    u = before.leave(before.enter(z)).double()
    q = before.lookup(indices).double() if quantizer.codebook_sizes else u
    if getattr(quantizer, "stagger", 0):
        low, high = torch.minimum(u, q) - 1e-6, torch.maximum(u, q) + 1e-6
        _require(bool(((low <= quantized) & (quantized <= high)).all()), "a blend lies beyond latent and code")
        return
    torch.testing.assert_close(quantized.double(), 0.75 * u + 0.25 * q, rtol=1e-5, atol=1e-6)


def indices_ignore_hardness(make: Make) -> None:
    """Indices are those of the nearest codes at every hardness."""
    quantizer, z = _started(make)
    found = []
    for hardness in (0.0, 0.5, 1.0):
        twin = copy.deepcopy(quantizer)
        twin.hardness.fill_(hardness)
        found.append(twin(z).indices)
    _require(all(torch.equal(found[0], other) for other in found), "indices depend on hardness")


def evaluation_ignores_hardness(make: Make) -> None:
    """In evaluation hardness is 1, whatever the buffer holds."""
    quantizer, z = _started(make, training=False)
    hard = quantizer(z)
    quantizer.hardness.fill_(0.3)
    _require(_equal(quantizer(z), hard), "evaluation depends on the hardness buffer")


def indices_are_in_range(make: Make) -> None:
    """Indices are int64, at least 0, and below the size of their codebook.

    A codebook of several may have no token at some places, -1; never the last, nor may one be without any.
    """
    quantizer, z = _started(make)
    indices = quantizer(z).indices
    _require(indices.dtype == torch.int64, f"indices are {indices.dtype}, not int64")
    sizes = torch.tensor(quantizer.codebook_sizes)
    if len(sizes) == 1 and indices.shape == z.shape[:-1]:
        indices = indices[..., None]
    _require(indices.shape == (*z.shape[:-1], len(sizes)), f"indices have shape {tuple(indices.shape)}")
    _require(bool(((indices >= -1) & (indices < sizes)).all()), "an index is out of range")
    if len(sizes):
        _require(bool((indices[..., -1] >= 0).all()), "a token has no index")
        _require(bool((indices >= 0).flatten(0, -2).any(0).all()), "a codebook has no token")


def gradient_reaches_the_encoder(make: Make) -> None:
    """At every hardness a loss on the output moves what went in."""
    for hardness in (0.0, 0.5, 1.0):
        quantizer, z = _started(make)
        quantizer.hardness.fill_(hardness)
        z = z.clone().requires_grad_()
        quantizer(z).quantized.square().sum().backward()
        gradient = z.grad
        _require(gradient is not None and bool(gradient.isfinite().all()), f"no finite gradient at hardness {hardness}")
        _require(gradient is not None and bool(gradient.abs().sum() > 0), f"gradient is zero at hardness {hardness}")


def two_passes_share_a_backward(make: Make) -> None:
    """A quantizer that is called twice, at two hardnesses, still passes the gradients of both calls."""
    quantizer, z = _started(make)
    z = z.clone().requires_grad_()
    losses = []
    for hardness in (0.5, 1.0):
        quantizer.hardness.fill_(hardness)
        quantized, _, loss = quantizer(z)
        losses.append(quantized.square().sum() + loss)
    loss = torch.stack(losses).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    _require(z.grad is not None and bool(z.grad.isfinite().all()), "two passes have no finite gradient")


def a_code_is_its_own_nearest(make: Make) -> None:
    """The values of an index are assigned to that index again, or to an equal code.

    Of a quantizer that adds up what its members give, such as a residual one, it holds for each member.
    """
    quantizer, _ = _started(make, training=False)
    for part in quantizer.modules():
        if isinstance(part, Quantizer) and part.codebook_sizes and not part.members:
            values = part.codes(part.assign(part.relax(_latents(part.code_dim, seed=1))))
            torch.testing.assert_close(part.codes(part.assign(values)), values, rtol=1e-5, atol=1e-6)


def absent_tokens_are_zero(make: Make) -> None:
    """Index -1 stands for zeros; any other index outside of the codebook is an IndexError."""
    quantizer, z = _started(make, training=False)
    if not quantizer.codebook_sizes:
        return
    indices = quantizer(z).indices
    _require(bool((quantizer.lookup(torch.full_like(indices, -1)) == 0).all()), "index -1 does not give zeros")
    for wrong in (-2, max(quantizer.codebook_sizes)):
        try:
            quantizer.lookup(torch.full_like(indices, wrong))
        except IndexError:
            continue
        raise AssertionError(f"lookup takes the index {wrong}")


def padding_changes_nothing(make: Make) -> None:
    """Masked tokens change neither loss nor codebook; they come out as zeros with index -1."""
    plain, z = _started(make)
    padded = copy.deepcopy(plain)
    junk = torch.full_like(z, 7.0)
    mask = torch.cat([torch.ones(z.shape[:-1]), torch.zeros(z.shape[:-1])], 1).bool()
    torch.manual_seed(3)
    expected = plain(z)
    torch.manual_seed(3)
    found = padded(torch.cat([z, junk], 1), mask)
    torch.testing.assert_close(found.loss, expected.loss)
    _require(torch.equal(found.quantized[:, : z.shape[1]], expected.quantized), "padding changes the output of tokens")
    _require(bool((found.quantized[:, z.shape[1] :] == 0).all()), "padding does not come out as zeros")
    _require(bool((found.indices[:, z.shape[1] :] == -1).all()), "padding has an index other than -1")
    _same_state(plain, padded, "padding changes the codebook")


def a_full_mask_is_no_mask(make: Make) -> None:
    """A mask that keeps everything changes nothing."""
    plain, z = _started(make)
    masked = copy.deepcopy(plain)
    torch.manual_seed(3)
    expected = plain(z)
    torch.manual_seed(3)
    found = masked(z, torch.ones(z.shape[:-1], dtype=torch.bool))
    _require(_equal(found, expected), "an all-true mask changes the result")
    _same_state(plain, masked, "an all-true mask changes the codebook")


def bad_tokens_stay_out(make: Make) -> None:
    """A token with NaN or infinity enters neither loss nor codebook, has index -1 and stays visible."""
    plain, z = _started(make)
    spoilt = copy.deepcopy(plain)
    bad = z[:, :2].clone()
    bad[:, 0, 0], bad[:, 1, -1] = math.nan, math.inf
    torch.manual_seed(3)
    expected = plain(z)
    torch.manual_seed(3)
    found = spoilt(torch.cat([z, bad], 1))
    torch.testing.assert_close(found.loss, expected.loss)
    _require(bool((found.indices[:, z.shape[1] :] == -1).all()), "a token that is not finite has an index")
    _require(
        not bool(found.quantized[:, z.shape[1] :].isfinite().all(-1).any()), "a token that is not finite is hidden"
    )
    _same_state(plain, spoilt, "a token that is not finite reaches the codebook")


def evaluation_changes_no_state(make: Make) -> None:
    """Evaluation leaves every parameter and buffer as it was, and draws no random number."""
    quantizer, z = _started(make, training=False)
    before, random = copy.deepcopy(quantizer), torch.get_rng_state()
    quantizer(z + 1)
    _same_state(before, quantizer, "evaluation changes state")
    _require(torch.equal(random, torch.get_rng_state()), "evaluation draws random numbers")


def a_fresh_quantizer_evaluates(make: Make) -> None:
    """Evaluation before any training works and settles nothing."""
    torch.manual_seed(0)
    quantizer = make().eval()
    before = copy.deepcopy(quantizer)
    quantizer(_latents(quantizer.dim))
    _same_state(before, quantizer, "evaluation starts the codebook")


def returned_tensors_are_the_callers(make: Make) -> None:
    """Changing a returned tensor in place changes no later result, and no gradient."""
    for training in (True, False):
        quantizer, z = _started(make, training)
        with torch.no_grad():
            twin = copy.deepcopy(quantizer)
            for tensor in twin(z):
                tensor.add_(1)
            quantizer(z)
            torch.manual_seed(3)
            expected = quantizer(z)
            torch.manual_seed(3)
            _require(_equal(twin(z), expected), "a returned tensor is part of the quantizer")
        z.requires_grad_()
        gradients = []
        for added in (0, 1):
            torch.manual_seed(3)
            quantized, _, loss = copy.deepcopy(twin)(z)
            quantized += added
            gradients.append(torch.autograd.grad(quantized.sum() + loss, z)[0])
        torch.testing.assert_close(gradients[1], gradients[0])


def save_and_load_keep_indices(make: Make) -> None:
    """A fresh quantizer that loads the state gives the same result, and does not start anew."""
    quantizer, z = _started(make)
    torch.manual_seed(9)
    restored = make()
    restored.load_state_dict(quantizer.state_dict())
    torch.manual_seed(3)
    expected = quantizer(z)
    torch.manual_seed(3)
    _require(_equal(restored(z), expected), "a restored quantizer differs")
    _require("hardness" not in quantizer.state_dict(), "hardness is saved with the quantizer")


def search_is_float32_under_autocast(make: Make) -> None:
    """Autocast changes no index, and the output has the type that came in."""
    quantizer, z = _started(make, training=False)
    short = z.bfloat16()
    expected = quantizer(short.float()).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(short)
        entered = quantizer.enter(short)
        tokens = quantizer.assign(entered)
    _require(torch.equal(found.indices, expected), "autocast changes indices")
    _require(entered.dtype == torch.float32, f"autocast lets latents be compared as {entered.dtype}")
    _require(not quantizer.codebook_sizes or torch.equal(tokens, expected), "autocast changes what `assign` gives")
    _require(found.quantized.dtype == torch.bfloat16, f"bfloat16 latents come out as {found.quantized.dtype}")


def casts_keep_what_must_be_float32(make: Make) -> None:
    """After `.bfloat16()` hardness and the running statistics are what they were, in float32."""
    quantizer, _ = _started(make)
    quantizer.hardness.fill_(0.999)
    names = ("hardness", *quantizer.float32_buffers)
    before = {name: getattr(quantizer, name).clone() for name in names}
    quantizer.bfloat16()
    for name in names:
        after = getattr(quantizer, name)
        _require(after.dtype == torch.float32 and torch.equal(after, before[name]), f"a cast changes {name}")


def compiles_to_a_full_graph(make: Make) -> None:
    """`torch.compile(fullgraph=True)` works from the first batch on, and gives what the plain call gives."""
    for training in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        quantizer = make().train(training)
        twin = copy.deepcopy(quantizer)
        compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
        for seed in (1, 2):
            z = _latents(quantizer.dim, seed)
            torch.manual_seed(3)
            expected = twin(z)
            torch.manual_seed(3)
            found = compiled(z)
            _require(torch.equal(found.indices, expected.indices), "compiling changes indices")
            torch.testing.assert_close(found.quantized, expected.quantized)
            torch.testing.assert_close(found.loss, expected.loss)
    torch._dynamo.reset()


def an_empty_batch_works(make: Make) -> None:
    """No tokens, or none that is kept, give a loss of exactly 0 and change no codebook."""
    quantizer, z = _started(make)
    before = copy.deepcopy(quantizer)
    for empty, mask in ((z[:0], None), (z, torch.zeros(z.shape[:-1], dtype=torch.bool))):
        empty = empty.clone().requires_grad_()
        quantized, indices, loss = quantizer(empty, mask)
        _require(quantized.shape == empty.shape and len(indices) == len(empty), "an empty batch has another shape")
        _require(float(loss.detach()) == 0, f"an empty batch has loss {float(loss.detach())}")
        (loss + quantized.sum()).backward()
        _same_state(before, quantizer, "an empty batch changes state")


def wrong_shapes_are_named(make: Make) -> None:
    """A wrong last axis or a wrong mask is an error that names the argument and its shape."""
    quantizer, z = _started(make)
    for arguments in ((torch.zeros(2, quantizer.dim + 1), None), (z, torch.ones(1, dtype=torch.bool))):
        try:
            quantizer(*arguments)
        except UserError as error:
            wrong = arguments[0] if arguments[1] is None else arguments[1]
            _require(str(tuple(wrong.shape)) in str(error), f"the message names no shape: {error}")
        else:
            raise AssertionError("a wrong shape is accepted")


QUANTIZER_LAWS: tuple[Law, ...] = (
    hard_output_is_the_code,
    soft_output_is_the_latent,
    blend_is_linear,
    indices_ignore_hardness,
    evaluation_ignores_hardness,
    indices_are_in_range,
    gradient_reaches_the_encoder,
    two_passes_share_a_backward,
    a_code_is_its_own_nearest,
    absent_tokens_are_zero,
    padding_changes_nothing,
    a_full_mask_is_no_mask,
    bad_tokens_stay_out,
    evaluation_changes_no_state,
    a_fresh_quantizer_evaluates,
    returned_tensors_are_the_callers,
    save_and_load_keep_indices,
    search_is_float32_under_autocast,
    casts_keep_what_must_be_float32,
    compiles_to_a_full_graph,
    an_empty_batch_works,
    wrong_shapes_are_named,
)


def check_two_ranks(makes: Sequence[Make]) -> None:
    """Hold quantizers against the law of ranks: two processes with half a batch each are one with the whole.

    The codebook starts alike, learns alike and gives the same indices; moves at random (revival) are only held to be
    the same on both ranks. Built before the process group exists, a quantizer still takes part.

    Args:
        makes: What makes the quantizers; picklable.

    Raises:
        AssertionError: Ranks differ from each other or from a single process.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_on_rank, args=(list(makes), folder), nprocs=2)  # type: ignore[no-untyped-call]
        for number, make in enumerate(makes):
            halves = [torch.load(Path(folder) / f"{number}-{rank}.pt", weights_only=True) for rank in (0, 1)]
            torch.manual_seed(0)
            quantizer = make()
            indices = _train(quantizer, half=None)
            name = f"{number}: {type(quantizer).__name__}"
            for key, value in quantizer.state_dict().items():
                _require(
                    torch.equal(halves[0]["state"][key], halves[1]["state"][key]), f"{name}: ranks differ in {key}"
                )
                if not _moves_at_random(quantizer):
                    close = torch.allclose(halves[0]["state"][key].double(), value.double(), rtol=1e-4, atol=1e-6)
                    _require(close, f"{name}: two ranks learn another {key} than one")
            if not _moves_at_random(quantizer):
                together = torch.cat([half["indices"] for half in halves])
                _require(torch.equal(together, indices), f"{name}: two ranks give other indices than one")


def _on_rank(rank: int, makes: Sequence[Make], folder: str) -> None:
    torch.set_num_threads(1)
    built = []
    for make in makes:
        torch.manual_seed(0)
        built.append(make())
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for number, quantizer in enumerate(built):
        indices = _train(quantizer, half=rank)
        torch.save({"state": quantizer.state_dict(), "indices": indices}, Path(folder) / f"{number}-{rank}.pt")
    distributed.destroy_process_group()


def _train(quantizer: Quantizer, half: int | None) -> Tensor:
    """Three steps of gradient descent on whole batches, or on one half of each; the indices of the last."""
    parameters = list(quantizer.parameters())
    indices = torch.empty(0)
    for seed in (1, 2, 3):
        z = _latents(quantizer.dim, seed)
        z = z if half is None else z.chunk(2)[half]
        quantized, indices, loss = quantizer(z)
        if parameters:
            (quantized.square().mean() + loss).backward()
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        if half is not None:
                            distributed.all_reduce(parameter.grad)
                            parameter.grad /= 2
                        parameter.sub_(0.1 * parameter.grad)
                        parameter.grad = None
    return indices


def _moves_at_random(quantizer: Quantizer) -> bool:
    return any(getattr(part, "reviving", False) for part in quantizer.modules())


def _started(make: Make, training: bool = True) -> tuple[Quantizer, Float[Tensor, "4 64 dim"]]:
    """A quantizer whose codebook has settled on a first batch, and a second batch."""
    torch.manual_seed(0)
    quantizer = make().train()
    quantizer(_latents(quantizer.dim))
    return quantizer.train(training), _latents(quantizer.dim, seed=1)


def _latents(dim: int, seed: int = 0) -> Float[Tensor, "4 64 dim"]:
    return torch.randn(4, 64, dim, generator=torch.Generator().manual_seed(seed))


def _equal(one: Quantized, other: Quantized) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _same_state(one: Quantizer, other: Quantizer, complaint: str) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    for key, value in mine.items():
        same = torch.allclose(value.double(), theirs[key].double(), rtol=1e-5, atol=1e-7)
        _require(same, f"{complaint}: {key}")


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise AssertionError(complaint)
