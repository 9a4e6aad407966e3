"""`edge-runtime chat`: a chat with the target in the terminal, with history."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from edge_runtime.cli.draft_options import load_draft, resolve_bundle
from edge_runtime.cli.generate import add_max_new_tokens_option, report_link_trouble, summarize
from edge_runtime.cli.generation_factory import GenerationFactory, add_generation_options
from edge_runtime.cli.local_verifier import require_verifier_package, run_verifier
from edge_runtime.cli.settings_options import add_settings, read_settings
from edge_runtime.common.options import add_flag, add_option
from edge_runtime.common.prompt_text import check_text
from edge_runtime.common.sampling_options import add_sampling_options, read_sampling
from edge_runtime.common.tasks import background_task
from edge_runtime.common.terminal import print_note
from edge_runtime.protocol.errors import FlexSpecError, InputError

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_runtime.decoding import Generation
    from edge_runtime.draft import OnnxDraft
    from edge_runtime.service.chat_template import ChatTemplate, Conversation

COMMANDS_HELP = """\
/system TEXT   set the system message, or remove it without TEXT, and begin a new conversation
/reset         begin a new conversation with the same system message
/help          show this
/quit          leave; so does Ctrl-D

Ctrl-C stops an answer. A line that begins with a space is sent as it is, also if a / follows."""
HELP = "chat with the target in this terminal"
DESCRIPTION = f"""\
Chats with the target model: the draft model runs here, the target on a verifier, and the conversation is written by the
target's own chat template. On a terminal, tokens that this board drafted are green once they are accepted, and those
that the target wrote itself yellow. From a pipe, every line of standard input is a message, and only the answers go to
standard output. The service's page in a browser has a chat, too.

{COMMANDS_HELP}

examples:
  edge-runtime chat --verifier http://127.0.0.1:8500
  edge-runtime chat --target family/target-v2
  edge-runtime chat --system "Answer in one sentence." --temperature 0.7 --top-p 0.9 --seed 1
  echo "Why is the sky blue?" | edge-runtime chat --quiet
"""
# Bold; readline must know which characters take no space.
PROMPT = "\x01\x1b[1m\x02> \x01\x1b[0m\x02"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_settings(parser, "draft.bundle", "draft.threads", "draft.prefix_cache_mib")
    text = "start a verifier here for this target: a Hugging Face directory or a GGUF file; needs flexspec[cloud]"
    add_option(parser, "--target PATH", text, type=Path)
    add_option(parser, "--system TEXT", "system message (default: none; many chat templates have one of their own)")
    add_max_new_tokens_option(parser, default=1024)
    add_sampling_options(parser, of_model=True)
    add_flag(parser, "--quiet", "print neither statistics nor link trouble on standard error")
    add_generation_options(parser)
    parser.set_defaults(run=_run)


async def _run(options: argparse.Namespace) -> int:
    import msgspec

    from edge_runtime.protocol.bundle import read_bundle, read_chat_format
    from edge_runtime.service.chat_template import ChatTemplate

    settings = read_settings(options)
    bundle: Path = resolve_bundle(options, settings.draft)
    draft = load_draft(bundle, settings)
    chat = read_chat_format(read_bundle(bundle, verify=False))
    template = ChatTemplate(chat, bundle)
    sampling = read_sampling(options, **msgspec.structs.asdict(chat.sampling))
    factory = GenerationFactory(options, settings, draft)
    async with contextlib.AsyncExitStack() as stack:
        if options.target:
            require_verifier_package()
            print_note(f"edge-runtime: starting a verifier for {options.target}")
            url = await stack.enter_async_context(run_verifier(options.target))
            settings = settings.replace({"verifier.urls": [url]})
        client, generate = await stack.enter_async_context(factory.connect(settings, sampling))
        session = ChatSession(draft, template, generate, options.system or "", sampling.stop_ids)
        if not options.quiet and template.is_plain:
            print_note("edge-runtime: this model has no chat template: it continues a plain dialog")
        async with contextlib.nullcontext() if options.quiet else background_task(report_link_trouble(client)):
            await _talk(session, quiet=options.quiet)
    return 0


class ChatSession:
    """A conversation, and the means to continue it.

    Attributes:
        messages: the conversation so far, the system message first, if there is one.
    """

    def __init__(
        self,
        draft: OnnxDraft,
        template: ChatTemplate,
        generate: Callable[[list[int]], Generation],
        system: str,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            generate: makes the generation that continues a prompt.
            stop_ids: see `Sampling`.
        """
        self._stop_ids = stop_ids
        self._tokenizer = draft.tokenizer
        self._template = template
        self._generate = generate
        self._explained = False
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begin a new conversation with this system message; None keeps the one before, and an empty one is none."""
        if system is not None:
            self._system = system
        self.messages: Conversation = [{"role": "system", "content": self._system}] if self._system else []

    async def answer(self, text: str) -> Generation:
        """Send a message and write the answer to standard output; return the finished generation.

        If it is cancelled, what was written stays in the conversation.

        Raises:
            FlexSpecError: there is no answer; the message is not part of the conversation then.
        """
        from edge_runtime.cli.text_stream import TextStream
        from edge_runtime.decoding import decode_continuation

        asked: Conversation = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.encode(self._tokenizer, self._template.render(asked))
        generation = self._generate(prompt)
        stops = self._template.stop_strings
        stream = TextStream(self._tokenizer, sys.stdout, prompt=prompt, stop_strings=stops, stop_ids=self._stop_ids)
        if not self._explained:
            stream.write_legend()
            self._explained = True
        failed = False
        try:
            async with aclosing(generation.__aiter__()) as pieces:  # type: ignore[type-var]  # it is an async generator
                async for piece in pieces:
                    stream.write(piece)
                    if stream.stopped:
                        break
        except FlexSpecError:
            failed = True
            raise
        finally:
            unverified = [] if stream.stopped else generation.unverified
            if not failed or stream.text:
                stream.end(unverified)
            if not failed:
                said = stream.text + decode_continuation(self._tokenizer, generation.ids, unverified)
                said = said.strip() if self._template.is_plain else said
                self.messages = [*asked, {"role": "assistant", "content": said}]
        return generation


async def _talk(session: ChatSession, *, quiet: bool) -> None:
    """Answer messages until the end of standard input or /quit. Raises FlexSpecError if nobody is at a terminal."""
    interactive = sys.stdin.isatty()
    prompt = PROMPT if interactive and sys.stdout.isatty() else ""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() line editing and history
        if not quiet:
            print_note("/help shows the commands")
    # asyncio's own handler would cancel this task.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            line = _read_line(prompt, interactive=interactive)
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print_note("")
            print_note("(Ctrl-D or /quit leaves)")
            continue
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word.startswith("/"):
            _run_command(session, word, rest.strip())
        elif line.strip():
            try:
                text = check_text(line.strip(), "the message")
            except InputError as error:
                print_note(f"edge-runtime: {error}")
                continue
            await _answer(session, text, quiet=quiet, interactive=interactive)


def _read_line(prompt: str, *, interactive: bool) -> str:
    """Return the next line. Raises EOFError, and KeyboardInterrupt on Ctrl-C.

    It blocks the event loop, which has nothing to do meanwhile. In a thread, readline would see no signals, and would
    leave the terminal without echo when the process ends.
    """
    if interactive:
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _run_command(session: ChatSession, word: str, rest: str) -> None:
    if word == "/reset":
        session.reset()
    elif word == "/system":
        session.reset(rest)
    elif word == "/help":
        for line in COMMANDS_HELP.splitlines():
            print_note(line)
    else:
        print_note(f"no command {word}: /help lists them; begin with a space to send the line")


async def _answer(session: ChatSession, text: str, *, quiet: bool, interactive: bool) -> None:
    """Answer one message; Ctrl-C stops the answer."""
    answering = asyncio.ensure_future(session.answer(text))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        await asyncio.wait({answering})
    finally:
        # Ctrl-C raises KeyboardInterrupt again, which ends input().
        loop.remove_signal_handler(signal.SIGINT)
        answering.cancel()
    if answering.cancelled():
        if not interactive:
            _interrupt()
        print_note("(stopped)")
        return
    try:
        generation = answering.result()
    except FlexSpecError as error:
        if not interactive:
            raise
        print_note(f"edge-runtime: {error}; the message was not answered, /reset begins anew")
        return
    if not quiet:
        print_note(_describe(generation))


def _describe(generation: Generation) -> str:
    """Say in a line who wrote an answer, how it ended and what it cost, in the words of the other views."""
    from edge_runtime.service.monitoring.words import count, load_words

    words = load_words()
    parts = [summarize(generation.statistics)]
    if generation.finish in ("length", "cancelled"):
        parts.insert(0, words.outcomes[generation.finish])
    if generation.unverified:
        parts.insert(0, f"the last {count(len(generation.unverified), 'token')} {words.tokens['unverified']}")
    return f"{generation.version or 'no verifier'}: {', '.join(parts)}"


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt
