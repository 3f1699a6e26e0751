"""Lottery tickets: densities, rewinding of everything, controls, and runs that are killed."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.allocation.rounds import densities
from prunella.io.identity import digest_of
from prunella.io.nested import equal, load_state, save_state
from prunella.lottery.search import Rewind
from prunella.lottery.session import Session, TrainingPoint, snapshot
from prunella.model.masks import masks_of
from prunella.transform.controls import Control, Controls
from tests.lottery.job import die_in, job
from tests.lottery.nets import STEPS, batch, fit, net, spec
from tests.stopping import killed, records


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {**snapshot(model), **{f"mask {name}": mask for name, mask in masks_of(model).items()}}


# -- densities -----------------------------------------------------------------------------------------------------


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def test_lenet_has_the_densities_of_the_paper_after_rounds_of_a_fifth() -> None:
    model, prune, found, last = lenet(), pr.lottery.imp(torch.zeros(1, 784)), {}, None
    for number in range(1, 16):
        made = prune(model, number)
        pr.apply_(model, made)
        masks = masks_of(model)
        if last is not None:
            assert all(bool((last[name] | ~mask).all()) for name, mask in masks.items())  # nested
        last = masks
        for name, rate in (("0.weight", 0.8), ("2.weight", 0.8), ("4.weight", 0.9)):
            assert abs(int(masks[name].sum()) - rate**number * masks[name].numel()) <= 1
        found[number] = round(100 * sum(int(m.sum()) for m in masks.values()) / 266_200, 2)
    assert [found[k] for k in (1, 3, 7, 9, 15)] == [80.04, 51.28, 21.07, 13.52, 3.58]


def test_per_round_is_an_allocation_for_any_target() -> None:
    model = lenet()
    recipe = pr.Recipe(pr.magnitude, pr.Element(), partial(pr.allocation.per_round, rate=0.2, last=0.5))
    made = pr.plan(model, torch.zeros(1, 784), recipe, target=pr.Sparsity(0.9642))
    kept = {name: float(mask.double().mean()) for name, mask in made.masks.items()}
    assert kept["0.weight"] == pytest.approx(kept["2.weight"], abs=1e-4) == pytest.approx(0.8**15, abs=1e-3)
    assert kept["4.weight"] == pytest.approx(0.9**15, abs=2e-3)
    assert densities([10, 10], 2, rate=0.5, last=0.5) == pytest.approx([0.25, 0.5625])
    with pytest.raises(pr.PruningError, match="rate=1"):
        pr.lottery.imp(batch(), rate=1.0)


def test_another_recipe_prunes_the_whole_by_rounds() -> None:
    model = net()
    prune = pr.lottery.imp(batch(), rate=0.5, recipe=pr.Recipe(pr.magnitude, pr.Element(), pr.global_), skip=["6"])
    masks = prune(model, 2).masks
    assert set(masks) == {"0.weight", "4.weight"} and sum(int(m.sum()) for m in masks.values()) == (160 + 192) // 4


# -- rewinding -----------------------------------------------------------------------------------------------------


def test_survivors_are_bit_equal_to_the_first_weights() -> None:
    model = net()
    first = snapshot(model)
    found = pr.lottery.find_ticket(model, spec(), prune=pr.lottery.imp(batch()), rounds=2, controls=Controls(()))
    assert equal(snapshot(model), first)
    masks = masks_of(found.ticket)
    assert set(masks) == {"0.weight", "4.weight", "6.weight"}
    for name, value in snapshot(found.ticket).items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value[mask], first[name][mask]) and int(torch.count_nonzero(value[~mask])) == 0
    trained = snapshot(found.trained)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(found.trained).items())
    assert not torch.equal(trained["0.weight"], first["0.weight"])
    assert int(torch.count_nonzero(trained["0.weight"][~masks["0.weight"]])) == 0


@pytest.mark.parametrize("k", [1, 6, 9])
def test_weights_go_back_to_step_k(k: int) -> None:
    short = net()
    kept = spec().run(short, Session(short, STEPS, keep_at=k, stop=k)).kept
    assert kept is not None and kept.step == k and equal(kept.model, snapshot(short))
    found = pr.lottery.find_ticket(
        net(),
        spec(),
        prune=pr.lottery.imp(batch()),
        rounds=1,
        rewind=pr.lottery.WeightRewind(k),
        controls=Controls(()),
    )
    mask = masks_of(found.ticket)["0.weight"]
    assert torch.equal(snapshot(found.ticket)["0.weight"][mask], kept.model["0.weight"][mask])
    assert torch.equal(snapshot(found.ticket)["1.running_mean"], kept.model["1.running_mean"])
    assert [len(one.rates) for one in found.rounds] == [STEPS, STEPS - k]


@pytest.mark.parametrize("k", range(STEPS))
def test_a_session_from_step_k_repeats_the_run_that_passed_it(k: int, tmp_path: Path) -> None:
    whole = net()
    session = spec().run(whole, Session(whole, STEPS, keep_at=k))
    assert session.kept is not None
    save_state(session.kept.plain(), tmp_path / "point")
    point = TrainingPoint.read(load_state(tmp_path / "point"))
    assert equal(point.plain(), session.kept.plain())
    again = net(seed=99)
    again.load_state_dict(point.model)
    torch.rand(5)
    part = spec(seed=77).run(again, Session(again, STEPS, start=point))
    assert equal(snapshot(again), snapshot(whole)) and part.rates == session.rates[k:]


def test_a_point_that_the_first_version_wrote_is_read() -> None:
    kept = spec().run(model := net(), Session(model, STEPS, keep_at=2)).kept
    assert kept is not None
    written = kept.plain()
    written["dice"] = written.pop("rng")
    assert equal(TrainingPoint.read(written).plain(), kept.plain())


def test_a_loader_with_its_own_generator_is_rewound_too() -> None:
    def train(model: nn.Module, session: Session) -> None:
        own = torch.Generator().manual_seed(5)
        loader = torch.utils.data.DataLoader(list(torch.eye(10)), batch_size=2, shuffle=True, generator=own)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for x in session.steps(loader, optimizer):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    judged = pr.lottery.TrainingSpec(train, 12)
    whole, again = net(), net()
    session = judged.run(whole, Session(whole, 12, keep_at=8))
    assert session.kept is not None
    again.load_state_dict(session.kept.model)
    judged.run(again, Session(again, 12, start=session.kept))
    assert equal(snapshot(again), snapshot(whole))


@pytest.mark.parametrize("k", [0, 4])
def test_learning_rate_rewinding_keeps_the_weights_and_replays_the_rates(k: int) -> None:
    seen: list[dict[str, Tensor]] = []

    def train(model: nn.Module, session: Session) -> None:
        seen.append(snapshot(model))
        fit(model, session)
        seen.append(snapshot(model))

    how = pr.lottery.TrainingSpec(train, STEPS, seed=3)
    found = pr.lottery.find_ticket(
        net(), how, prune=pr.lottery.imp(batch()), rounds=2, rewind=pr.lottery.RateRewind(k), controls=Controls(())
    )
    dense, *others = found.rounds
    assert len(set(dense.rates)) == 3
    assert all(one.rates == dense.rates[k:] for one in others)  # lr[k:T], element by element
    mask = masks_of(found.trained)["0.weight"]
    assert torch.equal(seen[4]["0.weight"][mask], seen[3]["0.weight"][mask])
    assert torch.equal(snapshot(found.ticket)["0.weight"], seen[4]["0.weight"])


def test_descent_follows_the_training_of_finetune() -> None:
    loader = torch.utils.data.DataLoader(torch.eye(10).repeat(4, 1), batch_size=5, shuffle=True)
    how = pr.recovery.Training(lr_schedule=lambda p: 1 - p, optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr))
    model = net()
    train = pr.lottery.descent(loader, lambda m, x: m(x).square().mean(), lr=0.1, training=how)
    session = pr.lottery.TrainingSpec(train, 10).run(model, Session(model, 10))
    assert session.rates == pytest.approx([0.1 * (1 - (t + 0.5) / 10) for t in range(10)])


# -- controls ------------------------------------------------------------------------------------------------------


def test_controls_are_trained_the_same_way_and_stand_beside_the_ticket() -> None:
    found = pr.lottery.find_ticket(net(), spec(), prune=pr.lottery.imp(batch(), rate=0.5), rounds=2)
    assert [set(one.controls) for one in found.rounds] == [set(), set(), {Control.REINIT, Control.SHUFFLE}]
    last = found.rounds[-1]
    assert len({last.score, *last.controls.values()}) == 3 and None not in last.controls.values()
    assert f"{100 * last.density:.2f}%" in str(found) and "reinit" in str(found) and "shuffle" in str(found)
    some = pr.lottery.find_ticket(
        net(),
        spec(),
        prune=pr.lottery.imp(batch(), rate=0.5),
        rounds=2,
        controls=Controls((Control.SHUFFLE,), (1, 2)),
    )
    assert [list(one.controls) for one in some.rounds] == [[], [Control.SHUFFLE], [Control.SHUFFLE]]
    assert some.rounds[2].controls[Control.SHUFFLE] == last.controls[Control.SHUFFLE]


def test_reinit_keeps_the_mask_and_changes_the_weights() -> None:
    model = net()
    pr.apply_(model, pr.lottery.imp(batch(), rate=0.5)(model, 1))
    before, first = masks_of(model), snapshot(model)
    state = torch.get_rng_state()
    pr.lottery.reinit_(model, 11)
    assert torch.equal(torch.get_rng_state(), state)
    now = snapshot(model)
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, before[name]) and int(torch.count_nonzero(now[name][~mask])) == 0
        assert not bool((now[name][mask] == first[name][mask]).any())
    other = pr.lottery.reinit_(net(seed=8), 11)
    assert torch.equal(snapshot(other)["0.weight"][before["0.weight"]], now["0.weight"][before["0.weight"]])


def test_shuffling_keeps_the_number_of_every_layer_and_moves_the_mask() -> None:
    model = net()
    pr.apply_(model, pr.lottery.imp(batch(), rate=0.5)(model, 1))
    before = masks_of(model)
    pr.lottery.shuffle_masks_(model, 4)
    after = masks_of(model)
    assert before.keys() == after.keys()
    assert all(int(after[n].sum()) == int(m.sum()) and not after[n].equal(m) for n, m in before.items())
    again = net()
    pr.apply_(again, pr.lottery.imp(batch(), rate=0.5)(again, 1))
    assert all(m.equal(after[n]) for n, m in masks_of(pr.lottery.shuffle_masks_(again, 4)).items())


def test_a_module_that_cannot_be_drawn_anew_is_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(pr.PruningError, match=r"0 \(Own\) has parameters"):
        pr.lottery.reinit_(nn.Sequential(Own()), 0)


# -- runs that are killed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewind", "number"),
    [(pr.lottery.WeightRewind(0), 2), (pr.lottery.WeightRewind(5), 5), (pr.lottery.RateRewind(4), 3)],
    ids=str,
)
def test_a_killed_run_ends_with_the_same_bits(rewind: Rewind, number: int, tmp_path: Path) -> None:

    def dying() -> None:
        die_in(number)
        job(tmp_path / "run", rewind)

    assert killed(dying) == -signal.SIGKILL
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == number == records(tmp_path / "run")
    torch.rand(3)
    resumed, whole = job(tmp_path / "run", rewind), job(None, rewind)
    assert resumed.rounds == whole.rounds
    assert equal(bits(resumed.ticket), bits(whole.ticket)) and equal(bits(resumed.trained), bits(whole.trained))
    job(tmp_path / "unbroken", rewind)
    names = sorted(file.name for file in (tmp_path / "unbroken").glob("*.safetensors"))
    assert names == sorted(file.name for file in (tmp_path / "run").glob("*.safetensors")) and len(names) == 6
    for name in names:
        assert equal(load_state(tmp_path / "run" / name), load_state(tmp_path / "unbroken" / name))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    find: Any = partial(pr.lottery.find_ticket, spec=spec(), prune=pr.lottery.imp(batch()), controls=Controls(()))
    done = find(net(), rounds=1, folder=tmp_path / "a")
    assert find(net(), rounds=1, folder=tmp_path / "a").rounds == done.rounds
    with pytest.raises(pr.PruningError, match="another run: its weights"):
        find(net(seed=1), rounds=1, folder=tmp_path / "a")
    with pytest.raises(pr.PruningError, match="another run: its rewind"):
        find(net(), rounds=1, folder=tmp_path / "a", rewind=pr.lottery.WeightRewind(1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(pr.PruningError, match="no ticket run"):
        find(net(), rounds=1, folder=tmp_path / "b")
    more = find(net(), rounds=2, folder=tmp_path / "a")  # further rounds go on from the first
    assert more.rounds[:2] == done.rounds
    state = tmp_path / "a" / "round-01.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1  # a weight: the file is still one of tensors
    state.write_bytes(content)
    with pytest.raises(pr.PruningError, match="does not have the recorded digest"):
        find(net(), rounds=1, folder=tmp_path / "a")
    state.write_bytes(b"broken")
    with pytest.raises(pr.PruningError, match="not a sound state"):
        find(net(), rounds=1, folder=tmp_path / "a")
    (tmp_path / "a" / "journal.sqlite").write_text("{")
    with pytest.raises(pr.PruningError, match="damaged"):
        find(net(), rounds=1, folder=tmp_path / "a")


def test_the_caller_keeps_the_random_generators() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = net()
    torch.manual_seed(1)
    pr.lottery.find_ticket(model, spec(), prune=pr.lottery.imp(batch()), rounds=1)
    assert torch.equal(torch.rand(3), expected)


def test_what_makes_no_sense_is_refused() -> None:
    find: Any = partial(pr.lottery.find_ticket, spec=spec(), prune=pr.lottery.imp(batch()))
    with pytest.raises(pr.PruningError, match="0 rounds"):
        find(net(), rounds=0)
    with pytest.raises(pr.PruningError, match="rewind to step 14 of 14"):
        find(net(), rounds=1, rewind=pr.lottery.WeightRewind(STEPS))
    masked = pr.apply_(model := net(), pr.lottery.imp(batch())(model, 1))
    with pytest.raises(pr.PruningError, match="masks already"):
        find(masked, rounds=1)
    with pytest.raises(pr.PruningError, match="cannot be shuffled"):
        channels = pr.lottery.imp(batch(), recipe=pr.Recipe())
        pr.lottery.find_ticket(net(), spec(), prune=channels, rounds=1)
    with pytest.raises(pr.PruningError, match="stopped before step 14"):
        pr.lottery.find_ticket(
            net(), pr.lottery.TrainingSpec(lambda model, session: None, STEPS), prune=pr.lottery.imp(batch()), rounds=1
        )
    with pytest.raises(pr.PruningError, match="0 steps"):
        pr.lottery.TrainingSpec(fit, 0)


def test_structured_tickets_have_the_other_control() -> None:
    found = pr.lottery.find_ticket(
        net(),
        spec(),
        prune=pr.lottery.imp(batch(), rate=0.4, recipe=pr.Recipe()),
        rounds=1,
        controls=Controls((Control.REINIT,)),
    )
    mask = masks_of(found.ticket)["0.weight"]
    assert set(mask.double().mean(1).tolist()) == {0.0, 1.0} and 0.4 < found.rounds[1].density < 0.8


def test_a_state_that_is_not_data_is_refused_and_digests_tell_states_apart(tmp_path: Path) -> None:
    with pytest.raises(pr.PruningError, match=r"state.a\[0\] cannot be written: it holds a function"):
        save_state({"a": [print_nothing]}, tmp_path / "x")
    with pytest.raises(pr.PruningError, match="not a sound state"):
        load_state(tmp_path / "x")
    assert digest_of(snapshot(net())) == digest_of(snapshot(net())) != digest_of(snapshot(net(1)))
    assert not equal({"a": torch.zeros(1)}, {"a": torch.ones(1)})


def print_nothing() -> None:
    """Something that no file can hold."""
