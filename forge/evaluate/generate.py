"""Text from an assembled model: one token at a time, with a cache of keys and values.

Each token comes with the expert that spoke it: the one that had the largest weight, as the mean over the layers, in the
forward pass that the token was drawn from. Only the experts that a token is routed to are computed, and the tensors stay
mapped, so the pages of an expert that is never asked are never read.

Shape suffixes: V vocab_size, E n_experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
import math
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
import torch
from torch import Tensor

from forge.errors import ConfigError
from forge.model.attention import KeyValueCache
from forge.model.layers import product
from forge.model.moe import MixtureLM, Routing
from forge.vocabulary import END_OF_TEXT

#: Tokens to write when nobody says how many, as far as they fit in the context.
DEFAULT_TOKENS = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many of them."""

    max_tokens: int | None = None
    """Tokens to write at most; None for `DEFAULT_TOKENS`, or as many as fit in the model's context."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int | None = None
    """Choose among this many most likely tokens only; None for all."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities reach this sum only; None for all."""
    repetition_penalty: float = 1.0
    """Makes tokens that are in the text already less likely; 1 does nothing."""
    seed: int = 0
    """Of the random choices; the same seed gives the same text."""

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            ConfigError: says which value, and what it may be.
        """
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"The number of tokens to generate must be at least 1, not {self.max_tokens}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"The temperature must be 0 (always the most likely token) or more, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k must be at least 1, not {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must be above 0 and at most 1, not {self.top_p}.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError("The repetition penalty must be above 0 (1 does nothing, 1.2 is strong), not "
                              f"{self.repetition_penalty}.")  # fmt: skip
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"The seed must fit in 64 bits, and {self.seed} does not.")


class Token(NamedTuple):
    """A new token and the expert that spoke it."""

    id: int
    expert: int


class Piece(NamedTuple):
    """A token as text: whole characters only, so a token that ends within one has none, and the next one has it all."""

    text: str
    expert: int
    tokens: int = 1
    """0 of what is left at the end, of a character that was never completed."""


def generate(model: MixtureLM, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> str:
    """Continue a prompt until an end of text; the new text. Raises as `stream` does."""
    return "".join(piece.text for piece in stream(model, tokenizer, prompt, sampling))


def stream(model: MixtureLM, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[Piece]:
    """Continue a prompt until an end of text, one token at a time.

    Args:
        model: the assembled model.
        tokenizer: its tokenizer.
        prompt: the text to continue; an empty one starts a new document.
        sampling: how.

    Returns:
        A piece for each new token. Asking for the first one raises what is wrong:

    Raises:
        ConfigError: an option is out of range, the text would not fit in the context, or the tokenizer is another
            model's.
    """
    ids = encode_prompt(tokenizer, prompt)
    return pieces(tokenizer, tokens(model, ids, sampling, tokenizer.token_to_id(END_OF_TEXT)))


def go_on(model: MixtureLM, tokenizer: Tokenizer, text: str, sampling: Sampling) -> tuple[Iterator[Piece], int]:
    """Continue a text of any length until an end of text: of one that leaves no room, the beginning is left out.

    Args:
        model: the assembled model.
        tokenizer: its tokenizer.
        text: the text to continue; an empty one starts a new document.
        sampling: how; None of `max_tokens` writes at most half a context.

    Returns:
        The pieces, as in `stream`, which raise the same; and how many tokens of the text were left out.
    """
    context = model.config.max_seq_len
    room = sampling.max_tokens or min(DEFAULT_TOKENS, context // 2)
    ids = encode_prompt(tokenizer, text)
    kept = ids[-max(1, context - room) :]
    new = tokens(model, kept, replace(sampling, max_tokens=room), tokenizer.token_to_id(END_OF_TEXT))
    return pieces(tokenizer, new), len(ids) - len(kept)


def pieces(tokenizer: Tokenizer, new: Iterable[Token]) -> Iterator[Piece]:
    """Tokens as text, as they come; a character that is never completed is told of at the end."""
    decoder, ids, said, expert = DecodeStream(skip_special_tokens=True), list[int](), "", 0
    for token, expert in new:
        ids.append(token)
        text = decoder.step(tokenizer, token) or ""
        said += text
        yield Piece(text, expert)
    whole = str(tokenizer.decode(ids))
    if whole.startswith(said) and len(whole) > len(said):
        yield Piece(whole[len(said) :], expert, 0)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, at least one: an empty prompt is the end of the text before it.

    Raises:
        ConfigError: the prompt is empty and the tokenizer has no end of text.
    """
    # A command line may hold bytes that are no text: Python keeps them as half characters, which no tokenizer takes.
    ids = list(tokenizer.encode(prompt.encode(errors="replace").decode()).ids)
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    if ids:
        return ids
    if end_id is None:
        raise ConfigError("The prompt must not be empty: this model's tokenizer has no end of text to start from.")
    return [end_id]


def generate_ids(
    model: MixtureLM, prompt: Sequence[int], max_tokens: int, *, temperature: float = 0.8, top_k: int | None = None,
    top_p: float | None = None, seed: int = 0,
) -> list[int]:  # fmt: skip
    """Continue token ids by `max_tokens` new ones, whatever they are; `Sampling` says what the options mean."""
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed=seed)
    return [token.id for token in tokens(model, prompt, sampling)]


def tokens(
    model: MixtureLM, prompt: Sequence[int], sampling: Sampling, end_id: int | None = None
) -> Iterator[Token]:
    """Continue token ids, one at a time; `stream` without a tokenizer.

    Args:
        model: the assembled model.
        prompt: token ids, at least one.
        sampling: how.
        end_id: the token that ends the text and is not told of; None to write them all in any case.

    Raises:
        ConfigError: as in `stream`.
    """
    room = _room(model, prompt, sampling)
    device = model.head_weight.device
    random = torch.Generator().manual_seed(sampling.seed)
    cache = KeyValueCache(model.config, 1, len(prompt) + room, device)
    step, seen = list(prompt), set(prompt)
    for _ in range(room):
        with torch.inference_mode():  # Not around a yield: it would hold for whoever asks for the next token.
            routing: list[Routing] = []
            hidden_1TD = model(torch.tensor([step], device=device), cache=cache, routing=routing)
            logits_V = product(hidden_1TD[0, -1], model.head_weight).float().cpu()
            token = choose(penalised(logits_V, seen, sampling.repetition_penalty), sampling, random)
            expert = speaker(routing)
        if token == end_id:
            return
        yield Token(token, expert)
        step = [token]
        seen.add(token)


def choose(logits_V: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Draw a token: temperature, then top-k, then top-p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1)."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Of the largest nothing is left to divide, so no temperature is too low.
    scaled_V, tokens_V = ((logits_V - logits_V.max()) / sampling.temperature).sort(descending=True, stable=True)
    probabilities_V = scaled_V[: sampling.top_k].softmax(dim=-1)
    if sampling.top_p is not None:
        before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
        probabilities_V = torch.where(before_V < sampling.top_p, probabilities_V, 0.0)
    return int(tokens_V[torch.multinomial(probabilities_V, 1, generator=random)])


def penalised(logits_V: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Divide the positive logits of seen tokens by the penalty and multiply the negative ones.

    Keskar et al. 2019, arXiv 1909.05858, section 4.1, with the sign taken care of as everybody does.
    """
    if penalty == 1.0:
        return logits_V
    index = torch.tensor(sorted(seen))
    old = logits_V[index]
    return logits_V.index_copy(0, index, torch.where(old > 0, old / penalty, old * penalty))


def speaker(routing: Sequence[Routing]) -> int:
    """The expert with the largest weight on the last token, as the mean over the layers; the lowest of equal ones."""
    weights_E = torch.zeros(routing[0].probabilities_NE.shape[1])
    for layer in routing:
        weights_E.index_add_(0, layer.experts_NK[-1].cpu(), layer.weights_NK[-1].float().cpu())
    return int(weights_E.argmax())


def _room(model: MixtureLM, prompt: Sequence[int], sampling: Sampling) -> int:
    """How many tokens to write."""
    sampling.check()
    context = model.config.max_seq_len
    if not prompt or not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ConfigError("The prompt's tokens are not in the model's vocabulary: the tokenizer is another model's.")
    if len(prompt) >= context:
        raise ConfigError(f"The prompt's {len(prompt)} tokens leave no room in the model's context of {context}: shorten it.")
    if sampling.max_tokens is None:
        return min(DEFAULT_TOKENS, context - len(prompt))
    if len(prompt) + sampling.max_tokens > context:
        raise ConfigError(f"The prompt's {len(prompt)} tokens and {sampling.max_tokens} new ones do not fit in the model's "
                          f"context of {context}: shorten the prompt or ask for fewer.")  # fmt: skip
    return sampling.max_tokens
