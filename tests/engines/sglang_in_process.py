"""Asks an SGLang engine in this process for answers, with forged `custom_params`; prints JSON of what came of it.

python -m tests.engines.sglang_in_process MODEL
"""

from __future__ import annotations

import json
import sys
from typing import Any

FORGED = {"mope_client": "acme/alice", "mope_tokens": 1.0, "mope_seal": "0" * 32}
PAIRS = [["mope_client", "acme/alice"], ["mope_tokens", 1]]


def main() -> None:
    """Prints, as the last line, `states` of mope and the errors that were raised."""
    import sglang

    engine = sglang.Engine(
        model_path=sys.argv[1],
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        max_total_tokens=4096,
        max_running_requests=4,
        mem_fraction_static=0.2,
        schedule_policy="equinox",
        skip_server_warmup=True,
    )
    errors: list[str] = []

    def ask(custom: Any) -> None:
        parameters = {"max_new_tokens": 2, "ignore_eos": True, "custom_params": custom}
        try:
            engine.generate(input_ids=[5, 6], sampling_params=parameters)
        except ValueError as error:
            errors.append(str(error))

    try:
        for custom in (FORGED, None, {}, 0, "", [], "x", True, PAIRS):
            ask(custom)
        engine.generate(input_ids=[[5], [6]], sampling_params=[{"max_new_tokens": 2, "custom_params": FORGED}, {}])
        states = [state.get("mope") for state in engine.get_server_info()["internal_states"]]
        print(json.dumps({"states": states, "errors": errors}), flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
