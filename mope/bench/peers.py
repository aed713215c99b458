"""Peers from the literature: the networks of SSJF and vLLM-LTR with random weights, run as their authors run them.

For what they cost, not for what they predict: nothing is downloaded. Each reads the prompt alone, batch 1, float32,
eager PyTorch. Knows torch and transformers, both optional, and the published shapes; not how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mope import artifact
from mope.bench.config import PeerName
from mope.bench.prompts import as_utf8
from mope.bench.subjects import Loaded, Peer
from mope.errors import ConfigError
from mope.extras import require

if TYPE_CHECKING:
    from mope.request import Request


@dataclass(frozen=True, slots=True)
class Shape:
    """A published network.

    Attributes:
        description: what it is and who published it.
        family: prefix of its classes in `transformers`, whose default config has the published size.
        max_tokens: where the tokeniser cuts a prompt.
    """

    description: str
    family: str
    max_tokens: int


SHAPES: dict[PeerName, Shape] = {
    "ssjf": Shape("BERT-base with one output, as SSJF (Qiu et al. 2024)", "Bert", 512),
    "vllm-ltr": Shape("OPT-125M with a ranking head, as vLLM-LTR (Fu et al. 2024)", "OPT", 2048),
}


def load_peer(peer: Peer) -> Loaded:
    """Build a peer with random weights.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        ConfigError: the device can't be used.
    """
    shape = SHAPES[peer.name]
    torch, transformers = (require(module, f"the peer {peer.name}") for module in ("torch", "transformers"))
    from tokenizers import Tokenizer

    begin = artifact.check(peer.artifact).special_ids[0]
    tokenizer = Tokenizer.from_file(str(peer.artifact / "tokenizer.json"))
    config = getattr(transformers, f"{shape.family}Config")(num_labels=1, **peer.overrides)
    config.vocab_size = max(config.vocab_size, tokenizer.get_vocab_size())
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(shape.max_tokens, config.max_position_embeddings) - 1)
    torch.manual_seed(0)
    try:
        network = getattr(transformers, f"{shape.family}ForSequenceClassification")(config).to(peer.device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {peer.device!r} can't be used: {reason}; expected cpu, cuda, cuda:1, ...") from error

    def encode(request: Request) -> list[int]:
        return [begin, *tokenizer.encode(as_utf8(request.prompt), add_special_tokens=False).ids]

    def answer(requests: Sequence[Request]) -> list[float]:
        with torch.inference_mode():
            return [
                network(input_ids=torch.tensor([encode(request)], device=peer.device)).logits.item()
                for request in requests
            ]

    return Loaded(answer, lambda requests: [len(encode(request)) for request in requests])
