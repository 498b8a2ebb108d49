"""``kaito chat NAME|URL``: talk to an endpoint, with and without its adapters."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import click

from kaito_core.cli.completions import Asking, Message
from kaito_core.cli.endpoint import Endpoint, endpoint_of
from kaito_core.cli.named import Where, where_options
from kaito_core.problems import Failure, KaitoError, UserError

NO_ADAPTER = "none"
COMMANDS = "/reset forgets the conversation, /exit ends (so does Ctrl-D), Ctrl-C ends an answer"


@click.command("chat")
@click.argument("name", metavar="NAME|URL")
@click.argument("message", nargs=-1, metavar="[MESSAGE...]")
@click.option("--adapter", default="", metavar="NAME", help="Answer as this adapter; 'none': as the model without any.")
@click.option("--compare", is_flag=True, help="Show the answer without and with the adapter, one after the other.")
@click.option("--system", default="", metavar="TEXT", help="What the model is told about its role.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="The longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2), metavar="T", help="0 is the likeliest answer, 2 the wildest."
)
@where_options
def command(
    name: str,
    message: tuple[str, ...],
    adapter: str,
    compare: bool,
    system: str,
    max_tokens: int | None,
    temperature: float | None,
    local: bool,
    context: str,
    kubeconfig: str,
    namespace: str,
) -> int:
    """Talk to an endpoint: to what is served under NAME on this machine or in the cluster, or to the URL of any OpenAI-compatible endpoint.

    What is served on this machine comes first. One in a cluster is asked through the API server, with your own rights; where it is asleep,
    it is woken and waited for.

    With a MESSAGE, or with text on standard input, there is one question and its answer. An API key is taken from KAITO_API_KEY.
    """
    if compare and adapter.lower() == NO_ADAPTER:
        raise UserError("--compare is about an adapter, and --adapter none leaves it out", "leave one of them out")
    endpoint = endpoint_of(name, Where(local, context, kubeconfig, namespace), _aside)
    if endpoint.place:
        _aside(endpoint.place)
    with closing(Asking(endpoint.url, name=endpoint.name, via=endpoint.via)) as asking:
        voices = _voices(_known(endpoint, asking, adapter), adapter, compare)
        chat = Chat(asking, [Voice(v) for v in voices], system, max_tokens, temperature)
        question = " ".join(message).strip()
        if question or not sys.stdin.isatty():
            return _once(chat, question or sys.stdin.read().strip())
        _talk(chat, name)
    return 0


def _known(endpoint: Endpoint, asking: Asking, adapter: str) -> Endpoint:
    """The endpoint with its models; one that is only a URL is asked for them. One that sleeps until it gets a question cannot say,
    and a person who names a model need not wait for that."""
    if endpoint.base:
        return endpoint
    try:
        models = asking.models()
    except Failure:
        if adapter.lower() in ("", NO_ADAPTER):
            raise
        return replace(endpoint, model=adapter, adapters=(adapter,))
    first = (models.adapters or (models.base,))[0]
    return replace(endpoint, base=models.base, model=first, adapters=models.adapters)


def _aside(text: str) -> None:
    """What is no part of an answer."""
    click.echo(click.style(f"({text})", dim=True), err=True)


def _voices(endpoint: Endpoint, adapter: str, compare: bool) -> tuple[str, ...]:
    """Whom to ask, by the names that requests use. UserError for an adapter that is not there."""
    there = ", ".join(endpoint.adapters) or "none"
    if adapter and adapter.lower() != NO_ADAPTER and adapter not in (endpoint.base, *endpoint.adapters):
        raise UserError(
            f"there is no adapter {adapter!r}; there is {there}",
            "`--adapter none` asks the model itself",
            field="--adapter",
        )
    chosen = endpoint.base if adapter.lower() == NO_ADAPTER else adapter or endpoint.model
    if not compare:
        return (chosen,)
    if chosen == endpoint.base:
        raise UserError(
            "there is no adapter to compare with" if not endpoint.adapters else "which adapter is to be compared?",
            f"name one with --adapter; there is {there}",
            field="--compare",
        )
    return endpoint.base, chosen


@dataclass
class Voice:
    """One who answers, and the conversation so far. Whom is compared remembers his own answers only."""

    model: str
    history: list[Message] = field(default_factory=list)


@dataclass
class Chat:
    """A conversation with one voice, or with two side by side."""

    asking: Asking
    voices: list[Voice]
    system: str = ""
    max_tokens: int | None = None
    temperature: float | None = None

    def ask(self, question: str) -> None:
        """Print every voice's answer to the question. One that fails, or is ended before it says anything, is forgotten with its
        question. Raises `KaitoError`, and KeyboardInterrupt once what was said is kept."""
        for voice in self.voices:
            if len(self.voices) > 1:
                click.echo(click.style(f"[{voice.model}]", bold=True))
            said: list[str] = []
            try:
                self._answer(voice, question, said)
            finally:
                if said and not said[-1].endswith("\n"):
                    click.echo()
                if "".join(said).strip():
                    asked = {"role": "user", "content": question}
                    voice.history += [asked, {"role": "assistant", "content": "".join(said)}]

    def _answer(self, voice: Voice, question: str, said: list[str]) -> None:
        first = [{"role": "system", "content": self.system}] if self.system else []
        messages: Sequence[Message] = [*first, *voice.history, {"role": "user", "content": question}]
        live, thinking = sys.stdout.isatty(), False
        answer = self.asking.answer(voice.model, messages, max_tokens=self.max_tokens, temperature=self.temperature)
        with closing(answer):  # type: ignore[type-var]  # a generator
            for piece in answer:
                if piece.kind == "answer":
                    if thinking:
                        click.echo("\n")
                        thinking = False
                    said.append(piece.text)
                    click.echo(piece.text, nl=False)
                    sys.stdout.flush()
                elif piece.kind == "thought" and live:
                    thinking = True
                    click.echo(click.style(piece.text, dim=True), nl=False)
                elif piece.kind == "status" and live:
                    click.echo(click.style(f"({piece.text})", dim=True), err=True)
                elif piece.kind == "end" and piece.text == "length":
                    click.echo("\n(cut off: the answer may be no longer; --max-tokens)", err=True)

    def reset(self) -> None:
        for voice in self.voices:
            voice.history.clear()


def _once(chat: Chat, question: str) -> int:
    if not question:
        raise UserError("there is no question", "give it behind the name, or on standard input")
    chat.ask(question)
    return 0


def _talk(chat: Chat, name: str) -> None:
    """Until the person ends it."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 – gives input() its history and editing
    click.echo(f"{' and '.join(v.model for v in chat.voices)} at {chat.asking.name}\n{COMMANDS}\n")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo(f"\n({COMMANDS})")
            continue
        if question == "/exit":
            return
        if question == "/reset":
            chat.reset()
            click.echo("(forgotten)")
        elif re.fullmatch(r"/[a-z]+", question):
            click.echo(f"(there is no {question}; {COMMANDS})")
        elif question:
            _say(chat, question)


def _say(chat: Chat, question: str) -> None:
    """One question; whatever becomes of it, the conversation goes on."""
    try:
        chat.ask(question)
    except KeyboardInterrupt:
        click.echo("\n(ended)")
    except KaitoError as e:
        for problem in e.problems:
            click.echo(str(problem), err=True)
    click.echo()
