"""Models and checks that single experiments bring: Lemma 2, precision, norms, filters, sounds, images, verdicts."""

import math
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deq import reference
from deq.experiments import _lemma2 as lemma2
from deq.experiments import _precision as precision
from deq.experiments import _sawtooth as sawtooth
from deq.experiments import audio, multiscale
from deq.experiments._attempts import LONGER, WIDER, attempt_claims, attempt_table, attempts
from deq.experiments._boolean import TASKS, cube
from deq.experiments._conv_nets import MultiscaleDEQ, ResidualNet, convolve, grad_cam
from deq.experiments._dense_nets import ROW_SUM, DenseDEQ, _BoundedRows
from deq.experiments._filter_nets import FILTERS, FilterDEQ, FilterNet
from deq.experiments._judge import beats
from deq.experiments._lineup import feedforward
from deq.experiments._norm_nets import ScaledFeedForward, SelfLoopDEQ
from deq.experiments._result import CONDITIONAL, CONFOUNDED, FINITE_DEPTH, NOT_JUDGED, NOT_REPRODUCED, REPRODUCED
from deq.experiments._run import SettingsError
from deq.experiments._sound import chord, read_wav
from deq.experiments.features import draw as draw_features
from deq.experiments.saliency import SIZE, Images
from deq.experiments.sawtooth import NearConstruction, triangle

F32, F64 = torch.float32, torch.float64
few = settings(max_examples=20, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- verdicts --------------------------------------------------------------------------------------------------------


def row(model: str, values: list, **evidence) -> dict:
    return {"model": model, "mse": values, "evidence": evidence or None}


def test_a_claim_needs_medians_and_a_sign_test():
    good = beats("s", "Fig.", row("a", [1.0] * 8), [row("b", [2.0] * 8), row("c", [3.0] * 8)], quick=False)
    assert (good.verdict, good.measured, good.low, good.high, good.seeds) == (REPRODUCED, 2, 2, 2, 8)
    assert "8 against b, 8 against c" in good.note
    close = beats("s", "Fig.", row("a", [1.0] * 5 + [3.0] * 3), [row("b", [2.0] * 8)], quick=False)
    assert close.measured == 2 and close.verdict == NOT_REPRODUCED  # 5 of 8 seeds are no evidence
    assert beats("s", "Fig.", row("a", [2.0] * 8), [row("b", [1.0] * 8)], quick=False).verdict == NOT_REPRODUCED
    assert beats("s", "Fig.", row("a", [1.0] * 7), [row("b", [2.0] * 7)], quick=False).verdict == NOT_JUDGED
    assert beats("s", "Fig.", row("a", [1.0] * 8), [row("b", [2.0] * 8)], quick=True).verdict == NOT_JUDGED
    larger = beats("s", "Fig.", row("a", [3.0] * 8), [row("b", [2.0] * 8)], quick=False, larger=True, conditions="x")
    assert (larger.verdict, larger.measured) == (CONDITIONAL, 1.5)


def test_failures_are_infinitely_bad():
    failed = row("b", [None] * 8)
    assert beats("s", "Fig.", row("a", [1.0] * 8), [failed], quick=False).verdict == REPRODUCED
    assert beats("s", "Fig.", failed, [row("a", [1.0] * 8)], quick=False).measured == 0
    assert beats("s", "Fig.", failed, [failed | {"model": "c"}], quick=False).verdict == NOT_REPRODUCED


def test_a_claim_about_equilibria_needs_one():
    moved = {"residual": 1e-9, "residual_again": 1e-12, "moved": 0.1}
    claim = beats("s", "Fig.", row("a", [1.0] * 8, **moved), [row("b", [2.0] * 8)], quick=False)
    assert (claim.verdict, claim.kind) == (CONFOUNDED, FINITE_DEPTH)
    claim = beats("s", "Fig.", row("a", [1.0] * 8, **moved), [row("b", [2.0] * 8)], quick=False, about_equilibria=False)
    assert (claim.verdict, claim.kind) == (REPRODUCED, FINITE_DEPTH)


# --- Lemma 2 and precision -------------------------------------------------------------------------------------------


def test_random_contractions_are_contractions_and_their_fixed_points_exact():
    u = lemma2.draw(500, generator())
    assert (u >= 0).all() and (u <= 1).all() and (lemma2.lipschitz(u) < 1).all()
    z = lemma2.fixed_point(u)
    assert (lemma2.at(u, z) - z).abs().max() < 1e-13
    iterated = torch.zeros_like(z)
    for _ in range(3000):
        iterated = lemma2.at(u, iterated)
    slow = 1 / (1 - lemma2.lipschitz(u))
    assert ((iterated - z).abs() <= 1e-12 * slow + torch.exp(-3000 / slow)).all()


def test_lemma_2_holds_and_a_wrong_constant_would_be_noticed(monkeypatch):
    found = lemma2.check(2000, generator())
    assert found["violations"] == 0 and found["pointwise"] > 0 and found["residual"] < 1e-12
    assert 0.9 < found["tightest"] <= 1
    right = lemma2.lipschitz
    monkeypatch.setattr(lemma2, "lipschitz", lambda u: 0.5 * right(u))
    assert lemma2.check(2000, generator())["violations"] > 0


@few
@given(m=st.integers(1, 40), data=st.data())
def test_rescaled_construction_is_the_construction(m, data):
    j = data.draw(st.integers(0, 2**m - 1))
    W, c, y = precision.rescaled(m, [j], F64)
    z = sawtooth.as_float(m, sawtooth.relu(sawtooth.iterate(m, sawtooth.grid(m, [2 * j + 1]))), F64)
    t = torch.arange(1, m + 1, dtype=F64)
    assert torch.equal(y, z * torch.exp2(m // 2 - t))
    assert torch.equal(reference.cell(W, c, y, "relu"), y)
    assert W.abs().max() <= 2


@pytest.mark.parametrize("name, limit", [("float16", 10), ("bfloat16", 7)])
def test_half_precisions_stop_being_exact_where_they_should(name, limit):
    for m in (1, limit):
        assert precision.iterated_exactly(m, range(2**m), getattr(torch, name))
    assert not precision.iterated_exactly(limit + 1, range(2 ** (limit + 1)), getattr(torch, name))


# --- norms -----------------------------------------------------------------------------------------------------------


def test_self_loops_are_solved_exactly():
    net = SelfLoopDEQ(3, 1, 6, generator())
    x = torch.rand(3, 9, 1, dtype=F64, generator=generator(1))
    with torch.no_grad():
        net.g[0].fill_(-1.5)
        c, W = net.injection(x), net.weight()
        z, *_ = reference.solve(W, c, "relu", tol=1e-14, max_iter=100_000)
        torch.testing.assert_close(net.equilibrium(c), z, rtol=1e-9, atol=1e-10)
        output, residual = net.solved(x, 1e-10, 100)
        torch.testing.assert_close(output, net(x), rtol=1e-9, atol=1e-10)
        assert residual.max() < 1e-12
    assert (net.injection(torch.zeros_like(x))[..., :3] == 0).all()  # half of the neurons have no bias
    assert net.count == sum(p[0].numel() for p in net.parameters) - 6 * 7 // 2 - 3


@pytest.mark.parametrize("make", [lambda g: ScaledFeedForward(3, 1, 7, 3, g), lambda g: SelfLoopDEQ(3, 1, 7, g)])
def test_caps_bound_every_norm_and_leave_small_ones(make):
    net = make(generator())
    x = torch.rand(3, 5, 1, dtype=F64, generator=generator(1))
    with torch.no_grad():
        for p in net.parameters:
            p.mul_(3)
        for g in net.g:
            g.fill_(0.7)
        net(x)
        assert net.norms().max() > 2
        net.cap_(2.0)
        after = net.norms()
        assert (after <= 2 + 1e-12).all() and after.max() > 2 - 1e-9
        net.cap_(50.0)
        torch.testing.assert_close(net.norms(), after)


# --- filters and sounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", FILTERS)
def test_filter_equilibria_and_gradients(filter):
    net = FilterDEQ(2, 5, generator(), filter, 10.0)
    x = torch.linspace(-1, 1, 12).view(1, -1, 1).expand(2, -1, -1)
    net.last = None
    output = net(x)
    assert not net.failed().any()
    output.square().sum().backward()
    by_engine = [p.grad.clone() for p in net.parameters]
    for p in net.parameters:
        p.grad = None
    W, drive = net.weight(), net.drive(x)
    z = torch.zeros_like(drive)
    for _ in range(200):
        z = net.cell(W, drive, z)
    unrolled = net.readout(z)
    torch.testing.assert_close(output, unrolled, rtol=1e-3, atol=1e-4)
    unrolled.square().sum().backward()
    for p, grad in zip(net.parameters, by_engine, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-2, atol=1e-3)
    assert net.count == FilterNet(2, 5, generator(), filter, 10.0).count


def test_the_chord_is_deterministic_and_normalised():
    sound = chord(2000)
    assert torch.equal(sound, chord(2000)) and sound.abs().max() == 1 and sound.isfinite().all()


@pytest.mark.parametrize("size, kind, channels", [(1, np.uint8, 1), (2, "<i2", 2), (4, "<i4", 1)])
def test_wav_files_of_every_width_are_read(tmp_path, size, kind, channels):
    t = np.arange(400)
    tone = np.where(t >= 100, np.sin(0.3 * t), 0.01 * np.sin(0.3 * t))  # loud from 100 on
    scaled = tone * (2 ** (8 * size - 1) - 1) + (128 if size == 1 else 0)
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(size)
        file.setframerate(8000)
        file.writeframes(np.repeat(np.round(scaled), channels).astype(kind).tobytes())
    sound = read_wav(str(path), 300)
    expected = torch.from_numpy(tone[100:400] / np.abs(tone[100:400]).max())
    torch.testing.assert_close(sound, expected, rtol=0, atol=2.0 ** (2 - 8 * size) + 1e-9)
    with pytest.raises(SettingsError, match="400 samples; at least 401"):
        read_wav(str(path), 401)
    path.write_bytes(path.read_bytes()[:-1])  # cut off within its last sample
    assert len(read_wav(str(path), 399)) == 399
    with pytest.raises(SettingsError, match="399 samples; at least 400"):
        read_wav(str(path), 400)


@pytest.mark.parametrize("level", ["quick", "default", "full"])
def test_the_synthesised_sound_has_the_amplitude_that_decibels_are_over(level):
    """A short one is a stretch of a longer chord, whose own largest amplitude was 0.81: 1.8 dB too much."""
    count = audio.CONFIG["samples"].at(level)
    run = SimpleNamespace(config=SimpleNamespace(samples=count), settings=SimpleNamespace(input=None))
    sound = audio._sound(run)
    assert sound.shape == (count,) and sound.abs().max() == 1


def test_what_is_no_sound_is_named(tmp_path):
    path = tmp_path / "x.wav"
    path.write_text("nothing")
    with pytest.raises(SettingsError, match="no WAV file that can be read"):
        read_wav(str(path), 10)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(3), file.setframerate(8000), file.writeframes(b"\0" * 30)
    with pytest.raises(SettingsError, match="24 bits a sample; 8, 16 and 32"):
        read_wav(str(path), 10)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000), file.writeframes(b"\0" * 40)
    with pytest.raises(SettingsError, match="silent"):
        read_wav(str(path), 10)


# --- Boolean tasks, sawtooth -----------------------------------------------------------------------------------------


def test_interpolators_of_lowest_degree_agree_on_the_seen_part():
    x = cube(6)
    assert x.shape == (64, 6) and len(x.unique(dim=0)) == 64
    for task in TASKS.values():
        hidden = task.unseen(x)
        assert 0 < hidden.sum() < 64
        torch.testing.assert_close(task.lowest(x)[~hidden], task.f(x)[~hidden], msg=task.name)
    error = {t.name: float((t.lowest(x) - t.f(x))[t.unseen(x)].square().mean()) for t in TASKS.values()}
    assert error == pytest.approx({"f1": 19.25, "f2": 16, "f2 half": 4, "linear": 9})


def test_the_construction_without_noise_is_the_sawtooth():
    for n in (1, 3, 5):
        net = NearConstruction(2, n, 0.0, generator())
        x = (torch.arange(512, dtype=F32) / 512).view(1, -1, 1).expand(2, -1, -1)
        with torch.no_grad():
            torch.testing.assert_close(net(x), triangle(x[..., 0], n), rtol=0, atol=1e-5)
    assert math.isclose(float(triangle(torch.tensor(1 / 64, dtype=F64), 5)), 0.5)


# --- saliency --------------------------------------------------------------------------------------------------------


def test_groups_are_seeds():
    x, weight = torch.randn(4, 3 * 2, 8, 8, generator=generator()), torch.randn(3, 5, 2, 3, 3, generator=generator(1))
    together = convolve(x, weight)
    for s in range(3):
        alone = torch.nn.functional.conv2d(x[:, 2 * s : 2 * s + 2], weight[s], padding=1)
        torch.testing.assert_close(together[:, 5 * s : 5 * s + 5], alone, rtol=1e-4, atol=1e-4)


def test_the_multiscale_map_contracts_and_is_solved():
    net = MultiscaleDEQ(2, 3, 4, generator())
    with torch.no_grad():
        for p in (net.A11, net.A12, net.A21, net.A22):
            p.mul_(20)
        A11, A12, A22, A21 = net.kernels()
        for a, b in ((A11, A12), (A22, A21)):
            assert (a.abs().sum((2, 3, 4)) + b.abs().sum((2, 3, 4)) <= 0.95 + 1e-5).all()
        x = torch.rand(2, 5, 1, SIZE, SIZE, generator=generator(1))
        maps = net.maps(x)
        _, f = net.solve(x)
        assert not net.failed().any() and net.residual(f, maps).max() < 1e-4
        cam = grad_cam(net, maps, torch.zeros(2, 5, dtype=torch.long), SIZE)
        assert cam.shape == (2, 5, SIZE, SIZE) and cam.min() >= 0 and cam.max() <= 1 + 1e-6


def test_the_curves_of_nets_that_are_all_at_equilibria_are_told_apart():
    """Blue all of them, as a cut-off net may be at one."""
    still = {"loss": [[2.0, 1.0]], "error": [0.5], "evidence": {}, "kind": "equilibrium"}
    left, _ = multiscale.draw([still | {"model": name} for name in ("multiscale", "one", "cut off")]).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == 3


def test_grad_cam_of_a_linear_head_is_its_weights():
    net = ResidualNet(1, 3, 4, 1, generator())
    x = torch.rand(1, 2, 1, 8, 8, generator=generator(1))
    with torch.no_grad():
        maps = net.maps(x)
        cam = grad_cam(net, maps, torch.full((1, 2), 2), 4)
        by_hand = torch.relu(torch.einsum("bchw,c->bhw", maps[0], net.head[0, :, 2]))
        by_hand = by_hand / by_hand.amax((1, 2), keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(cam[0], by_hand, rtol=1e-4, atol=1e-5)


def test_images_are_real_digits_on_real_photographs():
    pytest.importorskip("sklearn", reason="scikit-learn ships the images")
    images = Images(1.0, torch.device("cpu"))
    x, labels, mask = images.draw(2, 30, generator(), test=True)
    assert x.shape == (2, 30, 1, SIZE, SIZE) and labels.shape == (2, 30) and mask.shape == (2, 30, SIZE, SIZE)
    assert (mask.sum((2, 3)) == 64).all() and set(labels.flatten().tolist()) == {0, 1, 2, 3}
    assert x.min() >= 0 and x.max() <= 1
    again = images.draw(2, 30, generator(), test=True)[0]
    assert torch.equal(x, again)


@pytest.mark.parametrize("largest", [0.1, 3.0])
def test_bounded_rows_scale_what_is_too_large_and_differentiate(largest):
    V = (torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * largest / 5).detach()
    V[0, 0] = 0
    net = DenseDEQ(2, 1, 5, torch.Generator().manual_seed(0), "contractive")
    net.V = V.requires_grad_()
    sums = V.abs().sum(2, keepdim=True)
    torch.testing.assert_close(net.weight(), V * (ROW_SUM / sums).clamp(max=1))
    assert bool((sums > ROW_SUM).any()) == (largest > 1)
    kept = V.detach()[:, 1:].requires_grad_()  # |v| has no derivative at the zeros of the first row
    assert torch.autograd.gradcheck(_BoundedRows.apply, (kept,))


@pytest.mark.parametrize("level", ["default", "full"])
def test_attempts_are_compared_with_nets_of_their_parameters_trained_as_long(level):
    run = SimpleNamespace(
        settings=SimpleNamespace(width=4, level=level),
        config=SimpleNamespace(steps=4, rate=1e-2, clip=10.0),
    )
    x = torch.rand(2, 6, 1, generator=generator())
    usual = x, x[..., 0].square()
    nets = feedforward(4, 3, 4.0)
    rival = next(name for name in nets if "(params)" in name)
    tried = attempts(run, 1, 4.0, usual, [(x, x[..., 0])], (rival, nets[rival]))
    made = {name: attempt.make(2, generator()) for name, attempt in tried.items()}
    known = made | {rival: nets[rival](2, generator())}
    longest = {rival: 1} | {name: attempt.longer for name, attempt in tried.items()}
    deqs = {name: attempt for name, attempt in tried.items() if attempt.against}
    assert all("DEQ" in name for name in deqs) and any(f"DEQ {4 * WIDER}" in name for name in deqs)
    for name, attempt in deqs.items():
        assert all(known[other].count >= known[name].count for other in attempt.against)
        assert max(longest[other] for other in attempt.against) >= attempt.longer
    assert max(longest.values()) == LONGER

    for name, attempt in deqs.items():
        if attempt.prepare is not None:
            before = [p.clone() for p in made[name].parameters]
            attempt.prepare(made[name], lambda share: None)
            assert any(not torch.equal(p, q) for p, q in zip(before, made[name].parameters, strict=True))
            assert made[name].tol is None  # what follows is solved to the engine's own tolerance

    rows = {name: row(name, [0.5] * 8) | {"parameters": 1, "flops": 1.0, "memory": 1} for name in known}
    rows[rival]["mse"] = [0.25] * 8
    claims = attempt_claims(tried, rows, str, "Fig.", quick=False)
    assert [c.statement for c in claims] == list(deqs)
    zero = "contractive DEQ 4, solved from zero"
    assert next(c.measured for c in claims if c.statement == zero) == 0.5
    cells = {r[0]: r for r in attempt_table("x", tried, rows, rows[zero]).rows}
    assert cells[zero][-2:] == ("1", "0.5") and cells[f"{rival}, curriculum"][-2:] == ("", "")


def test_features_of_a_net_that_training_lost_are_left_blank():
    lost, found = [[None] * 3] * 2, [[3.0, 2.0, 1.0], [None] * 3]
    row = {"model": "a", "participation": [None, 0.5]}
    axes = draw_features({"f1": [row | {"features": lost}], "f2": [row | {"features": found}]}).axes
    image = axes[1].images[0]
    assert image.norm.vmax == 3 and image.get_array().mask.tolist() == [[False] * 3, [True] * 3]
