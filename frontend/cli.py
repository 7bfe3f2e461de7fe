"""``folovllm complete | chat | status``: a running engine from the command line.

The engine is found by ``--run-dir``, ``FOLOVLLM_RUN_DIR`` or the user's default directory.
Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys

from frontend.client import Client, TokenStream
from frontend.errors import EngineError, RequestFailed
from frontend.sampling_flags import add_sampling_arguments, sampling_params
from frontend.status import no_engine, read_status
from protocol.run_dir import locate
from protocol.sampling_params import BadRequest, SamplingParams

NOT_SHOWN = {"logprobs", "prompt_logprobs", "detokenize", "output_kind"}    # a terminal shows text alone
COMPLETE_MAX_TOKENS = 128
CHAT_HELP = "/clear forgets the conversation, Ctrl-C ends an answer, Ctrl-D leaves"


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return arguments.command(arguments)
    except (BadRequest, EngineError) as error:
        print(f"folovllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:      # the reader of our output has left
        sys.stderr.close()
        return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="folovllm", description="Talk to a running FoloVLLM engine.",
        epilog="Start an engine with 'python launch.py'.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    complete = commands.add_parser("complete", help="continue a text", description="Continue a text, as it stands.", allow_abbrev=False)
    complete.add_argument("text", help="what to continue; '-' reads it from standard input")
    add_sampling_arguments(complete, leave_out=NOT_SHOWN, max_tokens=COMPLETE_MAX_TOKENS)
    complete.set_defaults(command=complete_command)

    chat = commands.add_parser("chat", help="a conversation", description=f"A conversation; {CHAT_HELP}.", allow_abbrev=False)
    chat.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's own)")
    add_sampling_arguments(chat, leave_out=NOT_SHOWN | {"n"}, max_tokens=None)
    chat.set_defaults(command=chat_command)

    status = commands.add_parser(
        "status", help="processes, requests, KV memory",
        description="How the engine stands; answers even when its core does not.", allow_abbrev=False)
    status.add_argument("--json", action="store_true", help="machine-readable, on one line")
    status.set_defaults(command=status_command)

    for command in (complete, chat, status):
        command.add_argument("--run-dir", metavar="DIR", help="directory of the engine (default: FOLOVLLM_RUN_DIR,"
                             f" else the user's own, now {locate().path})".replace("%", "%%"))
    return parser.parse_args(argv)


def complete_command(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    with Client(arguments.run_dir) as client:
        if params.n > 1:
            for output in client.generate(text, params)[0].outputs:
                print(f"[{output.index}] {output.text}")
        else:
            show(client.stream(text, params))
    return 0


def chat_command(arguments: argparse.Namespace) -> int:
    params = sampling_params(arguments)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with Client(arguments.run_dir) as client:
        terminal = sys.stdin.isatty()
        if terminal:
            import readline  # noqa: F401 - line editing and history for input()

            print(f"{client.model}: {CHAT_HELP}", file=sys.stderr)
        messages = list(opening)
        while (text := ask(terminal)) is not None:
            if text.strip() == "/clear":
                messages = list(opening)
            elif text.strip():
                messages.append({"role": "user", "content": text})
                answer(client, messages, params)
    return 0


def ask(terminal: bool) -> str | None:
    """A line of the user; None when he leaves."""
    while True:
        try:
            return input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return None
        except KeyboardInterrupt:
            print("  (Ctrl-D leaves)")


def answer(client: Client, messages: list[dict[str, str]], params: SamplingParams) -> None:
    """Stream the answer and append it; an interrupted one stays as far as it came."""
    stream = None
    try:
        stream = client.chat(messages, params)
        show(stream)
    except KeyboardInterrupt:
        print("  (interrupted)")
    except (BadRequest, RequestFailed) as error:
        messages.pop()
        hint = "; /clear starts anew" if getattr(error, "code", "") == "context_length_exceeded" else ""
        print(f"folovllm: error: {error}{hint}", file=sys.stderr)
        return
    if stream is not None:
        stream.close()
        messages.append({"role": "assistant", "content": stream.output.outputs[0].text})


def show(stream: TokenStream) -> None:
    """Print text as it comes."""
    for delta in stream:
        print(delta.text, end="", flush=True)
    print(flush=True)


def status_command(arguments: argparse.Namespace) -> int:
    run_dir = locate(arguments.run_dir)
    status = read_status(run_dir)
    if status is None:
        print(f"folovllm: error: {no_engine(run_dir)}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(status))
        return 0
    print(f"model {status['model'] or '?'}  device {status['device'] or '?'}  run dir {run_dir.path}")
    requests, kv = status["requests"], status["kv"]
    print(f"requests  running {requests['running']}  waiting {requests['waiting']}")
    print(f"kv blocks {kv['used']} of {kv['blocks']} used")
    print(f"{'role':<10}{'pid':>8}{'rank':>6}{'epoch':>7}{'gen':>5}  state")
    for p in status["processes"]:
        print(f"{p['role']:<10}{p['pid']:>8}{p['rank']:>6}{p['epoch']:>7}{p['gen']:>5}  {p['state']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
