"""A folder pruned block by block, against the same model pruned in memory."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunella as pr
from prunella.app.verify import check_folder
from prunella.errors import BadInput, Locked, NotSupported, RequestError
from prunella.io.journal import NAME
from prunella.io.tensor_file import INDEX
from prunella.llm import solve_block
from prunella.llm.streaming import BlockStep, memory, runner
from prunella.llm.streaming.progress import WORK
from tests.faults.contents import contents
from tests.llm.streaming.models import KINDS, data, read, write
from tests.stopping import beside, killed

WANDA = pr.llm.OneShot(pr.Element(per_row=True), 0.5, partial(pr.solvers.by_score, score=pr.wanda))
PATTERN = pr.llm.OneShot(pr.NM(2, 4), refine=pr.llm.Refine(epochs=2))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


HOW = {"admm": pr.llm.OneShot(), "2:4 refined": PATTERN, "blocks at once": replace(WANDA, true_sequential=False)}


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        *((kind, "admm") for kind in KINDS),  # every kind of file and of block, and every way on two kinds of them
        *(("Llama", "2:4 refined"), ("Mixtral", "2:4 refined")),
        *(("GPT2", "blocks at once"), ("GptOss", "blocks at once")),
    ],
)
def test_it_is_the_model_pruned_in_memory_bit_for_bit(tmp_path: Path, kind: str, recipe: str) -> None:
    how = HOW[recipe]
    model = write(tmp_path / "in", kind)
    done = pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", how, data=data())
    by_hand = pr.llm.solve_(model, data()[0], how, data=data())
    again = read(tmp_path / "out", model)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    fits = [fit for fit in by_hand.fits if "outside" not in fit.skipped and "chooses" not in fit.skipped]
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "in").keys()
    assert [(f.name, f.error, f.removed) for f in done.solving.fits] == [(f.name, f.error, f.removed) for f in fits]
    assert done.solving.refined == by_hand.refined


def test_the_dtype_of_the_file_stays_and_ties_are_written_once(tmp_path: Path) -> None:
    model = write(tmp_path / "in", "Qwen2", dtype=torch.bfloat16)
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", pr.llm.OneShot(pr.NM(2, 4)), data=data())
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert {v.dtype for v in after.values()} == {torch.bfloat16}
    zeros = after["model.layers.1.mlp.up_proj.weight"].view(-1, 4).eq(0).sum(1)
    assert zeros.tolist() == [2] * len(zeros)
    assert after["model.embed_tokens.weight"].equal(before["model.embed_tokens.weight"])
    listed = json.loads((tmp_path / "out" / INDEX).read_text())
    assert listed["weight_map"].keys() == after.keys()
    assert listed["metadata"]["total_size"] == sum(v.numel() * 2 for v in after.values())
    assert read(tmp_path / "out", model).dtype == torch.bfloat16


def test_hidden_states_on_disk_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 1000)
    write(tmp_path / "in")
    many = data(40)
    roomy = pr.llm.solve_folder(tmp_path / "in", tmp_path / "a", WANDA, data=many)
    stream = roomy.peak.parts["stream"]
    assert not roomy.peak.on_disk and stream == 2 * 40 * (2 * 16 * 32 * 4)  # into a block and out of it
    tight = pr.llm.solve_folder(tmp_path / "in", tmp_path / "b", WANDA, data=many, memory=roomy.peak.bytes - 1)
    assert tight.peak.on_disk and tight.peak.bytes == roomy.peak.bytes - stream
    whole, streamed = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(whole[name].equal(streamed[name]) for name in whole)


def test_too_little_memory_is_refused_with_the_numbers_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "in")
    with pytest.raises(RequestError, match=r"1.00 MB of memory are not enough\nit would take .*process .*block"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data(), memory="1MB")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="cannot read the amount"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data(), memory="much")


def test_layers_that_are_skipped_stay_and_unknown_patterns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data(), skip=["*.mlp", "model.layers.0"])
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"model.layers.{k}.self_attn.{x}_proj.weight" for k in (1, 2) for x in "qkvo"}
    with pytest.raises(RequestError, match="matches nothing"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "b", WANDA, data=data(), skip=["layers"])


def test_a_folder_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    write(tmp_path / "in")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())
    with pytest.raises(RequestError, match="not empty"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data(), overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="did not write it"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "mine", WANDA, data=data(), overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_experts_that_lie_apart_in_the_files_are_pruned_and_written_apart(tmp_path: Path) -> None:
    write(tmp_path / "in", "Mixtral")
    steps: list[BlockStep] = []
    pr.llm.solve_folder(
        tmp_path / "in", tmp_path / "out", pr.llm.OneShot(pr.NM(2, 4)), data=data(), on_block=steps.append
    )
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    experts = [name for name in after if ".experts." in name]
    assert len(experts) == 3 * 4 * 3 and all(after[name].view(-1, 4).eq(0).sum(1).eq(2).all() for name in experts)
    gates = [name for name in after if name.endswith(".gate.weight")]
    assert len(gates) == 3 and all(after[name].equal(before[name]) for name in gates)
    assert sum("experts" in fit.name for step in steps for fit in step.fits) == 6


@pytest.mark.parametrize("shape", [None, (3, 5)], ids=["missing", "another shape"])
def test_experts_that_do_not_fit_together_are_a_clear_error(tmp_path: Path, shape: tuple[int, int] | None) -> None:
    write(tmp_path / "in", "Mixtral", shard="1GB")
    (file,) = (tmp_path / "in").glob("*.safetensors")
    held = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    held = {k: v for k, v in held.items() if k != name} | ({name: torch.zeros(shape)} if shape else {})
    save_file(held, file)
    with pytest.raises(BadInput, match=r"make up model.layers.1.mlp.experts.gate_up_proj do not fit together"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())


def test_a_router_that_a_mapping_names_is_pruned_in_both_ways(tmp_path: Path) -> None:
    model = write(tmp_path / "in", "Mixtral")
    how = pr.llm.OneShot(pr.Element(), {"model.layers.1.mlp.gate": 0.5, "model.layers.2.self_attn.q_proj": 0.5})
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", how, data=data())
    pr.llm.solve_(model, data()[0], how, data=data())
    again = read(tmp_path / "out", model)
    gates = [found.get_parameter(f"model.layers.{k}.mlp.gate.weight") for found in (model, again) for k in range(3)]
    assert [float(gate.eq(0).float().mean()) for gate in gates] == [0, 0.5, 0] * 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_model_whose_tensors_are_not_in_the_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in")
    for file in (tmp_path / "in").glob("*.safetensors"):
        save_file({name.replace("mlp", "perceptron"): value for name, value in load_file(file).items()}, file)
    with pytest.raises(NotSupported, match="not in the files under their names"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())


def test_a_model_that_asks_for_values_before_its_blocks_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(**{**KINDS["Mixtral"][1], "intermediate_size_mlp": 48, "head_dim": 8})
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "in")
    with pytest.raises(NotSupported, match="the modules around the blocks"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())


def prune_until(moment: str, source: Path, output: Path, how: pr.llm.OneShot) -> None:
    """Prune a folder; killed in the middle of the second block, or while the third shard is written."""
    solved: list[object] = []

    def solve(*given: Any, old: Any = solve_block._solve_matrix) -> Any:
        solved.append(given)
        if len(solved) == 11 and moment == "solving":
            os.kill(os.getpid(), signal.SIGKILL)
        return old(*given)

    def write_shard(path: Path, values: Any, old: Any = runner.write_shard) -> None:
        if "00003" in path.name and moment == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
        old(path, values)

    solve_block._solve_matrix, runner.write_shard = solve, write_shard
    pr.llm.solve_folder(source, output, how, data=data())


@pytest.mark.parametrize(
    ("moment", "kind", "family"),
    [("solving", "refined", "Llama"), ("writing", "plain", "Llama"), ("writing", "refined", "Mixtral")],
)
def test_a_killed_run_resumes_at_its_block_with_the_same_result(
    tmp_path: Path, moment: str, kind: str, family: str
) -> None:
    model = write(tmp_path / "in", family)
    how = pr.llm.OneShot(WANDA.pattern, 0.5, WANDA.method, pr.llm.Refine(epochs=2) if kind == "refined" else None)
    code = killed(lambda: prune_until(moment, tmp_path / "in", tmp_path / "out", how))
    assert code == -signal.SIGKILL
    done = {"solving": 1, "writing": 2}[moment]
    assert len(list((tmp_path / "out").glob("model-*"))) == done
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(RequestError, match="is not continued"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", how, data=data(4))
    steps: list[BlockStep] = []
    found = pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", how, data=data(), on_block=steps.append)
    assert [step.replayed for step in steps] == [True] * done + [False] * (3 - done) and found.replayed == done
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "whole", how, data=data())
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert whole.keys() == resumed.keys() and all(whole[name].equal(resumed[name]) for name in whole)
    assert not (tmp_path / "out" / WORK).exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")  # the record too, with what the gradient did
    read(tmp_path / "out", model)


def test_what_changed_is_named_and_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path / "in")
    solve = partial(pr.llm.solve_folder, tmp_path / "in", tmp_path / "out")
    beside_it: list[BaseException | None] = []

    def stop(step: BlockStep) -> None:
        beside_it.append(beside(lambda: solve(WANDA, data=data())))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(WANDA, data=data(), on_block=stop)
    assert isinstance(beside_it[0], Locked) and not list((tmp_path / "out" / WORK).glob("*.lock"))
    sparser = replace(WANDA, sparsity=0.6)
    for how, changed, said in (
        (sparser, {}, "recipe"), (WANDA, {"skip": ["*.mlp"]}, "skip"), (sparser, {"data": data(4)}, "data and recipe")
    ):  # fmt: skip
        with pytest.raises(RequestError, match=rf"is not continued\nit holds another run: its {said} changed"):
            solve(how, **{"data": data(), **changed})  # type: ignore[arg-type]
    file = sorted((tmp_path / "in").glob("*.safetensors"))[-1]
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1  # neither the header, nor the size, nor the time of change tells
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(RequestError, match="its weights changed"):
        solve(WANDA, data=data())
    (tmp_path / "out" / WORK / NAME).write_bytes(b"{")
    with pytest.raises(BadInput, match="is damaged"):
        solve(WANDA, data=data())
    assert (tmp_path / "out" / WORK / NAME).read_bytes() == b"{"


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a finished folder but its record, which tells the seconds."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "run.json"}


def test_the_old_result_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "in")
    solve = partial(pr.llm.solve_folder, tmp_path / "in")
    solve(tmp_path / "out", replace(WANDA, sparsity=0.3), data=data())
    old = files(tmp_path / "out")
    solve(tmp_path / "new", WANDA, data=data())

    def stop(step: BlockStep) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path / "out", WANDA, data=data(), overwrite=True, on_block=stop)
    assert files(tmp_path / "out") == old
    with pytest.raises(RequestError, match="its recipe changed"):
        solve(tmp_path / "out", replace(WANDA, sparsity=0.6), data=data(), overwrite=True)
    assert solve(tmp_path / "out", WANDA, data=data(), overwrite=True).replayed == 2
    assert files(tmp_path / "out") == files(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "new", "out"]


def test_a_finished_shard_that_has_changed_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in")

    def stop(step: BlockStep) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data(), on_block=stop)
    shard = sorted((tmp_path / "out").glob("model-*"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadInput, match=rf"{shard.name} is damaged"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())


def test_verify_reads_a_finished_folder_and_refuses_a_flipped_bit(tmp_path: Path) -> None:
    write(tmp_path / "in")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())
    assert check_folder(tmp_path / "out")[0].files == len(list((tmp_path / "out").iterdir())) - 1
    for file in sorted((tmp_path / "out").iterdir()):
        sound = file.read_bytes()
        file.write_bytes(bytes([sound[0] ^ 1, *sound[1:]]))
        with pytest.raises(BadInput):
            check_folder(tmp_path / "out")
        file.write_bytes(sound)


@pytest.mark.parametrize("output", ["in", "in/out", ".", "in/../in"])
def test_an_output_that_is_the_source_is_refused_and_the_source_stays(tmp_path: Path, output: str) -> None:
    write(tmp_path / "in")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "once", WANDA, data=data())
    (tmp_path / "in").rename(tmp_path / "dense")
    (tmp_path / "once").rename(tmp_path / "in")  # one that prunella wrote, so that nothing but the source forbids it
    before = files(tmp_path / "in")
    with pytest.raises(RequestError):
        pr.llm.solve_folder(tmp_path / "in", f"{tmp_path}/{output}", WANDA, data=data(), overwrite=True)
    assert files(tmp_path / "in") == before


def test_nan_in_the_source_is_never_written(tmp_path: Path) -> None:
    write(tmp_path / "in")
    file = sorted((tmp_path / "in").glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][5, 3] = torch.nan  # a token that the data does not have may have it
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((BadInput, RequestError), match=r"NaN|nan"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())


def test_a_configuration_that_transformers_refuses_and_a_pipe_in_the_source(tmp_path: Path) -> None:
    write(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "more.json")  # it is no part of the model, and is never waited for
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", WANDA, data=data())
    assert not (tmp_path / "out" / "more.json").exists()
    file = tmp_path / "in" / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"ll\\u001b[31mama"'))
    with pytest.raises(BadInput, match="failed"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "other", WANDA, data=data())
    assert not (tmp_path / "other").exists()


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"cannot write .*out"):
        pr.llm.solve_folder(tmp_path / "no model", tmp_path / "file" / "out", WANDA, data=data())
