"""Sites that a model does not offer: each short name is offered or has a reason, and advice names what is offered."""

from dataclasses import replace

import pytest
from refusals import refused
from store_example import MODEL, write_store

from workbench.analysis.received import attention_source
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.sites.absent_sites import AbsentSites, absence, absent_sites
from workbench.sites.grammar import SHORT_NAMES
from workbench.store.reader import open_store


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_every_short_name_can_be_recorded_or_has_a_reason(family, tiny_models):
    sites = Model(tiny_models[family], None, family).site_map
    for known in (sites, replace(sites, causal=False), replace(sites, adapter=None, missing={})):
        absent = absent_sites(known)
        for kind, template in SHORT_NAMES.items():
            for layer in range(sites.n_layers) if "{layer}" in template else (None,):
                label = kind if layer is None else f"{kind}.{layer}"
                try:
                    known.select([label])
                except RequestError:
                    assert absence(absent, kind, layer), label
                else:
                    assert absence(absent, kind, layer) is None, label
        assert absence(absent, "attn_received") is None or not known.causal
        assert absence(None, "zork") is absence(absent, "zork") is None


def test_a_kind_that_some_layers_lack_names_them(tiny_models):
    sites = Model(tiny_models["llama"], None, "llama").site_map
    absent_name = "blocks.1.attn.hook_pattern"
    present_sites = {name: site for name, site in sites.sites.items() if name != absent_name}
    absent = absent_sites(
        replace(sites, sites=present_sites, missing={**sites.missing, absent_name: "it is linear attention"})
    )
    (layer_record,) = (part for part in absent if part.layers == (1,))
    assert layer_record.reason == "it is linear attention"
    assert layer_record.kinds[:2] == ("pattern", "attn_received")
    assert absence(absent, "attn_first", 1) == layer_record.reason
    assert absence(absent, "attn_first", 0) is absence(absent, "attn_first") is None


def test_advice_names_a_site_of_the_model_or_why_there_is_none(tmp_path):
    def refusal(name, *absent):
        store = open_store(write_store(tmp_path / name, [[3]], sites=(), model=replace(MODEL, absent_sites=absent)))
        return refused(RequestError, lambda: attention_source(store))

    linear = AbsentSites(("pattern", "attn_received"), (0,), "it is linear attention")
    command = "; to add it: workbench add {} --sites {}"
    assert refusal("some", linear).endswith(command.format(tmp_path / "some", "attn_received.1"))
    later = AbsentSites(("attn_received",), None, "earlier tokens attend to later ones")
    assert refusal("other", later).endswith(command.format(tmp_path / "other", "pattern.0"))
    reason = "and demo does not offer it: it is linear attention; recorded are none"
    assert refusal("none", replace(linear, layers=None)).endswith(f", {reason}")
