"""Losses and scores in pieces against plain cross-entropy: values, gradients, types, and the memory they need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from workers.models.causal_lm.network import linear_loss, pieces
from workers.models.causal_lm.network.link import Link
from workers.models.causal_lm.network.readout import Readout, loss, token_scores

ROOT = Path(__file__).resolve().parents[4]
LINKS = [Link(), Link(scale=0.25), Link(cap=3.0), Link(before=0.5, scale=2.0, cap=5.0)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Seven rows of the vocabulary below, and of a piece three rows at a time.
    monkeypatch.setattr(pieces, "PIECE_BYTES", 7 * 4 * 50)
    monkeypatch.setattr(pieces, "LOSS_BYTES", 7 * 4 * 50)
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 3 * 4 * 50)
    yield
    torch.set_num_threads(threads)


class Wrapped(nn.Linear):
    """A linear layer that is not exactly nn.Linear, as adapters and quantized layers are."""


def make(
    rows: int = 30, width: int = 16, vocabulary: int = 50, link: Link | None = None, kind: Any = nn.Linear, **given: Any
) -> tuple[Readout, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    head = kind(width, vocabulary, **given)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return Readout(hidden, head, link or Link()), targets


def plain(readout: Readout, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(readout.logits().float(), targets, label_smoothing=smoothing)


def gradients(readout: Readout, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, [readout.hidden, *readout.lm_head.parameters()]))


@pytest.mark.parametrize("kind", [nn.Linear, Wrapped])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("link", LINKS)
def test_pieces_are_plain_cross_entropy(kind: Any, bias: bool, smoothing: float, link: Link) -> None:
    readout, targets = make(link=link, kind=kind, bias=bias)
    got, want = loss(readout, targets, smoothing), plain(readout, targets, smoothing)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(readout, got * 3), gradients(readout, want * 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_without_torchs_kernel_the_pieces_are_our_own(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """torch has it since 2.15; older versions, narrow types and capped logits take ours."""
    readout, targets = make(bias=bias)
    theirs = loss(readout, targets)
    monkeypatch.setattr(linear_loss, "_torchs_own", lambda *given: False)
    ours = loss(readout, targets)
    if hasattr(F, "linear_cross_entropy"):
        assert type(ours.grad_fn) is not type(theirs.grad_fn)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(readout, ours), gradients(readout, plain(readout, targets)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 90), smoothing=st.floats(0, 0.9))
def test_any_number_of_rows_and_words(rows: int, vocabulary: int, smoothing: float) -> None:
    readout, targets = make(rows, 8, vocabulary)
    got, want = loss(readout, targets, smoothing), plain(readout, targets, smoothing)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(readout, got), gradients(readout, want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_hold_against_finite_differences() -> None:
    """An independent judge of the derivation, soft cap and smoothing included; in float64."""
    readout, targets = make(5, 4, 6, link=Link(before=0.5, scale=2.0, cap=2.0))
    hidden = readout.hidden.detach().double().requires_grad_()
    head = readout.lm_head.double()

    def value(hidden: Tensor) -> Tensor:
        return F.cross_entropy(Readout(hidden, head, readout.link).logits(), targets, label_smoothing=0.2)

    exact = torch.autograd.functional.jacobian(value, hidden)
    step = 1e-5
    for index in [(0, 0), (2, 3), (4, 1)]:
        bump = torch.zeros_like(hidden)
        bump[index] = step
        slope = (value(hidden + bump) - value(hidden - bump)) / (2 * step)
        torch.testing.assert_close(slope, exact[index], rtol=1e-6, atol=1e-9)
    narrow = hidden.detach().float().requires_grad_()
    ours = loss(Readout(narrow, head.float(), readout.link), targets, 0.2)
    torch.testing.assert_close(torch.autograd.grad(ours, narrow)[0], exact.float(), rtol=1e-3, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_frozen_states_neither() -> None:
    readout, targets = make()
    readout.lm_head.requires_grad_(False)
    value = loss(readout, targets)
    want = gradients_of_hidden(readout, plain(readout, targets))
    torch.testing.assert_close(gradients_of_hidden(readout, value), want, rtol=1e-4, atol=1e-6)
    assert readout.lm_head.weight.grad is None
    readout, targets = make()
    value = loss(Readout(readout.hidden.detach(), readout.lm_head, Link()), targets)
    torch.autograd.backward(value)
    assert readout.lm_head.weight.grad is not None
    with torch.no_grad():
        assert not loss(readout, targets).requires_grad


def gradients_of_hidden(readout: Readout, value: Tensor) -> Tensor:
    return torch.autograd.grad(value, readout.hidden)[0]


def test_gradients_add_up_over_micro_batches() -> None:
    readout, targets = make()
    for _ in range(2):
        torch.autograd.backward(loss(readout, targets))
    weight = readout.lm_head.weight
    assert isinstance(weight.grad, Tensor)
    once = torch.autograd.grad(plain(readout, targets), weight)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-4, atol=1e-6)


def test_a_loss_is_used_once() -> None:
    readout, targets = make(link=Link(cap=3.0))
    value = loss(readout, targets)
    torch.autograd.backward(value, retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        torch.autograd.backward(value)


@pytest.mark.parametrize("kind", [nn.Linear, Wrapped])
def test_under_autocast_the_loss_stays_float32_and_products_are_narrow(kind: Any) -> None:
    readout, targets = make(40, 32, 50, kind=kind, bias=False)
    want = plain(readout, targets)
    with torch.autocast("cpu", torch.bfloat16):
        got, narrow = loss(readout, targets), plain(readout, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, narrow, rtol=1e-6, atol=1e-6)
    assert not torch.equal(got, want)
    for a, b in zip(gradients(readout, got), gradients(readout, want), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.02


def test_bfloat16_heads_sum_their_pieces_in_float32() -> None:
    readout, targets = make(2000, 16, 50, bias=False)
    head = readout.lm_head.bfloat16()
    narrow = Readout(readout.hidden.detach().bfloat16().requires_grad_(), head, Link())
    value = loss(narrow, targets)
    wide = Readout(narrow.hidden.detach().float(), head.float(), Link())
    torch.testing.assert_close(value, plain(wide, targets), rtol=1e-2, atol=1e-2)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("link", LINKS)
def test_a_bfloat16_heads_gradient_is_one_product_and_joins_what_is_there(link: Link, watched: bool) -> None:
    """Beside float64: as near as rounding once a micro-batch allows, whether a hook takes the gradient or the product
    adds to it."""
    readout, targets = make(30, 64, 50, link=link, bias=False)
    head = readout.lm_head.bfloat16()
    hidden = readout.hidden.detach().bfloat16()
    want = torch.zeros(50, 64, dtype=torch.float64)
    arrived: list[Tensor] = []
    if watched:
        head.weight.register_post_accumulate_grad_hook(lambda weight: arrived.append(weight.grad.clone()))  # type: ignore[arg-type, union-attr]
    for factor in (1.0, 0.37, 2.0):
        given = hidden * factor
        torch.autograd.backward(loss(Readout(given.clone().requires_grad_(), head, link), targets) * factor)
        exact = nn.Linear(64, 50, bias=False).double()
        exact.weight = nn.Parameter(head.weight.detach().double())
        value = F.cross_entropy(Readout(given.double(), exact, link).logits(), targets) * factor
        want += torch.autograd.grad(value, exact.weight)[0]
    assert len(arrived) == (3 if watched else 0)
    assert isinstance(head.weight.grad, Tensor)
    assert head.weight.grad.dtype == torch.bfloat16
    assert float((head.weight.grad - want).norm() / want.norm()) < 0.01


def test_large_heads_make_the_same_gradient_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    readout, targets = make(30, 64, 50, bias=False)
    head = readout.lm_head.bfloat16()
    narrow = Readout(readout.hidden.detach().bfloat16().requires_grad_(), head, Link())
    whole = gradients(narrow, loss(narrow, targets))
    monkeypatch.setattr(linear_loss, "in_one_piece", lambda *given: False)
    in_pieces = gradients(narrow, loss(narrow, targets))
    assert torch.equal(whole[0], in_pieces[0])
    assert not torch.equal(whole[1], in_pieces[1]), "summed over pieces, and rounded otherwise"
    assert float((whole[1] - in_pieces[1]).norm() / whole[1].norm()) < 0.01


def test_no_targets_give_zero_and_no_nan() -> None:
    readout, _ = make()
    empty = Readout(readout.hidden[:0], readout.lm_head, Link())
    value = loss(empty, torch.empty(0, dtype=torch.int64))
    torch.autograd.backward(value)
    assert value.item() == 0.0
    assert torch.equal(readout.hidden.grad, torch.zeros_like(readout.hidden))  # type: ignore[arg-type]


@pytest.mark.parametrize("link", LINKS)
def test_scores_are_those_of_the_logits(link: Link) -> None:
    readout, targets = make(link=link)
    nll, correct = token_scores(readout, targets)
    logits = readout.logits().detach()
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-6)
    assert torch.equal(correct, logits.argmax(dim=-1) == targets)
    assert nll.dtype == torch.float32
    assert not nll.requires_grad
    right = logits.argmax(dim=-1)
    assert token_scores(readout, right)[1].all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_never_held_all_at_once(precision: str) -> None:
    """(N, V) in float32 would be 200 MB here, and once more as a gradient (300 MB were seen); the weight's gradient
    is 26 MB, and made once more while it adds up."""
    code = (
        "import torch; from torch import nn\n"
        "from workers.training.memory import PeakMeter, settled_private_bytes\n"
        "from workers.models.causal_lm.network.readout import Readout, loss, token_scores\n"
        "from workers.models.causal_lm.network import pieces\n"
        "from workers.models.causal_lm.network.link import Link\n"
        "pieces.PIECE_BYTES = pieces.LOSS_BYTES = 2**22\n"
        "torch.set_num_threads(1)\n"
        "head = nn.Linear(128, 50_000, bias=False)\n"
        "hidden = torch.randn(1000, 128, requires_grad=True); targets = torch.randint(50_000, (1000,))\n"
        "def run(rows):\n"
        "    readout = Readout(hidden[:rows], head, Link())\n"
        f"    with torch.autocast('cpu', torch.bfloat16, enabled={precision == 'bf16'}):\n"
        "        value = loss(readout, targets[:rows])\n"
        "    torch.autograd.backward(value); token_scores(readout, targets[:rows])\n"
        "run(1); before = settled_private_bytes()\n"
        "meter = PeakMeter(torch.device('cpu')); run(1000)\n"
        "print(meter.stop().host - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < (100e6 if precision == "fp32" else 150e6)
