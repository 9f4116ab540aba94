"""Text from an assembled model: one token at a time, with a cache of keys and values.

Shape suffixes: V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
import torch
from torch import Tensor

from forge.errors import ConfigError
from forge.model.attention import KeyValueCache
from forge.model.moe import MixtureLM
from forge.vocabulary import END_OF_TEXT


def generate(
    model: MixtureLM, tokenizer: Tokenizer, prompt: str, max_tokens: int, temperature: float = 0.8,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, on_token: Callable[[str], None] | None = None,
) -> str:  # fmt: skip
    """Continue a prompt until an end of text or `max_tokens`.

    Args:
        model: the assembled model.
        tokenizer: its tokenizer.
        prompt: the text to continue; an empty one starts a new document.
        max_tokens: tokens to write at most; with the prompt's they must fit in the model's context.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: choose among this many most likely tokens only; none for all.
        top_p: choose among the fewest tokens whose probabilities reach this sum only; none for all.
        seed: of the random choices; the same seed gives the same text.
        on_token: called with each new piece of text, whole characters only.

    Returns:
        The new text, without the prompt.

    Raises:
        ConfigError: an option is out of range, the text would not fit in the context, or the tokenizer is another
            model's.
    """
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        if end_id is None:
            raise ConfigError("The prompt must not be empty: this model's tokenizer has no end of text to start from.")
        ids = [end_id]
    stream = DecodeStream(skip_special_tokens=True)
    said = ""

    def say(token: int) -> None:
        nonlocal said
        piece = stream.step(tokenizer, token)
        if piece and on_token is not None:
            said += piece
            on_token(piece)

    new = generate_ids(model, ids, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                       end_id=end_id, on_id=say)  # fmt: skip
    text = str(tokenizer.decode(new))
    if on_token is not None and text.startswith(said) and len(text) > len(said):
        on_token(text[len(said) :])  # a character that was never completed
    return text


@torch.inference_mode()
def generate_ids(
    model: MixtureLM, prompt: Sequence[int], max_tokens: int, *, temperature: float = 0.8, top_k: int | None = None,
    top_p: float | None = None, seed: int = 0, end_id: int | None = None, on_id: Callable[[int], None] | None = None,
) -> list[int]:  # fmt: skip
    """Continue token ids; `generate` without a tokenizer.

    Args:
        model: the assembled model.
        prompt: token ids, at least one.
        max_tokens: tokens to write at most.
        temperature: as in `generate`.
        top_k: as in `generate`.
        top_p: as in `generate`.
        seed: as in `generate`.
        end_id: the token that ends the text, not returned; none to write `max_tokens` in any case.
        on_id: called with each new token.

    Returns:
        The new token ids, without the prompt.

    Raises:
        ConfigError: as in `generate`.
    """
    _check(model, prompt, max_tokens, temperature, top_k, top_p)
    device = model.head_weight.device
    random = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(model.config, 1, len(prompt) + max_tokens, device)
    step, new = list(prompt), list[int]()
    for _ in range(max_tokens):
        hidden_1TD = model(torch.tensor([step], device=device), cache=cache)
        logits_V = (model.head_weight @ hidden_1TD[0, -1]).float().cpu()
        token = choose(logits_V, temperature, top_k, top_p, random)
        if token == end_id:
            break
        new.append(token)
        step = [token]
        if on_id is not None:
            on_id(token)
    return new


def choose(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, random: torch.Generator
) -> int:
    """Draw a token: temperature, then top-k, then top-p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1)."""
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V, tokens_V = (logits_V / temperature).sort(descending=True, stable=True)
    probabilities_V = scaled_V[:top_k].softmax(dim=-1)
    if top_p is not None:
        before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
        probabilities_V = torch.where(before_V < top_p, probabilities_V, 0.0)
    return int(tokens_V[torch.multinomial(probabilities_V, 1, generator=random)])


def _check(
    model: MixtureLM, prompt: Sequence[int], max_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    context = model.config.max_seq_len
    if max_tokens < 1:
        raise ConfigError(f"The number of tokens to generate must be at least 1, not {max_tokens}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"The temperature must be 0 (always the most likely token) or more, not {temperature}.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top-k must be at least 1, not {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top-p must be above 0 and at most 1, not {top_p}.")
    if len(prompt) + max_tokens > context:
        raise ConfigError(f"The prompt's {len(prompt)} tokens and {max_tokens} new ones do not fit in the model's "
                          f"context of {context}: shorten the prompt or ask for fewer.")  # fmt: skip
    if not prompt or not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ConfigError("The prompt's tokens are not in the model's vocabulary: the tokenizer is another model's.")
