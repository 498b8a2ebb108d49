"""Answers, token by token: many at once through transformers' continuous batching, and one alone where that cannot do what is asked.

``transformers serve`` is not used as it is. Its handlers set up continuous batching with the sampling parameters of the first request
and use them for all that follow, ignore what they do not support, know no adapters, and call the model by its path. What it is
made of is used: `ContinuousBatchingManager` with per-request temperature, top_k and top_p, and ``generate``.

Adapters are switched between groups of requests (`turns`). With adapters, neither prefixes are shared between requests (the cache of a
prefix depends on the adapter that made it) nor CUDA graphs used."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingTopKLogitsWarper
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from kaito_core.plugins.types import ServingConfiguration
from kaito_core.problems import Failure
from kaito_runtime_transformers.estimate import ALONE, BATCH_TOKENS
from kaito_runtime_transformers.model import Loaded, Voice
from kaito_runtime_transformers.protocol import EngineDied, Sampling
from kaito_runtime_transformers.turns import Turns

BROKEN: Final[Any] = getattr(torch, "AcceleratorError", ())
"""A fault of the GPU, which leaves it unusable for this process; torch has a name for it since 2.8."""


@dataclass(frozen=True)
class Layout:
    """What the engine is told by the job."""

    configuration: ServingConfiguration
    batching: bool
    page: int
    """Tokens of a page of the cache."""
    batch_tokens: int
    cache_tokens: int

    @staticmethod
    def of(configuration: ServingConfiguration, config: Any, cache_tokens: int) -> Layout:
        return Layout(
            configuration,
            bool(config["continuous-batching"]) and configuration.pipeline == 1,
            config["cb-block-size"],
            config["cb-max-batch-tokens"] or BATCH_TOKENS[configuration.device],
            cache_tokens,
        )


class Engine:
    """Generates for several voices at once. All methods but `start` and `stop` belong to one event loop."""

    def __init__(self, loaded: Loaded, layout: Layout, say: Callable[[str], None] = print) -> None:
        self.loaded = loaded
        self._layout = layout
        self._say = say
        self._manager: Any = None
        self._turns: Turns[tuple[str, bool]] = Turns(self._switch)
        self._one = asyncio.Lock()
        self._numbers = itertools.count()
        self._vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        self._broken: Exception | None = None
        self.switches = 0
        self.context = layout.configuration.context

    # --- life

    def start(self) -> None:
        """Gets the memory of the cache and answers a first request, so that what cannot work is found before anybody asks. Where a
        model cannot be batched, it is said, and requests are answered one after the other."""
        if self._layout.batching:
            try:
                self._manager = self._started()
                self._try_out()
            except torch.OutOfMemoryError as e:
                self.stop()
                raise Failure("the cache does not fit into the memory of the GPU: " + str(e).splitlines()[0],
                              "set max-model-len or memory-share lower in inference_config.yaml") from e  # fmt: skip
            except Exception as e:
                self.stop()
                self._manager = None
                words = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
                self._say(f"this model cannot be batched ({words}): requests are answered one at a time")

    def stop(self) -> None:
        """Ends the thread that generates, whatever it does."""
        if self._manager is not None:
            with suppress(Exception):
                self._manager.stop(block=True, timeout=10, hard_stop=True)

    @property
    def alive(self) -> bool:
        """Whether requests can be answered. What has begun to die is not alive, though it may not have said why yet."""
        m = self._manager
        running = m is None or (m.is_running() and m.background_thread_status.can_accept_new_requests() is None)
        return running and self._broken is None

    @property
    def fault(self) -> str:
        """Why it is not alive, in one line; empty where that has not been said."""
        error = self._broken
        if error is None and self._manager is not None:
            error = self._manager.background_thread_status.fatal_error
        if error is None:
            return "" if self.alive else "the thread that generates has ended without a word"
        return next(
            (f"{type(error).__name__}: {line}" for line in str(error).splitlines() if line.strip()), repr(error)
        )

    @property
    def batches(self) -> bool:
        """Whether requests are answered together."""
        return self._manager is not None

    def _started(self) -> Any:
        layout = self._layout
        pages = math.ceil(layout.cache_tokens / layout.page)
        # Processors are made only for settings that differ from the neutral ones; every request then brings its own.
        sampling = GenerationConfig(
            do_sample=True, temperature=0.9, top_k=50, top_p=0.9, max_new_tokens=1, eos_token_id=-1, pad_token_id=0
        )
        config = ContinuousBatchingConfig(
            page_size=layout.page,
            num_blocks=pages,
            max_batch_tokens=layout.batch_tokens,
            max_requests_per_batch=layout.configuration.requests,
            allow_block_sharing=self.loaded.peft is None,
            # A recorded graph computes with the adapter that was in the model when it was recorded.
            use_cuda_graph=None if self.loaded.peft is None else False,
            use_async_batching=None if self.loaded.peft is None else False,
            per_request_processors=True,
            auto_switch_to_flash=False,
        )
        manager = self.loaded.model.init_continuous_batching(
            generation_config=sampling, continuous_batching_config=config
        )
        processors = manager.logit_processor.logits_processor
        for number, processor in enumerate(processors):
            if isinstance(processor, ContinuousBatchingTopKLogitsWarper):
                processors[number] = _Likeliest.of(processor)
        if not {"temperature", "top_k", "top_p"} <= manager.logit_processor.supported_keys.keys():
            raise RuntimeError("this version of transformers does not sample each request in its own way")
        manager.start()
        return manager

    def _try_out(self) -> None:
        """One token, greedily, through the cache; compared with what the model says without it."""
        ids = [1, 2, 3]
        name = self._manager.add_request(
            ids, max_new_tokens=1, eos_token_id=-1, **_batched(Sampling(temperature=0), self._vocabulary)
        )
        result = None
        while result is None and self.alive:
            result = self._manager.get_result(name, timeout=1.0)
        if result is None or result.error is not None:
            raise RuntimeError(result.error if result else str(self._manager.background_thread_status.fatal_error))

    # --- answers

    async def generate(
        self, voice: Voice, ids: Sequence[int], sampling: Sampling, room: int
    ) -> AsyncGenerator[list[int]]:
        """The tokens of an answer, as they come; at most ``room``. Leaving the iterator ends the work on it.

        Raises `EngineDied`, or RuntimeError with the words of whoever failed."""
        stops = sorted(self.stops(voice, sampling))
        alone = self._manager is None or sampling.alone
        answer = self._alone if alone else self._together
        # Closed before the turn is given on: whoever comes next may switch the adapter.
        async with (
            self._turns((voice.key, alone)),
            self._one if alone else nullcontext(),
            self._still_alive(),
            aclosing(answer(list(ids), sampling, stops, room)) as pieces,
        ):
            async for tokens in pieces:
                yield tokens

    @asynccontextmanager
    async def _still_alive(self) -> AsyncIterator[None]:
        """The engine may die while a request waits for its turn, and while it is answered. Raises `EngineDied`."""
        if not self.alive:
            raise EngineDied(self.fault)
        try:
            yield
        except BROKEN as e:
            self._broken = e
            raise EngineDied(self.fault) from e

    @staticmethod
    def stops(voice: Voice, sampling: Sampling) -> set[int]:
        """The tokens that end such an answer."""
        return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else voice.stops)}

    def alone(self, sampling: Sampling) -> bool:
        """Whether such a request is limited to `longest_alone` tokens: it has no part in the shared cache."""
        return self._manager is not None and sampling.alone

    @property
    def longest_alone(self) -> int:
        return min(ALONE, self.context)

    async def _together(
        self, ids: list[int], sampling: Sampling, stops: list[int], room: int
    ) -> AsyncGenerator[list[int]]:
        manager = self._manager
        name = f"r{next(self._numbers)}"
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(name, outputs.put_nowait)
        finished = False
        try:
            added = manager.add_request(
                ids,
                request_id=name,
                max_new_tokens=room,
                streaming=True,
                eos_token_id=stops or -1,
                **_batched(sampling, self._vocabulary),
            )
            if added is None:
                raise EngineDied(self.fault)
            given = 0
            while not finished:
                try:
                    output = await asyncio.wait_for(outputs.get(), 5.0)
                except TimeoutError:
                    if not self.alive:
                        raise EngineDied(self.fault) from None
                    continue
                finished = output.is_finished()
                if output.error is not None:
                    raise RuntimeError(output.error) if self.alive else EngineDied(str(output.error))
                tokens = output.generated_tokens[given:]
                given += len(tokens)
                if tokens:
                    yield tokens
        finally:
            if not finished:
                manager.cancel_request(name)
            manager.output_router.result_handlers.pop(name, None)

    async def _alone(
        self, ids: list[int], sampling: Sampling, stops: list[int], room: int
    ) -> AsyncGenerator[list[int]]:
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[list[int] | None] = asyncio.Queue()
        gone = threading.Event()

        def put(new: list[int]) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, new)

        def work() -> None:
            try:
                _generate(self.loaded.model, ids, sampling, stops, room, put, gone)
            finally:
                loop.call_soon_threadsafe(tokens.put_nowait, None)

        running = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while (new := await tokens.get()) is not None:
                yield new
            await running
        finally:
            gone.set()
            if not running.done():  # the model is free when its step is done, not before
                await asyncio.shield(asyncio.wait([running]))

    # --- adapters

    async def _switch(self, kind: tuple[str, bool]) -> None:
        """Puts the adapter of this kind of requests into the model, which nobody uses now."""
        if self.loaded.peft is not None:
            self.switches += 1
            await asyncio.to_thread(self._put_in, kind[0])

    def _put_in(self, key: str) -> None:
        peft = self.loaded.peft
        assert peft is not None
        # The thread that generates may still be at the end of a step whose result nobody wants any more.
        running = self._manager is not None and self._manager.is_running()
        with self._manager.pause() if running else nullcontext():
            if key:
                peft.base_model.enable_adapter_layers()
                peft.base_model.set_adapter(key)
                peft.requires_grad_(False)
            else:
                peft.base_model.disable_adapter_layers()


def _batched(sampling: Sampling, vocabulary: int) -> dict[str, Any]:
    """A request's own settings for continuous batching. Greedy is the likeliest one of one."""
    if sampling.greedy:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    return {
        "temperature": max(sampling.temperature, 1e-3),
        "top_k": sampling.top_k or vocabulary,
        "top_p": sampling.top_p,
    }


class _Likeliest(ContinuousBatchingTopKLogitsWarper):
    """top_k where 1 is really one: of equally likely tokens, which are usual in 16 bit, the first, as ``generate`` takes it."""

    @staticmethod
    def of(processor: ContinuousBatchingTopKLogitsWarper) -> _Likeliest:
        made = _Likeliest.__new__(_Likeliest)
        made.__dict__.update(processor.__dict__)
        return made

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        kept = super().__call__(scores, tensor_arg)
        best = scores.argmax(dim=-1, keepdim=True)
        only = torch.full_like(scores, self.filter_value).scatter(-1, best, scores.gather(-1, best))
        return torch.where((tensor_arg[: scores.size(0)] == 1).unsqueeze(-1), only, kept)


# --- one request alone


class _Streamer:
    """What ``generate`` hands its tokens to; the first call brings the prompt."""

    def __init__(self, put: Callable[[list[int]], None]) -> None:
        self._put = put
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
        else:
            self._put(value.reshape(-1).tolist())

    def end(self) -> None: ...


class _Gone(StoppingCriteria):
    def __init__(self, gone: threading.Event) -> None:
        self._gone = gone

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._gone.is_set(), dtype=torch.bool, device=input_ids.device)


class _Penalties(LogitsProcessor):
    """OpenAI's penalties on what the answer already says, and its biases (platform.openai.com/docs/guides/text-generation)."""

    def __init__(self, sampling: Sampling, prompt: int) -> None:
        self._s, self._prompt = sampling, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self._prompt :], minlength=scores.shape[-1])[: scores.shape[-1]].to(scores)
        scores = scores - counts * self._s.frequency_penalty - (counts > 0).to(scores) * self._s.presence_penalty
        for token, bias in self._s.logit_bias.items():
            if token < scores.shape[-1]:
                scores[0, token] += bias
        return scores


@torch.inference_mode()
def _generate(
    model: Any,
    ids: list[int],
    sampling: Sampling,
    stops: list[int],
    room: int,
    put: Callable[[list[int]], None],
    gone: threading.Event,
) -> None:
    prompt = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    chosen: dict[str, Any] = (
        {"do_sample": False}
        if sampling.greedy
        else {
            "do_sample": True,
            "temperature": max(sampling.temperature, 1e-3),
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    )
    config = GenerationConfig(
        max_new_tokens=room,
        min_new_tokens=(sampling.min_tokens or None) if stops else None,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops or -1,  # no token has this number; None would be the model's own
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
        **chosen,
    )
    penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Penalties(sampling, len(ids))] if penalties else []),
        stopping_criteria=StoppingCriteriaList([_Gone(gone)]),
        streamer=_Streamer(put),
    )
