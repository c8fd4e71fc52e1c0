"""Embedding and tokenizer of a model in its stores: equal to the bit, once on the disk, refused if damaged."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from mutations import fuzz, safetensors
from safetensors.torch import load, save

import workbench as wb
from workbench.analysis.weights_probe import read_vocabulary
from workbench.io.files import sha256_bytes
from workbench.model.load import Model
from workbench.model.stored_vocabulary import read_stored_vocabulary, vocabulary_tensors
from workbench.model.unembed import load_unembed
from workbench.probes import FiberBundle, SemanticAxes, TokenCharacters, UnderTrainedTokens
from workbench.probes.semantic_axes import single_words
from workbench.store.manifest import read_manifest, write_manifest

TEXTS = ["one two three"]


def recorded(model, out, texts=TEXTS, **options):
    return wb.record(model, texts, sites=["embed"], out=out, show_progress=False, **options)


def opt(vocab: int, tied: bool):
    """An OPT whose embedding is narrower than its stream, as OPT-350M's."""
    from transformers import OPTConfig, OPTForCausalLM

    shape = {
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = OPTConfig(vocab_size=vocab, max_position_embeddings=64, tie_word_embeddings=tied, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OPTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def modules(tiny_models, tiny_tokenizer):
    resized = copy.deepcopy(tiny_models["llama"])
    resized.resize_token_embeddings(333)
    half = copy.deepcopy(tiny_models["gemma2"]).to(torch.bfloat16)
    narrow = {"narrow": opt(len(tiny_tokenizer), True), "narrow untied": opt(len(tiny_tokenizer), False)}
    return {name: tiny_models[name] for name in ("gpt2", "llama")} | {"resized": resized, "gemma2": half} | narrow


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "resized", "narrow", "narrow untied"])
def test_a_store_gives_the_vocabulary_of_its_model_to_the_bit(family, modules, tiny_tokenizer, tmp_path):
    model = Model(modules[family], tiny_tokenizer, family)
    store = recorded(model, tmp_path / "s")
    assert store.verify().empty
    stored, loaded = read_vocabulary(store), read_vocabulary(model)
    for name in ("embedding", "unembedding"):
        assert torch.equal(getattr(stored, name), getattr(loaded, name))
    assert stored.tied == loaded.tied == (family not in ("llama", "resized", "narrow untied"))
    assert stored.texts == loaded.texts
    for name in ("kinds", "ordinary", "never_seen"):
        assert getattr(stored, name).tolist() == getattr(loaded, name).tolist()
    assert store.manifest.has_unembed == (not family.startswith("narrow"))


def test_a_model_without_a_tokenizer_or_a_head_has_its_tables_in_the_store(modules, tmp_path):
    model = Model(modules["llama"], None, "llama")
    stored = read_vocabulary(recorded(model, tmp_path / "s", [[3, 4, 5]]))
    assert torch.equal(stored.embedding, modules["llama"].get_input_embeddings().weight)
    with pytest.raises(wb.RequestError, match="model 'llama' has no tokenizer, and this probe"):
        _ = stored.tokenizer
    headless = read_vocabulary(recorded(wb.load_model(modules["llama"].model), tmp_path / "t", [[3, 4, 5]]))
    assert headless.unembedding is None
    assert torch.equal(headless.embedding, stored.embedding)


def test_probes_of_weights_give_the_same_from_a_store_whose_model_is_not_there(tmp_path):
    model = wb.load_model("demo", device="cpu")
    store = recorded(model, tmp_path / "s")
    manifest = store.manifest
    write_manifest(store.path, _renamed(manifest, "somebody/gone"))
    orphan_store = wb.open_store(store.path)
    words = list(single_words(read_vocabulary(model)))[:12]
    pairs = [words[place : place + 2] for place in range(0, 12, 2)]
    (tmp_path / "poles.json").write_text(json.dumps({str(axis): pairs[axis : axis + 2] for axis in (0, 2, 4)}))
    axes = SemanticAxes(poles=str(tmp_path / "poles.json"), strength=0.0)
    for probe in (UnderTrainedTokens(tested=0), axes, FiberBundle(row_limit=20), TokenCharacters(epochs=1)):
        assert probe.run(orphan_store).data.identical(probe.run(model).data), probe.name
    verified, moved = UnderTrainedTokens(tested=2).run(orphan_store), replace(axes, strength=0.5).run(orphan_store)
    assert verified.data["tested"].to_numpy().tolist() == [0, 0]
    for result in (verified, moved):
        assert "'somebody/gone', which the store names, cannot be loaded; give model=" in result.data.attrs["note"]
    assert UnderTrainedTokens(tested=2).run(orphan_store, model=model).data["tested"].to_numpy().tolist() == [2, 2]


def _renamed(manifest, name):
    return replace(manifest, model=replace(manifest.model, name=name), rows_fingerprint=manifest.fingerprint)


def test_stores_of_a_folder_share_the_file_and_a_copy_has_its_own(modules, tiny_tokenizer, tmp_path):
    model = Model(modules["narrow"], tiny_tokenizer, "narrow")
    first, second = (recorded(model, tmp_path / name) for name in ("one", "two"))
    assert (first.path / "unembed.safetensors").samefile(second.path / "unembed.safetensors")
    assert first.manifest.unembed_reason == second.manifest.unembed_reason
    shutil.rmtree(first.path)
    wb.pack(second, tmp_path / "sent")
    sent = wb.open_store(tmp_path / "sent")
    assert torch.equal(read_vocabulary(sent).embedding, read_vocabulary(model).embedding)
    with pytest.raises(wb.RequestError, match="holds no unembedding: OPTForCausalLM: the head reads"):
        load_unembed(sent.path)
    merged = wb.merge([second, sent], tmp_path / "merged")
    assert merged.manifest.unembed_reason == second.manifest.unembed_reason
    assert read_vocabulary(merged).tied


def test_tokenizers_with_other_special_tokens_have_a_file_each(modules, tiny_tokenizer, tmp_path):
    """Their definitions are equal, and so are their fingerprints."""
    other_tokenizer = copy.deepcopy(tiny_tokenizer)
    other_tokenizer.bos_token, other_tokenizer.sep_token = "</s>", "<s>"
    models = [
        Model(modules["llama"], tokenizer, "llama")
        for tokenizer in (tiny_tokenizer, other_tokenizer, copy.deepcopy(other_tokenizer))
    ]
    stores = [recorded(model, tmp_path / str(number)) for number, model in enumerate(models)]
    assert len({store.manifest.model.tokenizer_fingerprint for store in stores}) == 1
    files = [store.path / "unembed.safetensors" for store in stores]
    assert not files[0].samefile(files[1])
    assert files[1].samefile(files[2])
    for store, model in zip(stores, models, strict=True):
        assert read_vocabulary(store).tokenizer.special_tokens_map == model.tokenizer.special_tokens_map


def test_stores_without_it_ask_for_the_model(modules, tiny_tokenizer, tmp_path):
    model = Model(modules["llama"], tiny_tokenizer, "somebody/gone")
    store = recorded(model, tmp_path / "s", unembed=False)
    with pytest.raises(
        wb.RequestError, match=r"^store 's' does not have the embedding of its model; model is not given.*"
    ):
        UnderTrainedTokens(tested=0).run(store)
    assert UnderTrainedTokens(tested=0).run(store, model=model).headline()
    assert read_vocabulary(recorded(model, store.path)).texts


def test_a_tokenizer_that_its_definition_does_not_give_back_is_not_stored(modules, tiny_tokenizer):
    class Loud(type(tiny_tokenizer)):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    loud = Loud(tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    model = Model(modules["llama"], loud, "loud")
    assert vocabulary_tensors(model, None) == {}
    assert set(vocabulary_tensors(Model(modules["llama"], tiny_tokenizer, "x"), None)) == {
        "head",
        "embedding",
        "tokenizer.json",
        "vocabulary",
    }


def test_damaged_files_are_refused_in_one_line(modules, tiny_tokenizer, tmp_path):
    store = recorded(Model(modules["llama"], tiny_tokenizer, "llama"), tmp_path / "s")
    path, file = store.path, store.path / "unembed.safetensors"

    def read_sealed():
        write_manifest(path, replace(read_manifest(path), unembed=sha256_bytes(file.read_bytes())))
        return read_stored_vocabulary(wb.open_store(path))

    fuzz(read_sealed, file, parts=safetensors, count=30)
    fuzz(read_sealed, file, parts=facts, seed=1, count=30)
    write_manifest(path, store.manifest)
    assert fuzz(lambda: read_stored_vocabulary(store), file, count=10, is_original=lambda _: False)["DataError"] == 10


def facts(data: bytes):
    """What tells which table is which, to damage it alone."""
    tensors = load(data)
    known = json.loads(tensors["vocabulary"].numpy().tobytes())

    def rebuilt(changed) -> bytes:
        text = torch.frombuffer(bytearray(json.dumps(changed).encode()), dtype=torch.uint8)
        return save(tensors | {"vocabulary": text}, {"unembed": metadata})

    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]["unembed"]
    return known, rebuilt
