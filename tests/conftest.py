"""Fixtures for all tests: an offline, quiet environment; real small models; tiny random ones."""

import atexit
import gc
import os
from pathlib import Path

# Set before any test imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["PYTHONPATH"] = (
    f"{Path(__file__).parent / 'support' / 'left_out'}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
)
if not Path("/dev/nvidiactl").exists():  # kernels in Triton run on the CPU, where it is installed
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores already; their threads would fight
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import shape_checks  # takes effect for what is imported after it
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from warned import warned_of
from words import WORDS

settings.register_profile("workbench", deadline=None, print_blob=True)  # a busy machine is no failure
settings.load_profile("workbench")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def shared(path: str) -> Path:
    """Returns a file or folder that only its authors have, beside the repository; skips the test elsewhere."""
    if not (SHARED / path).exists():
        pytest.skip(
            f"{path} is no part of the repository; its authors keep it in a folder `shared` beside their checkout"
        )
    return SHARED / path


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collects no garbage while modules are imported, nor later among what they made: scanning it takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup():
    shape_checks.start_test()


# Extension modules report what is left at the end of the process; before it, pytest collects garbage five times.
atexit.register(gc.unfreeze)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct: Llama, 30 layers x 576, GQA 9/3, tied, 49,152 tokens, no BOS, float32."""
    folder = ROOT / "models" / "smollm2-135m"
    if not (folder / ".complete").exists():
        pytest.skip("needs SmolLM2-135M; `make models` fetches it")
    return folder


@pytest.fixture(autouse=True)
def _no_unexpected_warnings():
    """Fails a test in which the package logged a warning that no `warned` expected."""
    with warned_of() as records:
        yield
    unexpected = [record.getMessage() for record in records if not hasattr(record, "expected")]
    assert unexpected == [], "the package logged warnings; expect them by `with warned(match):`"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Directory of a trained Llama: 5 layers x 64, GQA 8/4, BPE 512 with byte fallback, adds BOS, context 512."""
    return shared("models/stories260K")


@pytest.fixture(scope="session")
def babyllama() -> Path:
    """Directory of a trained Llama: 5 layers x 128, GQA 8/4, 105 characters, adds BOS, no newline, context 256."""
    return shared("models/babyllama-105")


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """1,000 children's stories, one {"text": ...} a line."""
    return shared("corpora/tinystories_1000.jsonl")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A byte-level BPE as GPT-2's, without training: 2 special tokens, 256 bytes, and the merges that spell WORDS.

    ` Monday` is one token, `Monday` six. <s> is BOS, </s> EOS; it adds neither by itself and has no padding token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in WORDS:
        spaced = "Ġ" + word
        for end in range(1, len(spaced)):
            if spaced[: end + 1] not in vocab:
                vocab[spaced[: end + 1]] = len(vocab)
                merges.append((spaced[:end], spaced[end]))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tiny_tokenizer")  # TransformerBridge loads its tokenizer a second time, by path
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _tiny_configs() -> dict:
    from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

    common = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
    body = common | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return {
        "gpt2": GPT2Config(**common, n_embd=32, n_layer=3, n_head=4, n_positions=128),
        "llama": LlamaConfig(**body, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False),
        "gpt_neox": GPTNeoXConfig(**body, max_position_embeddings=128, use_parallel_residual=True),
        # small caps, so that leaving one out shows
        "gemma2": Gemma2Config(
            **body,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            max_position_embeddings=128,
            sliding_window=16,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
        ),
    }


@pytest.fixture(scope="session")
def tiny_models() -> dict:
    """Random models by family, 3 layers x 32, 4 heads, 128 positions, float32; the vocabulary fits tiny_tokenizer.

    gpt2: learned positions, tied; llama: RoPE and GQA 4/2; gpt_neox: attention and MLP in parallel; gemma2: soft-caps
    on patterns and logits, every other layer sees 16 tokens. Every parameter is off its initial value, norms and biases
    too, so that dropping one shows. Shared by the whole run: deep-copy what you change.
    """
    import torch
    from transformers import AutoModelForCausalLM

    built = {}
    for seed, (family, config) in enumerate(_tiny_configs().items()):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.config.architectures = [type(model).__name__]  # which TransformerLens goes by
        built[family] = model
        _BUILT[family] = _state(model)
    return built


@pytest.fixture(autouse=True)
def _tiny_models_unchanged(request):
    """Fails the test that leaves hooks, train mode, other settings or other weights in a model that all tests share."""
    yield
    if "tiny_models" in request.fixturenames:
        for family, model in request.getfixturevalue("tiny_models").items():
            hooked = [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]
            assert hooked == [], f"the test left hooks in these modules of the shared {family}: copy it first"
            assert _state(model) == _BUILT[family], f"the test changed the shared {family}: copy it first"


def _state(model) -> tuple:
    """What tests could change in a model; torch counts the changes of a tensor in place."""
    settings = (model.config.to_dict(), model.config._attn_implementation)
    weights = [(id(tensor), tensor._version) for tensor in model.parameters()]
    return settings, weights, [part.training for part in model.modules()]


_BUILT: dict[str, tuple] = {}


@pytest.fixture(scope="session", params=["gpt2", "llama", "gpt_neox", "gemma2"])
def tiny_model(request, tiny_models):
    """Each of tiny_models in turn."""
    return tiny_models[request.param]


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs workers in this process, with everything pickled, without the seconds that a process takes to start."""
    pickle = pytest.importorskip("ray.cloudpickle", reason="workers need Ray: install the extra [distributed]")
    from workbench.parallel import ray as parallel

    def run_here(_self, begin, arguments, tasks, on_lost, device=None):
        if not tasks:
            return
        worker = parallel._Worker()
        worker.start(os.getcwd(), device or "cpu", 1, pickle.loads(pickle.dumps((begin, arguments))))
        for task in tasks:
            yield task, pickle.loads(pickle.dumps(worker.do(pickle.loads(pickle.dumps(task)))))

    monkeypatch.setattr(parallel.RayWorkers, "map", run_here)
