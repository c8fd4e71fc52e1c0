"""Patterns of sites are checked before a model is loaded; what its map of sites accepts always passes."""

from __future__ import annotations

import pytest

from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.sites.grammar import SHORT_NAMES, check_patterns


def test_no_pattern_that_a_model_accepts_is_refused(tiny_model):
    site_map = Model(tiny_model, None, "m").site_map
    names = [*site_map.recordable, *site_map.synonyms, *(site.short or "" for site in site_map.recordable.values())]
    kinds = {site.kind for site in site_map.recordable.values() if site.kind}
    patterns = [*filter(None, names), *kinds, "blocks.*.hook_resid_p*", "*", "resid_post.-1:", "resid_post.:"]
    for pattern in patterns:
        assert site_map.select([pattern])
        check_patterns([pattern], site_map.n_layers)
        check_patterns([pattern], None)


@pytest.mark.parametrize(
    "pattern",
    [
        "resid_pst",
        "resid_pst.0",
        "resid_post.3",
        "resid_post.3:",
        "z.0:2:0",
        "logits.0",
        "blocks.3.hook_resid_post",
        "",
    ],
)
def test_what_is_refused_early_is_refused_by_the_model_too(pattern, tiny_models):
    site_map = Model(tiny_models["llama"], None, "m").site_map  # 3 layers
    with pytest.raises(RequestError):
        site_map.select([pattern])
    with pytest.raises(RequestError, match=r"^site "):
        check_patterns(["resid_post", pattern], 3)


def test_layers_are_checked_only_where_their_number_is_known():
    check_patterns([f"{kind}.99" for kind, name in SHORT_NAMES.items() if "{layer}" in name], None)
