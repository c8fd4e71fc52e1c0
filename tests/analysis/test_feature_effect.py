"""Effect of changing a feature on predictions, against plain hooks and float64 NumPy."""

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import run
from refusals import refused
from sae_example import encode64
from safetensors.numpy import load_file

import workbench as wb
from workbench.analysis.feature_effect import density_controls
from workbench.features.queries import text_counts
from workbench.io.errors import RequestError
from workbench.sae.sparsity import MutualChoice, TopK


def softmax_log(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(model, store, folder, feature, op, value, chosen):
    """For each row of text: loss increase, KL, whether the top token changed; rows whose activation changes; mean
    centred change of logits over these. One sequence at a time, with a plain hook."""
    direction = load_file(folder / "sae_weights.safetensors")["W_dec"][feature].astype(np.float64)
    rows, block = {}, model.module.transformer.h[1]
    raised = []
    for _, part in store.tokens.to_pandas().groupby("sequence"):
        ids = torch.tensor(part["token_id"].to_numpy()[None], dtype=torch.long)
        at = part["row"].isin(chosen).to_numpy()
        changed = np.zeros(len(part), bool)

        def hook(_module, _args, output, at=at, changed=changed):
            first = output if isinstance(output, torch.Tensor) else output[0]
            x = first[0].double().numpy()
            f = encode64(folder, x)[:, feature]
            target = {"ablate": 0 * f, "add": f + (value or 0), "clamp": 0 * f + (value or 0)}[op]
            changed[:] = at & (target != f)
            new = torch.from_numpy(x + (at * (target - f))[:, None] * direction).to(first.dtype)[None]
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        with torch.no_grad():
            before = softmax_log(model.module(ids).logits[0].double().numpy())
            handle = block.register_forward_hook(hook)
            after = model.module(ids).logits[0].double().numpy()
            handle.remove()
            plain = model.module(ids).logits[0].double().numpy()
        after_log = softmax_log(after)
        kl = (np.exp(before) * (before - after_log)).sum(-1)
        top = before.argmax(-1) != after_log.argmax(-1)
        for i, line in enumerate(part.itertuples()):
            follows = i + 1 < len(part)
            loss = before[i, ids[0, i + 1]] - after_log[i, ids[0, i + 1]] if follows else np.nan
            if not line.is_special:
                rows[line.row] = (loss, kl[i], top[i], changed[i])
            if changed[i] and not line.is_special:
                step = after[i] - plain[i]
                raised.append(step - step.mean())
    return np.array([rows[row] for row in sorted(rows)], float), np.mean(raised, axis=0)


@pytest.mark.parametrize(("op", "value", "rows"), [("ablate", None, None), ("add", 3.0, "token = ' Monday'")])
def test_the_effect_equals_passes_by_hand(op, value, rows, recorded, recorded_model, saes, feature_stores):
    features, sae = feature_stores["middle"]
    feature = int(np.argsort(-text_counts(features))[5])
    effect = wb.feature_effect(
        features, sae, feature, op, value, model=recorded_model, rows=rows, controls=2, show_progress=False
    )
    chosen = recorded.where(rows or "NOT is_special").ids
    assert len(set(effect.controls) | {feature}) == 3
    sums = {}
    for number in (feature, *effect.controls):
        values, raised = by_hand(recorded_model, recorded, saes["middle"], number, op, value, chosen)
        counted = np.isin(recorded.where("NOT is_special").ids, _rows_of_sequences(recorded, chosen))
        values = values[counted]
        for scope, mask in (("all", np.ones(len(values), bool)), ("changed", values[:, 3] == 1)):
            expected = np.nanmean(values[mask, :3], axis=0)
            sums[number, scope] = expected
            lines = effect.table[(effect.table["feature"] == number) & (effect.table["scope"] == scope)]
            measured = lines[lines["change"] != "difference"]["value"].to_numpy()
            np.testing.assert_allclose(measured, expected, rtol=2e-3, atol=2e-5)
        if number == feature:
            tokens = effect.logits
            np.testing.assert_allclose(tokens["logit"], raised[tokens["token_id"]], rtol=1e-3, atol=1e-4)
            assert set(tokens["token_id"]) == {*np.argsort(raised)[:10], *np.argsort(raised)[-10:]}
        assert effect.changed.set_index("feature").loc[number, "changed"] == values[:, 3].sum()
    for scope in ("all", "changed"):
        lines = effect.table[(effect.table["change"] == "difference") & (effect.table["scope"] == scope)]
        control_mean = np.mean([sums[control, scope] for control in effect.controls], axis=0)
        np.testing.assert_allclose(lines["value"], sums[feature, scope] - control_mean, rtol=2e-3, atol=2e-5)
    assert not (effect.table["low"] > effect.table["high"]).any()
    assert effect.rows == counted.sum()


def _rows_of_sequences(store, rows):
    tokens = store.tokens.to_pandas()
    return tokens["row"][tokens["sequence"].isin(tokens["sequence"][tokens["row"].isin(rows)])].to_numpy()


def test_features_under_a_rule_are_changed_by_the_rule_in_the_running_model(
    recorded, recorded_model, feature_stores, tmp_path
):
    sae, options = feature_stores["middle"][1], {"model": recorded_model, "controls": 2, "show_progress": False}
    features = wb.extract_features(recorded, sae, out=tmp_path / "ruled", sparsity=TopK(3), show_progress=False)
    labels = tmp_path / "labels.csv"
    feature = int(np.argmax(text_counts(features)))
    labels.write_text(f"feature,description\n{feature},most frequent\n")
    features = wb.import_labels(features, labels)
    effect = wb.feature_effect(features, sae, feature, **options)
    changed = effect.changed.set_index("feature")
    assert changed["changed"].tolist() == text_counts(features)[changed.index].tolist()
    assert changed["description"].tolist() == ["most frequent", None, None]
    effect_with_rule = wb.feature_effect(features, wb.with_sparsity(sae, TopK(3)), feature, **options)
    pd.testing.assert_frame_equal(effect.table, effect_with_rule.table)
    whole = wb.extract_features(recorded, sae, out=tmp_path / "whole", sparsity=MutualChoice(3), show_progress=False)
    message = refused(RequestError, lambda: wb.feature_effect(whole, sae, feature, **options))
    assert "whole were made under mutual-choice, which ranks the rows of the whole store" in message
    assert len(wb.feature_contributions(whole, sae, 3)) > 0


def test_adding_nothing_has_no_effect_at_all(recorded_model, feature_stores):
    features, sae = feature_stores["middle"]
    effect = wb.feature_effect(features, sae, 3, "add", 0.0, model=recorded_model, show_progress=False)
    everywhere = effect.table[effect.table["scope"] == "all"]
    assert (everywhere[["value", "low", "high"]].to_numpy() == 0).all()
    assert effect.table[effect.table["scope"] == "changed"]["value"].isna().all()
    assert (effect.changed["changed"] == 0).all()


def test_controls_are_drawn_from_the_nearest_densities():
    counts = np.concatenate([[500], np.arange(490, 510), np.zeros(50, int), np.arange(1, 30)])
    drawn = {density_controls(counts, 0, 3, seed) for seed in range(30)}
    assert len(drawn) > 10
    assert {control for three in drawn for control in three} == set(range(7, 17))
    assert all(len(set(three)) == 3 for three in drawn)
    assert density_controls(counts, 0, 3, 1) == density_controls(counts, 0, 3, 1)
    assert "controls is 60, and 49 other features are active on text" in refused(
        RequestError, lambda: density_controls(counts, 0, 60, 0)
    )


def test_effects_that_cannot_be_measured_are_refused(recorded_model, feature_stores):
    features, sae = feature_stores["middle"]
    last_features = feature_stores["last"][1]
    dead = int(np.flatnonzero(text_counts(features) == 0)[0])
    for arguments, settings, message in (
        ((sae, dead), {}, f"feature {dead} is active on no row of text"),
        ((sae, 64), {}, "feature 64 does not exist"),
        ((last_features, 3), {}, "features middle were made with SAE middle"),
        ((sae, 3, "clamp"), {}, "value: clamp needs one"),
        ((sae, 3, "add", 1.0), {"rows": "position > 99"}, "rows: none of the"),
        ((sae, 3, "add", 1.0), {"controls": -1}, "controls must be a whole number, at least 0, not -1"),
    ):
        text = refused(
            RequestError, lambda a=arguments, s=settings: wb.feature_effect(features, *a, model=recorded_model, **s)
        )
        assert text.startswith(message)


def test_the_effect_is_drawn_saved_and_printed(recorded_model, feature_stores, saes, tmp_path, monkeypatch):
    features, sae = feature_stores["middle"]
    feature = int(np.argmax(text_counts(features)))
    monkeypatch.setattr("workbench.model.reload.recorded_model", lambda *_: recorded_model)
    out = tmp_path / "out"
    options = ("--sae", str(saes["middle"]), "--out", str(out), "--controls", "1")
    code, text, err = run("effect", str(features.path), str(feature), *options)
    assert (code, err) == (0, "")
    assert f"ablate feature {feature}; " in text
    assert {"effect.csv", "changed.csv", "logits.csv", "figure"} == {path.name for path in out.iterdir()}
    effect = wb.feature_effect(features, sae, feature, model=recorded_model, controls=1, show_progress=False)
    figure = effect.figure("kl")
    line = effect.table.query("measure == 'kl' and scope == 'changed'")
    np.testing.assert_allclose(figure.data[0].y, line["value"][line["change"] != "difference"])
    assert list(figure.data[0].x) == [f"feature {feature}", f"control {effect.controls[0]}"]
