"""Make tests/data/tiny: a whole predictor of under 100 KB, small enough to be committed.

Its encoder has random weights; each head leans towards its own bucket, and the look-up holds a few prompts, so
that predictions differ. Run `python tests/make_tiny_artifact.py` to write it again.
"""

from __future__ import annotations

import hashlib
import json
import string
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mope.backends.network import MopeNetwork, load_encoder
from mope.backends.torch_backend import TorchBackend, empty_networks
from mope.calibration import Calibration
from mope.config import FORMAT_VERSION, Design, PredictorConfig
from mope.features import NUM_FIRST, NUMBER_NAMES, RequestEncoder
from mope.grid import body_edges, tail_edges, tail_shares
from mope.predictor import LengthPredictor
from mope.request import Request
from mope.router import PARTS, Lookup, Router
from mope.rules import RuleTable
from mope.training.encoders import EncoderSource, find_encoder
from mope.training.prepare import number_edges

TINY = Path(__file__).parent / "data" / "tiny"
COMMAND = "python tests/make_tiny_artifact.py"

# prompts of the look-up and how long their answers were, in tokens
PROMPTS = {
    "Thanks!": 12,
    "Is the earth round? yes or no": 2,
    "What is the capital of France? Answer in one word.": 2,
    "Who wrote Hamlet?": 18,
    "Translate 'good morning' to German.": 14,
    "What is 12 * 12?": 9,
    "Hello, how are you today?": 25,
    "Fix the grammar: he go to school": 15,
    "Give me three names for a cat.": 30,
    "Summarise this text in two sentences.": 60,
    "What is the difference between a list and a tuple in Python?": 130,
    "How do I reverse a string in JavaScript?": 110,
    "Write a haiku about the sea.": 40,
    "Explain what a hash table is.": 160,
    "Why is the sky blue?": 120,
    "List ten ideas for a birthday party.": 220,
    "Write a Python function that sorts a list of numbers.": 240,
    "Explain TCP slow start.": 350,
    "Write an essay about the French Revolution.": 800,
    "Write a long story about a dragon who learns to cook.": 950,
    "Write a detailed business plan for a bakery.": 1100,
    "Implement a web server with tests and explain each step.": 900,
    "Give me a comprehensive guide to learning German.": 850,
    "Continue the story.": 600,
}
MAX_PROMPT_TOKENS, MAX_CONTEXT_TOKENS = 24, 8
BOUNDARIES = {1: (), 2: (100.5,), 3: (45.5, 250.5)}
RULES = {"one_word": (0.9, 0.5), "yes_no": (1.5, 0.9), "units": (0.1, 0.3), "list": (0.2, 0.6), "essay": (6.6, 0.4)}


def make_tokenizer() -> Tokenizer:
    """WordPiece over the words of `PROMPTS` and single characters."""
    lower = normalizers.BertNormalizer(lowercase=True)
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for prompt in PROMPTS for word, _ in split.pre_tokenize_str(lower.normalize_str(prompt))}
    characters = string.ascii_lowercase + string.digits
    pieces = [*string.punctuation, *characters, *(f"##{character}" for character in characters)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *sorted(words - set(pieces))]
    model = models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]")  # type: ignore[call-arg]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = lower, split, decoders.WordPiece()  # type: ignore[assignment]
    tokenizer.add_special_tokens(vocabulary[:5])
    return tokenizer


def save_encoder(folder: Path) -> None:
    """Write a BERT of random weights and its tokenizer, as `transformers` saves an encoder."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def make_config(encoder_folder: Path, design: Design = "shared", num_experts: int = 3) -> PredictorConfig:
    """The config of a tiny predictor."""
    source = find_encoder(str(encoder_folder))
    encoder = make_encoder(source)
    body = body_edges(1000, 24)
    tail = tail_edges(float(body[-1]), 8000, 4)
    requests = [Request(prompt=prompt) for prompt in PROMPTS]
    numbers = encoder.encode(requests).numbers_BF
    deviation = numbers.std(axis=0)
    return PredictorConfig(
        format_version=FORMAT_VERSION,
        preset="small",
        design=design,
        num_experts=num_experts,
        boundaries=BOUNDARIES[num_experts],
        edges=tuple(float(edge) for edge in (*body, *tail)),
        num_body_bins=len(body) - 1,
        tail_shares=tuple(float(share) for share in tail_shares(float(body[-1]), tail, 1.5)),
        tail_index=1.5,
        label_tokenizer="cl100k_base",
        encoder="tiny-random-bert",
        encoder_config=source.config,
        tokenizer_sha256=hashlib.sha256(encoder.tokenizer_json().encode()).hexdigest(),
        special_ids=source.special_ids,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        chars_per_token=10,
        lexical_chars=2000,
        target_llms=("llama-3-8b", "gpt-4"),
        unnamed_llm=True,
        unknown_llms={},
        llm_dim=2,
        head_hidden=8,
        number_names=NUMBER_NAMES[:NUM_FIRST],  # those of the first release: its artifacts go on
        number_mean=tuple(round(float(mean), 4) for mean in numbers.mean(axis=0)),
        number_scale=tuple(round(float(1 / d), 4) if d > 1e-4 else 0.0 for d in deviation),
        number_edges=number_edges(numbers, 4),
        router_parts=PARTS if num_experts > 1 else (),
        combination="mixture",
    )


def make_encoder(source: EncoderSource) -> RequestEncoder:
    """The encoder of requests that belongs to `make_config`."""
    return RequestEncoder(
        source.tokenizer(),
        special_ids=source.special_ids,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        chars_per_token=10,
        lexical_chars=2000,
        target_llms=("llama-3-8b", "gpt-4"),
        number_names=NUMBER_NAMES[:NUM_FIRST],
    )


def _lean(network: MopeNetwork, centres: list[float], edges: np.ndarray) -> None:
    """Bias each head towards lengths around its centre; give the target LLMs something to say."""
    middle = np.log(np.sqrt(edges[:-1] * edges[1:]))
    torch.nn.init.normal_(network.llm.weight)
    for head, centre in zip(network.heads, centres, strict=True):
        bias = torch.tensor(-0.5 * ((middle - np.log(centre)) / 0.8) ** 2, dtype=torch.float32)
        head.bias.data[:-2] += torch.cat([bias, bias[-1:] - 1.0])  # type: ignore[index, operator, union-attr]


def make_predictor(encoder_folder: Path, design: Design = "shared", num_experts: int = 3) -> LengthPredictor:
    """A tiny predictor, the same on each call."""
    config = make_config(encoder_folder, design, num_experts)
    torch.manual_seed(0)
    networks = empty_networks(config)
    edges = np.asarray(config.edges)
    centres = list(np.sqrt(np.array([4.0, *config.boundaries]) * np.array([*config.boundaries, 2000.0])))
    for position, network in enumerate(networks):
        network.encoder.load_state_dict(load_encoder(str(encoder_folder)).state_dict())
        own = centres if design == "shared" else centres[position - 1 : position] if position else []
        _lean(network, own, edges[: config.num_body_bins + 1])
    backend = TorchBackend(networks, config)
    encoder = make_encoder(find_encoder(str(encoder_folder)))

    tokens = np.array(list(PROMPTS.values()))
    buckets = np.searchsorted(config.boundaries, tokens)
    prior = np.bincount(buckets, minlength=num_experts) / len(buckets)
    encoded = encoder.encode([Request(prompt=prompt) for prompt in PROMPTS])
    embedding = backend.run(encoded, lambda gate, _: np.ones(gate.shape, dtype=bool)).embedding_BH
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    lookup = Lookup(embedding.astype(np.float16), buckets.astype(np.uint8), neighbours=5)
    # every part counts alike: the route is the geometric mean of the votes
    combiners = {
        "+".join(parts): (np.tile(np.eye(num_experts) / len(parts), (len(parts), 1)), np.zeros(num_experts))
        for parts in (("gate",), ("rules",), ("lookup",), PARTS[:2], ("gate", "lookup"), PARTS[1:], PARTS)
    }
    router = Router(
        np.asarray(config.boundaries, dtype=np.float64), prior, RuleTable(RULES), lookup, combiners, config.router_parts
    )
    knots = np.linspace(0.0, 1.0, 9)
    calibration = Calibration(knots, knots**1.1, knots**0.9)
    fallback = np.searchsorted(np.sort(tokens), edges, side="right") / len(tokens)
    return LengthPredictor(config, backend, encoder, router, calibration, fallback)


def main(folder: Path = TINY) -> None:
    """Write the predictor to `folder`."""
    with tempfile.TemporaryDirectory() as encoder_folder:
        save_encoder(Path(encoder_folder))
        predictor = make_predictor(Path(encoder_folder))
    predictor.save_pretrained(folder)
    (folder / "README.md").write_text(f"A predictor with random weights, for tests. Made by `{COMMAND}`.\n")
    (folder / "metrics.json").write_text(json.dumps({"test": {}}) + "\n")
    print(f"wrote {folder}; to make it again: {COMMAND}", file=sys.stderr)


if __name__ == "__main__":
    main()
