"""Records that change rows of a site: every one against tensors computed by hand, on every kind of site."""

import copy

import numpy as np
import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model
from workbench.io.errors import DataError, RequestError
from workbench.model.forward import change_tensor, hook_tensor
from workbench.model.load import Model
from workbench.model.row_changes import RowFunction
from workbench.model.row_records import Add, Project, Set, Zero
from workbench.model.stored_rows import Mean, Patch, Resample
from workbench.model.token_choice import Tokens

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(5))
OTHERS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(8))
VALUE = torch.randn(32, generator=torch.Generator().manual_seed(6))
SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "mlp_post", "embed"]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox", "gemma2"])
def model(request, tiny_models, tiny_tokenizer):
    return Model(tiny_models[request.param], tiny_tokenizer, request.param)


@pytest.fixture(scope="module")
def llama(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "llama")


@pytest.fixture(scope="module")
def donors(llama, tmp_path_factory):
    sites = ["resid_pre", "resid_mid", "resid_post", "z", "k", "v"]
    out = tmp_path_factory.mktemp("donors") / "donors.acts"
    return wb.record(llama, OTHERS.tolist(), sites=sites, dtype="float32", out=out, show_progress=False)


def logits(model, ids=IDS, **arguments):
    with torch.no_grad():
        return model.module(input_ids=ids, **arguments).logits


def read(model, name, ids=IDS):
    """Tensor at a site that is an input or output of a module, by a plain hook."""
    (site,) = model.site_map.select([name])
    rows = []
    with hook_tensor(model.module.get_submodule(site.tap.path), site.tap.part, lambda tensor: rows.append(tensor)):
        logits(model, ids)
    return rows[0].reshape(*ids.shape, *site.shape)


def after(model, *records, **arguments):
    with wb.intervene(model, *records) as run:
        return logits(model, **arguments), run


def close(first, second, tolerance=1e-5):
    torch.testing.assert_close(first, second, atol=tolerance, rtol=tolerance)


def test_a_function_of_rows_acts_on_every_site_that_a_model_has(model):
    plain, tried = logits(model), 0
    for kind in SITES:
        name = kind if kind == "embed" else f"{kind}.1"
        try:
            model.site_map.select([name])
        except RequestError:
            continue
        neutral_logits, run = after(model, RowFunction(name, lambda rows, _chosen: rows + 0, "nothing", at=[2, 5]))
        assert torch.equal(neutral_logits, plain), name
        assert run.table().loc[0, ["rows", "changed"]].tolist() == [4, 0], name
        changed, _ = after(model, RowFunction(name, lambda rows, _chosen: 2 * rows + 1, "some", at=[2, 5]))
        assert torch.equal(changed[:, :2], plain[:, :2]), name
        assert (changed[:, 2] - plain[:, 2]).abs().max() > 1e-3 or kind == "k", name
        tried += 1
    assert tried >= 8


def test_a_value_is_set_for_all_rows_for_each_sequence_and_for_each_token(llama):
    by_sequence = torch.stack([VALUE, VALUE.flip(0)])
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    for value, expected in (
        (VALUE, VALUE.expand(2, 9, 32)),
        (by_sequence, by_sequence[:, None].expand(2, 9, 32)),
        (tokens, tokens),
    ):
        with change_tensor(llama.module.model.layers[1], "out", lambda _tensor, new=expected: new.clone()):
            by_hand = logits(llama)
        assert torch.equal(after(llama, Set("resid_post.1", value, at="all"))[0], by_hand)
    repeated = IDS.repeat_interleave(2, 0)
    twice, _ = after(llama, Set("resid_post.1", by_sequence, at=3), ids=repeated)
    close(twice[::2], after(llama, Set("resid_post.1", by_sequence, at=3))[0])
    assert "no multiple of the 2" in refused(
        DataError, lambda: after(llama, Set("resid_post.1", by_sequence, at=3), ids=IDS[:1].repeat(3, 1))
    )


def test_a_middle_stream_is_changed_where_attention_is_added(model):
    if model.name == "gpt_neox":
        text = refused(RequestError, lambda: wb.intervene(model, Zero("resid_mid.1")))
        assert text.startswith("site 'resid_mid.1' does not exist")
        return
    before = read(model, "resid_pre.1")
    by_definition = Set("attn_out.1", VALUE - before[:, 4], at=4)
    close(after(model, Set("resid_mid.1", VALUE, at=4))[0], after(model, by_definition)[0])
    close(after(model, Add("resid_mid.1", VALUE))[0], after(model, Add("attn_out.1", VALUE))[0])
    changes = (Add("resid_pre.1", VALUE), Set("resid_mid.1", VALUE, at=4))
    shifted = (Add("resid_pre.1", VALUE), Set("attn_out.1", -before[:, 4], at=4))
    close(after(model, *changes)[0], after(model, *shifted)[0], 1e-5)


def test_the_stream_after_attention_is_set_where_the_block_multiplies(tmp_path):
    """Granite adds half of its attention's output: the stream is the value, and the multiplier is divided out."""
    model = wb.load_model(tiny_model("granite"))
    options = {"sites": ["resid_pre.2", "resid_mid.2"], "dtype": "float32", "show_progress": False}
    changes = [Add("resid_pre.2", VALUE), Set("resid_mid.2", VALUE, at=4)]
    store = wb.record(model, IDS.remainder(100).tolist(), out=tmp_path / "s", interventions=changes, **options)
    torch.testing.assert_close(store.where("position = 4")["resid_mid", 2], VALUE.expand(2, -1), atol=1e-5, rtol=1e-5)
    plain = wb.record(model, IDS.remainder(100).tolist(), out=tmp_path / "t", interventions=changes[:1], **options)
    early = [recording.where("position < 4")["resid_mid", 2] for recording in (store, plain)]
    assert torch.equal(*early)


def test_the_stream_between_two_blocks_is_one_tensor_that_records_change_in_their_order(model):
    twice = [Set("resid_pre.2", VALUE, at=3), Add("resid_post.1", VALUE, at=3)]
    close(after(model, *twice)[0], after(model, Set("resid_post.1", 2 * VALUE, at=3))[0])
    assert not torch.allclose(after(model, *twice[::-1])[0], after(model, *twice)[0], atol=1e-3)
    copied = Model(copy.deepcopy(model.module), None, "copy")  # transformers leaves hooks of its own
    with wb.intervene(copied, Set("resid_pre.2", VALUE, at="all")), torch.no_grad():
        states = copied.module(input_ids=IDS, output_hidden_states=True).hidden_states
    close(states[2], VALUE.expand(2, 9, 32))


def test_a_head_is_changed_alone(llama):
    weight = llama.module.model.layers[1].self_attn.o_proj.weight
    z = read(llama, "z.1")
    removed = torch.einsum("bph,dh->bpd", z[:, :, 2], weight[:, 16:24])
    by_hand = after(llama, RowFunction("attn_out.1", lambda rows, _: rows - removed.flatten(0, 1), "minus the head"))[0]
    close(after(llama, Zero("z.1", head=2))[0], by_hand)
    vector = torch.randn(8)
    close(
        after(llama, Set("z.1", vector, at=4, head=2))[0], after(llama, Set("z.1", vector[None], at=4, head=[2]))[0], 0
    )
    close(
        after(llama, Zero("z.1", head=2), Add("z.1", vector, head=2))[0],
        after(llama, Set("z.1", vector, head=2, at="all"))[0],
    )


def test_a_value_head_is_read_by_its_group_of_query_heads(llama):
    close(after(llama, Zero("v.1", head=1))[0], after(llama, Zero("z.1", head=[2, 3]))[0], 1e-6)
    text = refused(RequestError, lambda: wb.intervene(llama, Zero("v.1", head=3)))
    assert text == (
        "head 3: v.1 has the 2 key/value heads 0 to 1, each for 2 query heads; query head 3 reads key/value head 1"
    )
    assert refused(RequestError, lambda: wb.intervene(llama, Zero("z.1", head=4))) == "head 4: z.1 has the heads 0 to 3"
    assert "has no axis of heads" in refused(RequestError, lambda: wb.intervene(llama, Zero("mlp_out.1", head=0)))


def test_a_direction_is_projected_out_once(model):
    rows, unit = read(model, "resid_post.1"), VALUE / VALUE.norm()
    expected = Set("resid_post.1", rows - (rows @ unit)[..., None] * unit, at="all")
    once, run = after(model, Project("resid_post.1", 3 * VALUE))
    close(once, after(model, expected)[0])
    again, _ = after(model, Project("resid_post.1", VALUE), Project("resid_post.1", VALUE))
    close(again, once, 1e-6)
    share = ((rows @ unit).abs() / rows.norm(dim=-1)).mean()
    assert run.table()["relative_change"][0] == pytest.approx(float(share), rel=1e-4)
    named = wb.Direction("resid_post.1", VALUE, "a name")
    close(after(model, Project("resid_post.1", named))[0], once)
    assert str(Add("resid_post.1", named, 2)) == "add 2 'a name' at resid_post.1"


def test_rows_of_a_store_take_the_place_of_those_of_the_same_tokens(llama, donors):
    close(after(llama, Patch("resid_post.1", donors, at="all"))[0], logits(llama, OTHERS))
    close(after(llama, Patch("resid_mid.1", donors, at="all"))[0], logits(llama, OTHERS))
    rows = read(llama, "resid_post.1", OTHERS)
    by_hand = after(llama, Set("resid_post.1", rows[:, 5], at=5))[0]
    close(after(llama, Patch("resid_post.1", donors, at=5))[0], by_hand, 0)
    moved = after(llama, Set("resid_post.1", rows[:, 2], at=5), Set("resid_post.1", rows[:, 8], at=7))[0]
    close(after(llama, Patch("resid_post.1", donors, [2, -1], at=[5, 7]))[0], moved, 0)
    donor_rows = donors.where("sequence = 1")
    close(
        after(llama, Patch("resid_post.1", donor_rows, at=5))[0],
        after(llama, Set("resid_post.1", rows[1, 5], at=5))[0],
        0,
    )
    head = after(llama, Set("z.1", read(llama, "z.1", OTHERS)[:, 5, 3], at=5, head=3))[0]
    close(after(llama, Patch("z.1", donors, at=5, head=3))[0], head, 0)


def test_means_are_those_of_numpy(llama, donors):
    rows = donors["resid_post", 1][:].double().numpy().reshape(2, 9, 32)
    ids = OTHERS.numpy()
    later = donors.where("position > 0")
    expected = {
        "site": np.broadcast_to(rows[:, 1:].mean((0, 1)), rows.shape),
        "position": rows.mean(0)[None].repeat(2, 0),
    }
    for per, of in (("site", later), ("position", donors)):
        value = torch.tensor(expected[per]).float()
        close(
            after(llama, Mean("resid_post.1", of, per))[0], after(llama, Set("resid_post.1", value, at="all"))[0], 1e-6
        )
    by_token = np.stack([np.stack([rows[ids == token].mean(0) for token in line]) for line in ids])
    value = torch.tensor(by_token).float()
    changed = after(llama, Mean("resid_post.1", donors, "token"), ids=OTHERS)[0]
    close(changed, after(llama, Set("resid_post.1", value, at="all"), ids=OTHERS)[0], 1e-6)
    assert str(Mean("z.1", later, head=0)) == "mean of 16 rows at z.1 head 0"
    text = refused(DataError, lambda: after(llama, Mean("resid_post.1", donors, "token")))
    assert "the rows of the mean have none with token id" in text


def test_a_random_row_depends_on_seed_sequence_and_position_alone(llama, donors):
    def rows(seed, **arguments):
        outputs = []
        record = Resample("resid_post.1", donors, seed=seed)
        with wb.intervene(llama, record), hook_tensor(llama.module.model.layers[2], "in", outputs.append):
            logits(llama, **arguments)
        return outputs[0].flatten(0, 1)

    first = rows(0)
    known = donors["resid_post", 1][:]
    drawn = [int((known == row).all(1).nonzero()[0]) for row in first]
    assert len(set(drawn)) > 9
    assert torch.equal(rows(0), first)
    assert not torch.equal(rows(1), first)
    assert torch.equal(rows(0, ids=torch.cat([IDS, IDS])[:2, :4]), first.reshape(2, 9, 32)[:, :4].flatten(0, 1))


def test_tokens_are_chosen_by_id_and_by_position_together(llama):
    ids = IDS.clone()
    ids[0, 3] = ids[1, 6] = ids[1, 2] = 7
    mask = ids == 7
    by_mask, run = after(llama, Add("resid_post.1", VALUE, at=mask), ids=ids)
    by_id, by_id_run = after(llama, Add("resid_post.1", VALUE, at=Tokens(ids={7, 11})), ids=ids)
    assert torch.equal(by_id, by_mask)
    assert run.table()["rows"][0] == by_id_run.table()["rows"][0] == int(mask.sum())
    late, _ = after(llama, Add("resid_post.1", VALUE, at=Tokens(slice(3, None), ids={7})), ids=ids)
    mask[1, 2] = False
    assert torch.equal(late, after(llama, Add("resid_post.1", VALUE, at=mask), ids=ids)[0])
    assert "while recording" in refused(
        DataError, lambda: after(llama, Add("resid_post.1", VALUE, at=Tokens(span="subject")))
    )


def test_a_row_that_is_set_twice_is_refused(llama):
    def logits_after(*records, **settings):
        with wb.intervene(llama, *records, **settings):
            return logits(llama)

    text = refused(RequestError, lambda: wb.intervene(llama, Zero("resid_pre.1"), Set("resid_post.0", VALUE, at=3)))
    assert text == (
        "set resid_post.0 sets what zero resid_pre.1 set before, at the same tokens of resid_post.0; leave one out, or "
        "pass override=True"
    )
    ids = Tokens(ids=IDS[0, :1].tolist())
    assert "sets what" in refused(
        RequestError, lambda: logits_after(Zero("z.1", at=ids, head=1), Zero("z.1", at=slice(0, 4)))
    )
    logits_after(Zero("z.1", head=0), Zero("z.1", head=1), Set("z.2", torch.zeros(4, 8), at=3), Zero("z.2", at=4))
    close(
        logits_after(Zero("z.1"), Set("z.1", torch.ones(4, 8), at=3), override=True),
        logits_after(Zero("z.1", at=[0, 1, 2, 4, 5, 6, 7, 8]), Set("z.1", torch.ones(4, 8), at=3)),
        0,
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda of: Set("resid_post.1", VALUE[:5], at=0), "value has the shape (5,), and a row of resid_post.1 (32,)"),
        (lambda of: Set("resid_post.1", VALUE * torch.inf, at=0), "value has a value that is not finite"),
        (lambda of: Patch("attn_out.1", of, at=0), "attn_out.1 is not recorded in"),
        (lambda of: Patch("resid_post.1", of.where("position > 90"), at=0), "of: no row of"),
        (lambda of: Patch("resid_post.1", of, [1, 2], at=0), "position must be one donor position for each of the 1"),
        (lambda of: Patch("resid_post.1", of, 1, at="all"), "position must be one donor position for each of the 0"),
        (lambda of: Resample("resid_post.1", of, seed=-1), "seed must be a whole number"),
        (lambda of: Zero("pattern.1"), "site pattern.1 cannot be changed: it is a result of attention"),
        (lambda of: Zero("z.1", head=[0, 0]), "head must be a head, or several that differ"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(llama, donors, record, message):
    assert refused(RequestError, lambda: wb.intervene(llama, record(donors))).startswith(message)


def test_a_donor_that_lacks_the_token_is_an_error(llama, donors):
    few = donors.where("position < 3")
    text = refused(DataError, lambda: after(llama, Patch("resid_post.1", few, at=5)))
    assert "sequence 0 of its 2 has no row at position 5" in text
