"""A Granite, whose blocks multiply what attention and MLP put out before they add it."""

from transformers import GraniteConfig, GraniteForCausalLM

MULTIPLIER = 0.22


def granite_of(llama, **settings):
    """Returns a Granite with the weights of a Llama."""
    config = {**llama.config.to_dict(), "residual_multiplier": MULTIPLIER, "architectures": None, **settings}
    module = GraniteForCausalLM(GraniteConfig(**config)).eval()
    module.load_state_dict(llama.state_dict())
    return module
