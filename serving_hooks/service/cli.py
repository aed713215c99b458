"""`mope serve`: from a command line to a server that listens."""

from __future__ import annotations

import logging
import logging.config
import signal
import socket
from collections.abc import Sequence

from mope.errors import ConfigError
from mope.extras import require
from mope.flags import Parser, add_flags, flag_name, given, validated
from mope.request import Request
from mope.serving_hooks.service.config import ServeConfig

KEEP_ALIVE_S = 75  # that a connection without a request stays open: gateways reuse theirs
BACKLOG = 2048

DETAILS = """\
Predict over HTTP: POST the body of a request (OpenAI chat, completions or responses, Anthropic messages, or
{"prompt": ...}) to /v1/predict, and what was generated to /v1/observe.

/docs shows every field and examples, /metrics is for Prometheus, /health and /ready for orchestrators. SIGTERM ends it
after the requests under way. `mope doctor serve` says what is installed, and looks at a server that runs."""
EXAMPLE = """\
mope serve chat-small
mope serve chat-small --host 0.0.0.0 --api-keys keys.json --learned learned.json
curl -s localhost:8400/v1/predict -d '{"prompt": "Explain TCP slow start.", "model": "llama-3-8b"}'"""

logger = logging.getLogger("mope.serve")


def main(argv: Sequence[str]) -> int:
    """Runs `mope serve` until a signal ends it.

    Args:
        argv: its arguments.

    Returns:
        0.

    Raises:
        UserError: options, a predictor or a port that cannot be used.
    """
    artifact, config = parse(argv)
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "mope serve", "serve")
    serve(artifact, config)
    return 0


def parse(argv: Sequence[str]) -> tuple[str, ServeConfig]:
    """The predictor and the options of a command line.

    Raises:
        ConfigError: arguments that cannot be used.
    """
    parser = Parser("mope serve", DETAILS, "ARTIFACT [options]", EXAMPLE)
    parser.add_argument(
        "artifact",
        metavar="ARTIFACT",
        help="folder of a saved predictor, one that comes with mope (chat-small, chat-micro), or a Hub id",
    )
    add_flags(parser, "serve", ServeConfig)
    arguments = parser.parse_args(argv)
    config = validated(
        ServeConfig, given(arguments).get("serve", {}), lambda place: flag_name(str(place[0])) if place else "options"
    )
    return arguments.artifact, config


def serve(artifact: str, config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        artifact: name, folder or Hub id of the predictor.
        config: how.

    Raises:
        UserError: a predictor, a profile, a file of keys or a port that cannot be used.
    """
    import uvicorn

    from mope.predictor import LengthPredictor
    from mope.serving_hooks.service.app import create_app
    from mope.serving_hooks.service.desk import Desk
    from mope.serving_hooks.service.keys import Keys

    logging.config.dictConfig(log_config := _log_config(config))
    keys = Keys(config)
    listening = listen(config.host, config.port)
    with listening:
        predictor = LengthPredictor.from_pretrained(
            artifact,
            backend=config.backend,
            device=config.device,
            precision=config.precision,
            num_threads=config.num_threads,
        )
        predictor.predict_batch([Request(prompt="warm up")])
        desk = Desk(predictor, config, artifact)
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(desk, keys),
                log_config=log_config,
                access_log=False,
                server_header=False,
                limit_concurrency=config.max_connections,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(config.shutdown_s),
                backlog=BACKLOG,
            )
        )
        host, port = listening.getsockname()[:2]
        logger.info("predictions by %s at http://%s:%d (%s)", artifact, host, port, predictor.backend_reason)
        if not keys.required and host not in ("127.0.0.1", "::1"):
            logger.warning("no API keys: everybody who reaches %s may ask and teach; give --api-keys", host)
        # uvicorn raises the signal again once it has ended, and a service that was asked to end has not failed
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            desk.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken.
    """
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: {said}; choose another port, or 0 for a free one") from error
    # connections inherit it. asyncio sets it only where it made the socket, and a response in two parts then waits some
    # 40 ms for the client's delayed acknowledgement
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _log_config(config: ServeConfig) -> dict[str, object]:
    from mope.serving_hooks.service.logs import log_config

    return log_config(config.log_format)
