"""Function vectors: a head planted to carry the task, effects by hooks written here, and what each setting changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from granite_example import MULTIPLIER, granite_of
from refusals import refused

import workbench as wb
from workbench.analysis.patch_pairs import PatchPair, pairs_of
from workbench.analysis.task_vectors import TaskVectors, answers_after, questions_alone
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import FunctionVectors
from workbench.testing import ProbeContract

ANSWERS = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def pairs():
    """Examples of two tokens, a question of two: as in "in-context-...", over ids of the tiny models."""
    draw, drawn = np.random.default_rng(0), []
    for number in range(8):
        tokens = draw.integers(20, 300, 6)
        turned = tokens[[0, 3, 2, 5, 4, 1]]
        question = (int(draw.integers(20, 300)), 11)
        sides = [(0, *map(int, side), *question) for side in (tokens, turned)]
        places = {"question": (7, 8), "end": (8,)}
        drawn.append(PatchPair(*sides, (ANSWERS[number % 4],), (9,), places))
    return drawn


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["gpt2"], None, "tiny")


class TestContract(ProbeContract):
    probe = FunctionVectors
    settings = {"heads": 2, "draws": 1, "resamples": 10}  # noqa: RUF012

    @pytest.fixture
    def model(self, tiny_models, tiny_tokenizer):
        return Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")

    @pytest.fixture
    def store(self, model, tmp_path):
        texts = [
            {**text, "spans": {"question": [{"start": 17, "end": len(text["text"]), "value": "q"}]}}
            for number in range(4)
            for text in (
                {"text": f" Monday: Tuesday\n{'abcd'[number]}:", "pair": number, "side": side, "answer": f"{number}"}
                for side in ("clean", "corrupt")
            )
        ]
        texts = [{**text, "wrong": "x"} for text in texts]
        return wb.record(model, texts, sites=["resid_post"], out=tmp_path / "p.acts", show_progress=False)


def test_effects_are_those_of_hooks_written_by_hand(tiny, pairs):
    task = TaskVectors.make(tiny, pairs)
    effects = task.effects()
    module, layer, head = tiny.module, 1, 2
    outputs = {}

    def keep(_module, args):
        outputs.setdefault("z", []).append(args[0][0, -1].reshape(4, 8)[head])

    project = module.transformer.h[layer].attn.c_proj
    with torch.no_grad():
        handle = project.register_forward_pre_hook(keep)
        for pair in pairs:
            module(torch.tensor([pair.clean]))
        handle.remove()
        mean = torch.stack(outputs["z"]).mean(0)

        def change(_module, args):
            z = args[0].clone()
            z[0, -1, head * 8 : head * 8 + 8] = mean
            return (z,)

        for number, pair in enumerate(pairs):
            ids = torch.tensor([pair.corrupt])
            before = module(ids).logits[0, -1].softmax(-1)[pair.answer[0]]
            handle = project.register_forward_pre_hook(change)
            after = module(ids).logits[0, -1].softmax(-1)[pair.answer[0]]
            handle.remove()
            assert effects[number, layer, head] == pytest.approx(float(after - before), abs=1e-6)
        written = mean @ project.weight[head * 8 : head * 8 + 8]
    torch.testing.assert_close(task.vector([(layer, head)]), written, atol=1e-6, rtol=1e-5)
    expected = task.vector([(0, 1)]) + task.vector([(layer, head)])
    torch.testing.assert_close(task.vector([(layer, head), (0, 1)]), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_effects_do_not_depend_on_the_cache(tiny_models, pairs, family, monkeypatch):
    longer = replace(pairs[0], clean=(3, *pairs[0].clean), corrupt=(3, *pairs[0].corrupt), places={"end": (9,)})
    task = TaskVectors.make(Model(tiny_models[family], None, "tiny"), [longer, *pairs[1:]])
    assert task._cached() is not None
    quick = task.effects()
    monkeypatch.setattr("workbench.analysis.task_vectors.CachedPrompts.make", lambda *_: None)
    np.testing.assert_allclose(quick, task.effects(), atol=1e-7)
    assert np.abs(quick).max() > 1e-5


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_the_vector_of_all_heads_is_what_the_block_adds(tiny_models, pairs, family):
    """Behind the norm after attention, or times the multiplier of the residual stream, by hooks written here."""
    if family == "granite":
        module = granite_of(tiny_models["llama"])
        part, factor = module.model.layers[1].self_attn.o_proj, MULTIPLIER
    else:
        module = tiny_models[family]
        part, factor = module.model.layers[1].post_attention_layernorm, 1.0
    task = TaskVectors.make(Model(module, None, family), pairs)
    added = []
    handle = part.register_forward_hook(lambda *call: added.append(call[2][0, -1]))
    with torch.no_grad():
        for pair in pairs:
            module(torch.tensor([pair.clean]))
    handle.remove()
    torch.testing.assert_close(
        task.vector([(1, head) for head in range(4)]), factor * torch.stack(added).mean(0), atol=1e-6, rtol=1e-5
    )


def test_questions_alone_keep_what_every_prompt_begins_with(pairs):
    for short, pair in zip(questions_alone(pairs), pairs, strict=True):
        assert short.clean == short.corrupt == (0, *pair.clean[7:])
        assert short.places == {"end": (2,)}


def test_answers_are_those_of_the_plain_model_with_the_vector_added(tiny, pairs):
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    changed = answers_after(tiny, pairs, "resid_post.0", vector)
    plain = answers_after(tiny, pairs)

    def add(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        states[:, -1] += vector
        return (states, *output[1:]) if isinstance(output, tuple) else states

    for number, pair in enumerate(pairs):
        ids = torch.tensor([pair.clean])
        with torch.no_grad():
            for values, hooked in ((plain, False), (changed, True)):
                handle = tiny.module.transformer.h[0].register_forward_hook(add) if hooked else None
                logits = tiny.module(ids).logits[0, -1]
                if handle:
                    handle.remove()
                assert values[number, 0] == pytest.approx(float(logits.softmax(-1)[pair.answer[0]]), abs=1e-6)
                assert values[number, 1] == (int(logits.argmax()) in pair.answer)


@pytest.fixture(scope="module")
def planted_model():
    return wb.load_model("planted", device="cpu")


@pytest.fixture(scope="module")
def planted_pairs(planted_model):
    """The question's word stands before the answer; on the corrupt side the two have changed places."""
    pairs = []
    for number, (word, answer) in enumerate((("stone", "river"), ("cloud", "window"), ("garden", "candle"))):
        sides = [f"Read: {a} {b} Ben. Anna Clara {word}" for a, b in ((word, answer), (answer, word))]
        clean, corrupt = (tuple(planted_model.tokenizer(side)["input_ids"]) for side in sides)
        last = (len(clean) - 1,)
        pairs += [PatchPair(clean, corrupt, (clean[4],), (corrupt[5],), {"question": last, "end": last})] * (1 + number)
    return pairs


def test_the_planted_head_that_carries_the_answer_is_found(planted_model, planted_pairs):
    """Its mean output writes every answer of the prompts, so it raises them where the examples name others."""
    probe = FunctionVectors(heads=1, draws=1, resamples=10)
    result = probe._run(planted_model, planted_pairs, [], {"settings": {"heads": 1}})
    assert result.data.attrs["heads"] == "L1H0"
    assert float(result.data["accuracy"].sel(prompt="examples")) == 1
    assert float(result.data["accuracy"].sel(prompt="question")) == 0
    assert (result.table["effect"].iloc[1:].abs() < 0.01).all()


def test_settings_matter(planted_model, planted_pairs):
    run = lambda **settings: FunctionVectors(resamples=10, **settings)._run(  # noqa: E731
        planted_model, planted_pairs, [], {"settings": settings}
    )
    single = run(heads=1, draws=1).data
    two = run(heads=2, draws=1).data
    assert two.attrs["heads"].startswith("L1H0, ")
    assert float(two["norm"][0]) != pytest.approx(float(single["norm"][0]))
    larger = run(heads=1, draws=1, scale=4.0).data
    assert not np.allclose(larger["steered_probability"][0], single["steered_probability"][0])
    np.testing.assert_allclose(larger["norm"], single["norm"])  # of the vector itself
    chosen = {run(heads=1, draws=1, seed=seed).data.attrs["choosing"] for seed in range(6)}
    assert len(chosen) > 1


def test_in_context_tasks_shuffle_the_answers_of_the_examples():
    model = wb.load_model("demo", device="cpu")
    task = wb.prompt_pairs("in-context-next", model, 10, seed=2)
    assert len(task) == 10
    for checked in task.pairs:
        clean, corrupt = (getattr(checked.pair, side).split("\n") for side in ("clean", "corrupt"))
        assert clean[-1] == corrupt[-1] == f"{clean[-1][:-1]}:"
        examples = [[line.split(": ") for line in side[:-1]] for side in (clean, corrupt)]
        assert [word for word, _ in examples[0]] == [word for word, _ in examples[1]]
        assert sorted(answer for _, answer in examples[0]) == sorted(answer for _, answer in examples[1])
        assert all(right != wrong for (_, right), (_, wrong) in zip(*examples, strict=True))
        assert checked.pair.answer[0] not in checked.pair.wrong
    assert [pair.places["question"] for pair in pairs_of(task)] == [
        tuple(checked.spans["question"]) for checked in task.pairs
    ]


def test_refused_requests(tiny, pairs):
    bare = [replace(pair, places={"end": pair.places["end"]}) for pair in pairs]
    run = lambda prompts: FunctionVectors()._run(tiny, prompts, [], {})  # noqa: E731
    assert "have no label 'question'" in refused(RequestError, lambda: run(bare))
    assert "all pairs have the same answer" in refused(RequestError, lambda: run([pairs[0], pairs[0]]))
    assert "has too few others" in refused(RequestError, lambda: FunctionVectors(heads=9)._run(tiny, pairs, [], {}))
