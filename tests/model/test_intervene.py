"""Interventions inside of a context: the chosen tokens, what is counted, what is refused, and what is left behind."""

import threading

import pytest
import torch
from change_oracles import generated
from refusals import refused

from workbench.io.errors import DataError, RequestError
from workbench.model.intervene import intervene
from workbench.model.load import Model
from workbench.model.positions import PassReader
from workbench.model.row_records import Add

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(5))
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(6))
MIDDLE = "resid_post.1"


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def model(request, tiny_models, tiny_tokenizer):
    return Model(tiny_models[request.param], tiny_tokenizer, request.param)


@pytest.fixture(scope="module")
def llama(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "llama")


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def logits(model, ids=IDS, **arguments):
    with torch.no_grad():
        return model.module(input_ids=ids, **arguments).logits


def by_hand(model, site, mask, step):
    """Logits under a plain hook that adds `step` where `mask` is true."""
    (site,) = model.site_map.select([site])

    def before(_module, args, kwargs):
        return (args[0] + mask[..., None] * step, *args[1:]), kwargs

    def after(_module, _args, output):
        first = output if isinstance(output, torch.Tensor) else output[0]
        changed = first + mask[..., None] * step
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    part = model.module.get_submodule(site.tap.path)
    before_it = site.tap.part == "in"
    handle = (
        part.register_forward_pre_hook(before, with_kwargs=True) if before_it else part.register_forward_hook(after)
    )
    try:
        return logits(model)
    finally:
        handle.remove()


@pytest.mark.parametrize("site", ["resid_pre.1", MIDDLE, "attn_out.1", "mlp_out.0"])
def test_a_direction_is_added_as_by_a_plain_hook(model, site):
    columns = torch.arange(9).expand(2, 9)
    choices = {"all": columns >= 0, 3: columns == 3, (1, 7): (columns == 1) | (columns == 7), -1: columns == 8}
    plain = logits(model)
    for at, mask in choices.items():
        with intervene(model, Add(site, DIRECTION, 2.0, at=at)) as run:
            changed = logits(model)
        torch.testing.assert_close(changed, by_hand(model, site, mask, 2 * DIRECTION), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(changed, plain, atol=1e-3)
        line = run.table().iloc[0]
        assert (line["passes"], line["rows"], line["changed"]) == (1, int(mask.sum()), int(mask.sum()))
    for at, mask in ((slice(2, None), columns >= 2), (slice(-3, -1), (columns >= 6) & (columns < 8))):
        with intervene(model, Add(site, DIRECTION, 2.0, at=at)):
            changed = logits(model)
        torch.testing.assert_close(changed, by_hand(model, site, mask, 2 * DIRECTION), atol=1e-5, rtol=1e-5)


def test_units_of_a_direction(llama):
    mask = torch.ones(2, 9)
    unit = DIRECTION / DIRECTION.norm()
    with intervene(llama, Add(MIDDLE, DIRECTION, 3.0, "unit")):
        changed = logits(llama)
    torch.testing.assert_close(changed, by_hand(llama, MIDDLE, mask, 3 * unit), atol=1e-5, rtol=1e-5)
    with intervene(llama, Add(MIDDLE, DIRECTION, 0.5, "norm")) as run:
        logits(llama)
    assert run.table()["relative_change"][0] == pytest.approx(0.5, rel=1e-5)


def test_a_neutral_record_changes_no_bit_and_counts_as_run(model):
    with intervene(model, Add(MIDDLE, DIRECTION, 0.0)) as run:
        assert torch.equal(logits(model), logits_outside(model))
    assert run.table()[["rows", "changed", "relative_change"]].to_numpy().tolist() == [[18, 0, 0]]


def logits_outside(model):
    """Plain logits, from another thread, where the hooks of this one do not act."""
    result = []
    thread = threading.Thread(target=lambda: result.append(logits(model)))
    thread.start()
    thread.join()
    return result[0]


def test_hooks_act_in_their_own_thread_alone(llama):
    plain = logits(llama)
    with intervene(llama, Add(MIDDLE, DIRECTION, 9.0)):
        assert torch.equal(logits_outside(llama), plain)
        assert not torch.allclose(logits(llama), plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_all_hooks_are_gone_after_an_exception(llama, error):
    before, plain = hooks(llama.module), logits(llama)
    handle = llama.module.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(error), intervene(llama, Add(MIDDLE, DIRECTION), Add("resid_pre.0", DIRECTION)):
        logits(llama)
    handle.remove()
    assert hooks(llama.module) == before
    assert torch.equal(logits(llama), plain)


def test_contexts_nest_and_apply_in_order(llama):
    backwards = DIRECTION.flip(0)
    with intervene(llama, Add(MIDDLE, DIRECTION)), intervene(llama, Add(MIDDLE, backwards, 1.0, "norm")):
        nested = logits(llama)
    with intervene(llama, Add(MIDDLE, DIRECTION), Add(MIDDLE, backwards, 1.0, "norm")) as run:
        assert torch.equal(logits(llama), nested)
    assert len(run.table()) == 2
    assert repr(run) == f"interventions on {llama.name}: {'; '.join(run.table()['record'])}"
    with intervene(llama, Add(MIDDLE, backwards, 1.0, "norm"), Add(MIDDLE, DIRECTION)):
        assert not torch.allclose(logits(llama), nested, atol=1e-3)
    assert "entered before" in refused(RequestError, lambda: run.__enter__())


RECURRENT = ("mamba2", "falcon_mamba", "rwkv", "xlstm")
CHOICES = (2, -1, "new", slice(4, None), [0, 7])
"""Each with a direction of its own, so that one run shows all of them."""


def test_generation_is_the_same_cached_uncached_static_padded_and_alone(model):
    prompt = IDS[:1, :6]
    padded_prompts = torch.cat([torch.cat([torch.full((1, 3), 1), prompt], dim=1), IDS[1:, :9]])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    static = {"cache_implementation": "static", "disable_compile": True}
    records = [Add(MIDDLE, DIRECTION.roll(index), 2.0, at=at) for index, at in enumerate(CHOICES)]
    results = {}
    for name, ids, arguments in (
        ("alone", prompt, {}),
        ("uncached", prompt, {"use_cache": False}),
        ("static", prompt, static),
        ("padded", padded_prompts, {"attention_mask": mask}),
        ("padded static", padded_prompts, {"attention_mask": mask, **static}),
    ):
        with intervene(model, *records) as run, torch.no_grad():
            generated = model.module.generate(
                ids,
                **({"attention_mask": torch.ones_like(ids)} | arguments),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                pad_token_id=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        results[name] = torch.stack(generated.logits)[:, 0]
        if len(ids) == 1:  # of 9 tokens that are input, 3 are generated
            assert run.table()["rows"].tolist() == [1, 1, 3, 5, 2], name
    for name, logits in results.items():
        torch.testing.assert_close(
            logits, results["alone"], atol=2e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("kind", ["mamba", *(pytest.param(kind, marks=pytest.mark.torture) for kind in RECURRENT)])
def test_generation_from_a_recurrent_state_counts_the_tokens_before_it(kind):
    from workbench.experiments.architectures.tiny import tiny_model

    model = Model(tiny_model(kind), None, kind)
    prompt = IDS[:1, :6] % 120
    padded_prompts = torch.cat([torch.cat([torch.full((1, 3), 1), prompt], dim=1), IDS[1:, :9] % 120])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    direction = torch.cat([DIRECTION, DIRECTION])[: model.site_map.select([MIDDLE])[0].shape[0]]
    records = [Add(MIDDLE, direction.roll(index), 2.0, at=at) for index, at in enumerate(CHOICES)]
    plain = generated(model.module, prompt)
    with intervene(model, *records) as run:
        cached = generated(model.module, prompt)
    assert run.table()["rows"].tolist() == [1, 1, 3, 5, 2]
    scale = plain.abs().max()
    assert (cached - plain).abs().max() > 1e-2 * scale
    with intervene(model, *records):
        assert (generated(model.module, prompt, use_cache=False) - cached).abs().max() < 1e-5 * scale
    if (generated(model.module, padded_prompts, attention_mask=mask)[:, :1] - plain).abs().max() < 1e-5 * scale:
        with intervene(model, *records):  # of a model that can be padded on the left
            padded = generated(model.module, padded_prompts, attention_mask=mask)[:, :1]
        assert (padded - cached).abs().max() < 1e-5 * scale
    else:
        assert kind in ("rwkv", "xlstm")
    if kind == "mamba":
        with torch.no_grad():
            state = model.module(input_ids=prompt, use_cache=True).cache_params
        with pytest.raises(DataError, match="continues a state of passes outside"), intervene(model, records[0]):
            model.module(input_ids=prompt[:, :1], cache_params=state, use_cache=True)


def test_beams_change_the_prompt_of_every_beam(llama):
    arguments = {"num_beams": 3, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    with intervene(llama, Add(MIDDLE, DIRECTION, 4.0, at=-1)) as run, torch.no_grad():
        cached = llama.module.generate(IDS, attention_mask=torch.ones_like(IDS), **arguments)
    with intervene(llama, Add(MIDDLE, DIRECTION, 4.0, at=-1)), torch.no_grad():
        uncached = llama.module.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **arguments)
    assert torch.equal(cached, uncached)
    assert run.table()["rows"][0] == 6


def test_a_mask_chooses_entries_of_the_batch(llama):
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = True
    with intervene(llama, Add(MIDDLE, DIRECTION, 2.0, at=mask)):
        changed = logits(llama)
    torch.testing.assert_close(changed, by_hand(llama, MIDDLE, mask, 2 * DIRECTION), atol=1e-5, rtol=1e-5)
    shapes = r"mask of shape \(2, 9\), and the batch has \(1, 4\)"
    with pytest.raises(DataError, match=shapes), intervene(llama, Add(MIDDLE, DIRECTION, at=mask)):
        logits(llama, IDS[:1, :4])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: Add("resid_post.9", DIRECTION), "site 'resid_post.9': no such layer; the model has layers 0 to 2"),
        (lambda: Add("resid_post", DIRECTION), "site 'resid_post' selects 3 sites; name one, such as 'resid_post.0'"),
        (lambda: Add("pattern.1", DIRECTION), "site pattern.1 cannot be changed: it is a result of attention"),
        (lambda: Add("resid_norm.1", DIRECTION), "site resid_norm.1 cannot be changed: it is computed from another"),
        (lambda: Add(MIDDLE, DIRECTION[:5]), "direction has the shape (5,), and a row of resid_post.1 (32,)"),
        (lambda: Add(MIDDLE, 0 * DIRECTION, unit="unit"), "direction is 0 and has no unit vector"),
        (lambda: Add(MIDDLE, DIRECTION * torch.nan), "direction has a value that is not finite"),
        (
            lambda: Add(MIDDLE, DIRECTION, at="last"),
            'at must be a position, a list of positions, a slice, "all", "new"',
        ),
        (lambda: Add(MIDDLE, DIRECTION, at=[]), "at must be a position"),
        (lambda: Add(MIDDLE, DIRECTION, at=slice(None, None, -1)), "at: slice(None, None, -1) needs whole numbers and"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_before_any_pass(llama, record, message):
    before = hooks(llama.module)
    assert refused(RequestError, lambda: intervene(llama, record())).startswith(message)
    assert hooks(llama.module) == before


def test_what_did_not_happen_is_an_error(llama):
    def after(*records, ids=IDS, **arguments):
        def block():
            with intervene(llama, *records):
                if ids is not None:
                    logits(llama, ids, **arguments)

        return refused(DataError, block)

    assert "no forward pass reached it" in after(Add(MIDDLE, DIRECTION), ids=None)
    assert "no sequence had a token at position 40" in after(Add(MIDDLE, DIRECTION, at=[1, 40]))
    assert "chose no token of 1 passes" in after(Add(MIDDLE, DIRECTION, at="new"))
    assert "not finite" in after(Add(MIDDLE, DIRECTION * 1e38, 1e5))
    square = torch.zeros(2, 1, 9, 9)
    assert "without mask of two axes" in after(Add(MIDDLE, DIRECTION, at=3), attention_mask=square)
    assert refused(RequestError, lambda: intervene(llama)).startswith("no intervention is given")
    block = llama.module.model.layers[1]
    rotary = llama.module.model.rotary_emb(torch.zeros(1, 2, 32), torch.arange(2)[None])
    with pytest.raises(DataError, match="a part of the model ran alone"), intervene(llama, Add(MIDDLE, DIRECTION)):
        block(torch.zeros(1, 2, 32), position_embeddings=rotary)


def test_a_prompt_in_pieces_is_refused_where_it_matters(llama):
    def pieces(at):
        with intervene(llama, Add(MIDDLE, DIRECTION, at=at)), torch.no_grad():
            first = llama.module(input_ids=IDS[:, :4], use_cache=True)
            return llama.module(input_ids=IDS[:, 4:], past_key_values=first.past_key_values).logits

    assert "continues a sequence by several tokens at once" in refused(DataError, lambda: pieces("new"))
    with intervene(llama, Add(MIDDLE, DIRECTION, at=[2, 6])):
        whole = logits(llama)[:, 4:]
    torch.testing.assert_close(pieces([2, 6]), whole, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_change(llama):
    scale = torch.tensor(1.0, requires_grad=True)
    with intervene(llama, Add(MIDDLE, scale * DIRECTION, at=3)):
        llama.module(input_ids=IDS).logits.sum().backward()
    assert scale.grad is not None
    step = 1e-2
    ends = []
    for sign in (1, -1):
        with intervene(llama, Add(MIDDLE, DIRECTION, 1 + sign * step, at=3)):
            ends.append(logits(llama).double().sum())
    assert float(scale.grad) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), rel=1e-2)


@pytest.mark.torture  # the compiler takes seconds
def test_a_compiled_model_runs_its_hooks(llama):
    with intervene(llama, Add(MIDDLE, DIRECTION, 2.0)):
        changed = logits(llama)
    compiled = torch.compile(llama.module, backend="eager")
    with torch.no_grad():
        plain = compiled(input_ids=IDS).logits
        with intervene(llama, Add(MIDDLE, DIRECTION, 2.0)):
            torch.testing.assert_close(compiled(input_ids=IDS).logits, changed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(compiled(input_ids=IDS).logits, plain)


def test_positions_come_from_the_mask_before_the_position_ids():
    class Module(torch.nn.Module):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None):
            return None

    reader = PassReader(Module())
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    tokens = reader.read((ids, mask), {"position_ids": torch.full((2, 4), 7)})
    assert tokens.position.tolist() == [[-1, -1, 0, 1], [0, 1, 2, -1]]
    assert tokens.prompt.tolist() == [2, 3]
    tokens = reader.read((), {"input_ids": ids, "attention_mask": {}, "position_ids": torch.tensor([[1, 1, 0, 1]])})
    assert tokens.position.tolist() == [[-1, -1, 0, 1]] * 2
